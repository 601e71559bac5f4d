"""Which encoders and sizes can be had: each works, or is refused in one line when it is built."""

import dataclasses

import pytest
import torch

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.data.tokens import SpecialTokens
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
        ("vit_base_patch16_siglip_gap_224", 1),  # no class token: the mean is one
        ("vit_betwixt_patch16_reg4_gap_256", 5),  # the mean, and registers
        ("beitv2_base_patch16_224", 1),
        ("eva02_tiny_patch14_224", 1),
        ("cait_xxs24_224", 1),
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
    assert built.image.prefix == prefix
    cls, patches = built.encode_image(torch.zeros(2, 3, S, S, dtype=torch.uint8))
    assert (cls.shape, patches.shape) == ((2, 32), (2, 16, 32))
    (cls.sum() + patches.square().sum()).backward()
    assert built.image.model.patch_embed.proj.weight.grad.abs().sum() > 0


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


MAPS = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 32]},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32]},
}


@pytest.mark.parametrize("model", MAPS)
def test_feature_maps_are_patches_of_student_and_teacher(model, capsys):
    built = student(image_model=model, image_overrides=MAPS[model], size=96)
    assert (built.grid, built.image.prefix) == ((3, 3), 1)
    cls, patches = built.encode_image(torch.zeros(2, 3, 96, 96, dtype=torch.uint8))
    assert (cls.shape, patches.shape) == ((2, built.width), (2, 9, built.width))
    assert f"{model!r} has no class token: the mean of its feature map stands for it" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"its 4 stages are no plain stack.*student.layers = 1|its 5 stages"):
        student(image_model=model, image_overrides=MAPS[model], size=96, layers=1)
    targets = teacher(model=model, overrides=MAPS[model], size=96, block=-1)(torch.zeros(2, 3, 96, 96))
    assert targets.patches.shape == (2, 16, built.width)
    assert "3 x 3 patches are resampled to the student's 4 x 4" in capsys.readouterr().out
    # A stage before the last has more patches: a feature map of 6 x 6 here.
    assert teacher(model=model, overrides=MAPS[model], size=96, block=-2).image.grid == (6, 6)
    with pytest.raises(UserError, match=rf"teacher.block is 9: {model!r} has stages 0 to \d; -1 is the last"):
        teacher(model=model, overrides=MAPS[model], size=96, block=9)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_patches_lie_row_by_row(model):
    """A bright patch changes its own feature most."""
    torch.manual_seed(0)
    size, overrides = (128, MAPS[model]) if model in MAPS else (64, SMALL)
    built = student(image_model=model, image_overrides=overrides, size=size).eval()
    rows, columns = built.grid
    side = size // columns
    grey = torch.full((1, 3, size, size), 100, dtype=torch.uint8)
    with torch.no_grad():
        before = built.image(built.pixels(grey, torch.float32))[0, built.image.prefix :]
        for row, column in ((0, columns - 1), (rows - 1, 0), (1, 2)):
            picture = grey.clone()
            picture[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 255
            after = built.image(built.pixels(picture, torch.float32))[0, built.image.prefix :]
            assert (after - before).norm(dim=1).argmax() == row * columns + column


def test_patches_need_not_be_square():
    built = student(image_overrides={**SMALL, "patch_size": [14, 28]})
    assert built.grid == (4, 2)
    assert built.encode_image(torch.zeros(1, 3, S, S, dtype=torch.uint8))[1].shape == (1, 8, 32)
    with pytest.raises(UserError, match=r"data.image_size is 56: no multiple of the 16 pixels"):
        student(image_overrides={**SMALL, "patch_size": [14, 16]})


def test_batch_norm_keeps_its_statistics(capsys):
    built = student(image_model="resnet18", image_overrides=MAPS["resnet18"], size=64)
    assert "BatchNorm layers keep their statistics" in capsys.readouterr().out
    buffers = {name: buffer.clone() for name, buffer in built.named_buffers() if "running" in name}
    built.train().encode_image(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8))
    assert buffers and all(torch.equal(buffer, built.get_buffer(name)) for name, buffer in buffers.items())


@pytest.mark.parametrize("layers", [None, 1])
def test_siglip_has_a_pooling_of_its_own_where_it_is_whole(layers, capsys):
    built = student(image_model="vit_base_patch16_siglip_224", image_overrides=PATCH, layers=layers)
    x = built.image(torch.randn(2, 3, S, S))
    own = f"has no class token: {'its own pooling' if layers is None else 'the mean of patches'}"
    assert own in capsys.readouterr().out
    assert torch.allclose(x[:, 0], built.image.model.attn_pool(x[:, 1:]) if layers is None else x[:, 1:].mean(1))


@pytest.mark.parametrize(
    ("model", "size", "why"),
    [
        (
            "levit_128",
            224,
            "data.image_size is 224: no multiple of the 64 pixels of a patch of .*; give for instance 256",
        ),
        ("vit_tinny_patch16_224", 64, "cannot build it: Unknown model"),
    ],
)
def test_other_image_models_are_one_line(model, size, why):
    with pytest.raises(UserError, match=why):
        student(image_model=model, image_overrides={}, size=size)


