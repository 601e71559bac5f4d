"""Which encoders and sizes can be had: each works, or is refused in one line when it is built."""

import dataclasses

import pytest
import torch

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Teacher

CONFIG = load_preset("tiny", {})
S, VOCAB = CONFIG.data.image_size, 99
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PATCH = {**SMALL, "patch_size": 14}


def student(positions=8, size=S, **settings):
    return Student(dataclasses.replace(CONFIG.student, **settings), size, VOCAB, positions)


def teacher(size=S, **settings):
    return Teacher(dataclasses.replace(CONFIG.teacher, **settings), size, (4, 4))


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_base_patch16_clip_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("deit3_small_patch16_224", 1),
        ("beit3_base_patch16_224", 1),
        ("flexivit_small", 1),
        ("vit_small_patch16_18x2_224", 1),
    ],
)
def test_image_encoders_give_class_token_and_patches(model, prefix):
    built = student(image_model=model, image_overrides=PATCH)
    assert built.vit.num_prefix_tokens == prefix
    cls, patches = built.encode_image(torch.zeros(2, 3, S, S, dtype=torch.uint8))
    assert (cls.shape, patches.shape) == ((2, 32), (2, 16, 32))
    (cls.sum() + patches.square().sum()).backward()
    assert built.vit.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "model",
    [
        "deit_tiny_distilled_patch16_224",
        "beitv2_base_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
    ],
)
def test_teachers_give_class_token_and_patches(model):
    targets = teacher(model=model, overrides=PATCH)(torch.zeros(2, 3, S, S, dtype=torch.uint8))
    assert (targets.cls.shape, targets.patches.shape) == ((2, 32), (2, 16, 32))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        *(("xcit_nano_12_p8_224", 56), ("cait_xxs24_224", 64), ("convit_tiny", 64), ("tnt_s_patch16_224", 64)),
        *(("vit_base_patch16_siglip_224", 64), ("swin_tiny_patch4_window7_224", 56), ("resnet18", 56)),
    ],
)
def test_other_image_models_are_one_line(model, size):
    settings = {} if model in ("resnet18", "tnt_s_patch16_224") or "swin" in model else SMALL
    with pytest.raises(UserError, match=rf"^teacher\..*{model}"):
        teacher(model=model, overrides=settings, size=size)
    with pytest.raises(UserError, match=rf"^student\.image_.*{model}"):
        student(image_model=model, image_overrides=settings, size=size)


@pytest.mark.parametrize(("size", "instead"), [(1, 14), (7, 14), (57, 56), (69, 70)])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_one_line(size, instead):
    with pytest.raises(UserError, match=rf"^data.image_size is {size}: .*14 pixels.*student.image_model.*{instead}$"):
        student(size=size)
    with pytest.raises(UserError, match=rf"^data.image_size is {size}: .*14 pixels.*teacher.model.*{instead}$"):
        teacher(size=size)


@pytest.mark.parametrize("width", [40, 200])
def test_any_width_has_heads_that_divide_it(width):
    assert student(image_overrides={**PATCH, "embed_dim": width}).width == width


IMAGE = {
    "dpeth": (3, "which .* does not take: did you mean 'depth'"),
    "img_size": (28, "data.image_size says it"),
    "num_classes": (10, "head, pooling and final norm are not used"),
    "drop_rate": (0.1, "head, pooling and final norm are not used"),
    "patch_drop_rate": (0.1, "every patch is needed"),
    "checkpoint_path": ("file", "the setting of the weights says it"),
    "pretrained_cfg": ({}, "it is no size of the model"),
    "out_indices": ([1], "it is no size of the model"),
    "init_values": (None, "leave it out"),
}


@pytest.mark.parametrize("name", IMAGE)
def test_image_overrides_without_effect_are_one_line(name):
    value, said = IMAGE[name]
    with pytest.raises(UserError, match=f"student.image_overrides .*{name}.*{said}"):
        student(image_overrides={**PATCH, name: value})
    with pytest.raises(UserError, match=f"teacher.overrides .*{name}.*{said}"):
        teacher(overrides={**PATCH, name: value})


def test_dropout_of_a_teacher_is_one_line():
    student(image_overrides={**PATCH, "drop_path_rate": 0.1})
    with pytest.raises(UserError, match=r"teacher.overrides has 'drop_path_rate' = 0.1.*not trained"):
        teacher(overrides={**PATCH, "drop_path_rate": 0.1})


TEXT = {
    "hiden_size": (32, "did you mean 'hidden_size'"),
    "vocab_size": (50, "data.tokenizer decides that"),
    "hidden_dropout_prob": (0.1, "student.dropout decides that"),
    "num_labels": (3, "did you mean|decides nothing"),
    "use_cache": (False, "it decides nothing of a text encoder"),
    "output_hidden_states": (True, "it decides nothing of a text encoder"),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_overrides_without_effect_are_one_line(name):
    value, said = TEXT[name]
    with pytest.raises(UserError, match=f"student.text_overrides has '{name}' = {value}: .*({said})"):
        student(text_overrides={**CONFIG.student.text_overrides, name: value})


def test_text_overrides_arrive():
    built = student(text_overrides={**CONFIG.student.text_overrides, "layer_norm_eps": 0.5, "hidden_act": "relu"})
    assert built.text.embeddings.LayerNorm.eps == 0.5
    with pytest.raises(UserError, match=r"student.layers is 2: student.text_model 'bert' has only 1"):
        student(text_overrides={**CONFIG.student.text_overrides, "num_hidden_layers": 1})


@pytest.mark.parametrize(
    "model",
    [
        *("bert-base-uncased", "roberta", "xlm-roberta-base", "electra", "deberta-v2", "mpnet", "ernie"),
        *("roformer", "data2vec-text", "megatron-bert", "nystromformer"),
    ],
)
def test_text_encoders_whose_tokens_do_not_see_padding(model):
    built = student(text_model=model)
    ids = torch.arange(5, 15).view(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    _, tokens = built.encode_text(ids, mask)
    assert tokens.shape == (2, 5, 32)
    tokens.square().sum().backward()
    assert next(p for p in built.text.encoder.layer[0].parameters() if p.ndim > 1).grad.abs().sum() > 0


@pytest.mark.parametrize(
    "model", ["albert", "distilbert", "canine", "fnet", "esm", "xmod", "gpt2", "t5", "vit", "unheard"]
)
def test_other_text_models_are_one_line(model):
    with pytest.raises(UserError, match=r"^student\.text_"):
        student(text_model=model)


@pytest.mark.parametrize(("model", "most"), [("bert", 34), ("roberta", 32)])
def test_more_positions_than_the_encoder_has_are_one_line(model, most):
    settings = {"text_model": model, "text_overrides": {**CONFIG.student.text_overrides, "max_position_embeddings": 34}}
    student(positions=most, **settings)
    with pytest.raises(
        UserError, match=f"data.context_length is {most + 1}: student.text_model '{model}' has only {most}"
    ):
        student(positions=most + 1, **settings)