def test_the_named_backbone_is_taken(capsys):
    with pytest.raises(UserError, match=r"student.image_model is 'resnet18': it has no plain stack of blocks"):
        student(image_model="resnet18", image_overrides={}, image_backbone="timm_tokens")
    with pytest.raises(UserError, match=r"student.image_backbone is 'timm_gird': did you mean 'timm_grid'"):
        load_preset("tiny", {"student": {"image_backbone": "timm_gird"}})
    as_map = student(image_backbone="timm_grid", image_overrides=PATCH, layers=1)  # a ViT is one, too
    assert (as_map.grid, len(as_map.image.blocks)) == ((4, 4), 1)
    ends = student(text_backbone="causal")  # BERT, pooled at its end token
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    cls, tokens = ends.encode_text(torch.arange(5, 15).view(2, 5), mask)
    assert torch.equal(cls, torch.stack([tokens[0, 4], tokens[1, 2]]))


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
    "dpeth": (3, "cannot build it: .*unexpected keyword argument"),
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
    assert built.text.model.embeddings.LayerNorm.eps == 0.5
    one = {**CONFIG.student.text_overrides, "num_hidden_layers": 1}
    assert len(student(text_overrides=one).text.blocks) == 1
    with pytest.raises(UserError, match=r"student.layers is 2: student.text_model 'bert' has only 1"):
        student(text_overrides=one, layers=2)


BERT = CONFIG.student.text_overrides
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16}
TEXTS = {
    **dict.fromkeys(
        ("bert-base-uncased", "roberta", "xlm-roberta-base", "electra", "deberta-v2", "mpnet", "ernie"), BERT
    ),
    **dict.fromkeys(("roformer", "data2vec-text", "albert", "modernbert", "esm"), BERT),
    **dict.fromkeys(("openai/clip-vit-base-patch32", "siglip"), BERT),
    "qwen2": {**BERT, "num_key_value_heads": 2},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    **dict.fromkeys(("google-t5/t5-small", "mt5"), T5),
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}


@pytest.mark.parametrize("model", TEXTS)
def test_text_encoders_whose_tokens_do_not_see_padding(model):
    built = student(text_model=model, text_overrides=TEXTS[model])
    ids = torch.arange(5, 15).view(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    cls, tokens = built.encode_text(ids, mask)
    assert (cls.shape, tokens.shape) == ((2, 32), (2, 5, 32))
    # At the end token, by the mean, or at the class token.
    if model in ("openai/clip-vit-base-patch32", "siglip", "qwen2", "gpt2"):
        pooled = torch.stack([tokens[0, 4], tokens[1, 2]])
    elif "t5" in model:
        pooled = torch.stack([tokens[0].mean(0), tokens[1, :3].mean(0)])
    else:
        pooled = tokens[:, 0]
    assert torch.allclose(cls, pooled, atol=1e-6)
    tokens.square().sum().backward()
    assert next(p for p in built.text.blocks[0].parameters() if p.ndim > 1).grad.abs().sum() > 0


@pytest.mark.parametrize("model", ["canine", "fnet", "xmod", "bart", "vit", "unheard"])
def test_other_text_models_are_one_line(model):
    with pytest.raises(UserError, match=r"^student\.text_"):
        student(text_model=model)


def test_the_tokenizer_must_belong_to_the_encoder(tmp_path, capsys):
    student(text_model="roberta").text.model.save_pretrained(tmp_path)  # its padding is the built-in tokenizer's, 0
    build = lambda special: Student(  # noqa: E731
        dataclasses.replace(CONFIG.student, text_weights=str(tmp_path), text_overrides={}), S, VOCAB, special=special
    )
    build(SpecialTokens(pad_id=0))
    with pytest.raises(UserError, match=r"data.tokenizer fills up texts with the id 3, .* counts .* by the id 0"):
        build(SpecialTokens(pad_id=3))
    with pytest.raises(UserError, match=r"data.tokenizer begins a text with no class token"):
        build(SpecialTokens(class_first=False))


def test_dropout_that_an_encoder_does_not_have_is_told(capsys):
    student(text_model="clip", dropout=0.1)
    assert "'clip' has no dropout behind its layers: student.dropout has no effect on it" in capsys.readouterr().out


def test_a_causal_model_is_no_encoder():
    with pytest.raises(UserError, match=r"does not see its last token: give student.text_backbone=causal"):
        student(text_model="gpt2", text_overrides=TEXTS["gpt2"], text_backbone="encoder")


@pytest.mark.parametrize(("model", "most"), [("bert", 34), ("roberta", 33)])
def test_more_positions_than_the_encoder_has_are_one_line(model, most):
    settings = {"text_model": model, "text_overrides": {**CONFIG.student.text_overrides, "max_position_embeddings": 34}}
    student(positions=most, **settings)
    with pytest.raises(
        UserError, match=f"data.context_length is {most + 1}: student.text_model '{model}' has only {most}"
    ):
        student(positions=most + 1, **settings)
