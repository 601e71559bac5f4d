"""Which encoders and sizes can be had: each works, or is refused in one line when it is built."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.config.presets import load_preset
from ds_cmli.engine.blocks import checkpoint_blocks
from ds_cmli.errors import UserError
from ds_cmli.models.encoders import PixelNorm, changed_fields, text_config
from ds_cmli.models.student import Student, Teacher
from tests.make import BERT, FEATURE_MAPS, GPT2, T5, VIT

CONFIG = load_preset("tiny", {})
S = CONFIG.data.image_size
VOCAB = 99
PATCH = {**VIT, "patch_size": 14}


def student(positions=8, size=S, **settings):
    return Student(dataclasses.replace(CONFIG.student, **settings), size, VOCAB, positions)


def teacher(size=S, **settings):
    return Teacher(dataclasses.replace(CONFIG.teacher, **settings), size, (4, 4))


PLAIN = (
    "vit_tiny_patch16_224",
    "vit_betwixt_patch16_reg4_gap_256",  # no class token: the mean is one; and registers
    *("eva02_tiny_patch14_224", "cait_xxs24_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"),
)


@pytest.mark.parametrize("model", [*PLAIN, *FEATURE_MAPS])
def test_image_encoders_give_class_token_and_patches(model):
    overrides, size, side = (FEATURE_MAPS[model], 96, 3) if model in FEATURE_MAPS else (PATCH, S, 4)
    built = student(image_model=model, image_overrides=overrides, size=size)
    cls, patches = built.encode_image(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    assert (cls.shape, patches.shape) == ((2, built.width), (2, side * side, built.width))
    assert built.grid == (side, side) and (model in FEATURE_MAPS or len(built.image.blocks) == 2)
    (cls.sum() + patches.square().sum()).backward()
    first = next(p for p in built.image.model.parameters() if p.ndim == 4)
    assert first.grad.abs().sum() > 0
    targets = teacher(model=model, overrides=overrides, size=size, block=-1)(torch.zeros(2, 3, size, size))
    assert targets.cls.shape == (2, built.width) and targets.patches.shape == (2, 16, built.width)
    if model in FEATURE_MAPS:  # a stage before the last has more patches: a feature map of 6 x 6 here
        assert teacher(model=model, overrides=overrides, size=96, block=-2).image.grid == (6, 6)


@pytest.mark.parametrize("model", [PLAIN[0], "swin_tiny_patch4_window7_224", "convnext_atto"])
@torch.no_grad()
def test_patches_lie_row_by_row_without_the_class_token(model):
    """A bright patch changes its own feature most."""
    torch.manual_seed(0)
    overrides = FEATURE_MAPS.get(model, {**VIT, "patch_size": 32})
    trained = student(image_model=model, image_overrides=overrides, size=128).eval()
    frozen = teacher(model=model, overrides=overrides, size=128, block=-1)
    grey = torch.full((1, 3, 128, 128), 100, dtype=torch.uint8)
    for row, column in ((0, 3), (3, 0), (1, 2)):
        picture = grey.clone()
        picture[:, :, row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32] = 255
        before, after = ((trained.encode_image(x)[1], frozen(x).patches) for x in (grey, picture))
        for patches, changed_patches in zip(before, after, strict=True):
            assert (changed_patches - patches).norm(dim=2).argmax() == row * 4 + column


def test_batch_norm_keeps_its_statistics():
    built = student(image_model="resnet18", image_overrides=FEATURE_MAPS["resnet18"], size=64)
    buffers = {name: buffer.clone() for name, buffer in built.named_buffers() if "running" in name}
    for model in (built, built.eval().train()):
        model.encode_image(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8))
    assert buffers
    assert_close({name: built.get_buffer(name) for name in buffers}, buffers, rtol=0, atol=0)


def test_a_student_has_as_many_layers_as_asked_for():
    built = student(layers=1)
    assert len(built.image.blocks) == len(built.text.blocks) == 1


@torch.no_grad()
def test_a_teacher_ends_with_the_chosen_block():
    cut = teacher(block=0)
    image = torch.randint(256, (3, 3, S, S), dtype=torch.uint8)
    model = cut.image.model
    assert len(model.blocks) == 1  # later ones are not held
    x = model.blocks[0](model._pos_embed(model.patch_embed(cut.normalize_pixels(image, torch.float32))))
    assert_close(cut(image).patches, torch.nn.functional.layer_norm(x[:, 1:], (32,)))


def test_pixels_are_normalised_alike_in_16_bit():
    image = torch.randint(256, (3, 3, S, S), dtype=torch.uint8)
    norm = PixelNorm([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    exact = norm(image, torch.float32)
    assert torch.equal(norm.half()(image, torch.float32), exact)


TEXTS = {
    **dict.fromkeys(("bert-base-uncased", "xlm-roberta-base", "deberta-v2", "mpnet", "albert", "modernbert"), BERT),
    **dict.fromkeys(("openai/clip-vit-base-patch32", "siglip"), BERT),
    "qwen2": {**BERT, "num_key_value_heads": 2},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    **dict.fromkeys(("google-t5/t5-small", "mt5"), T5),
    "gpt2": GPT2,
}


@pytest.mark.parametrize("model", TEXTS)
def test_text_encoders_whose_tokens_do_not_see_padding_and_their_changed_fields(model):
    """By these a prediction and an export build an encoder whose own configuration is not there."""
    built = student(text_model=model, text_overrides=TEXTS[model], dropout=0.1).eval()
    config = built.text.model.config
    rebuilt = text_config(config.model_type, None, 0.1, vocab_size=VOCAB, **changed_fields(config))
    set_by_models = {"dtype", "is_encoder_decoder"}
    fields = [{k: x for k, x in c.to_diff_dict().items() if k not in set_by_models} for c in (rebuilt, config)]
    assert type(rebuilt) is type(config) and fields[0] == fields[1]
    ids = torch.arange(5, 15).view(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    cls, tokens = built.encode_text(ids, mask)
    assert (cls.shape, tokens.shape) == ((2, 32), (2, 5, 32))
    _, refilled = built.encode_text(ids.masked_fill(~mask, 7), mask)
    assert torch.allclose(refilled[mask], tokens[mask], atol=1e-5)
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


IMAGE = "student.image_model"
TEXT = "student.text_model"
TYPO = "vit_tinny_patch16_224"
SHALLOW = {**BERT, "num_hidden_layers": 1}
RESNET = {"image_model": "resnet18", "image_overrides": FEATURE_MAPS["resnet18"], "size": 96}


@pytest.mark.parametrize(
    ("setting", "settings", "why"),
    [
        ("teacher.model", {"model": TYPO}, "Unknown model"),
        (IMAGE, {"image_model": TYPO}, "Unknown model"),
        (IMAGE, {"size": 57}, "data.image_size is 57: no multiple of the 14 pixels of a patch"),
        (IMAGE, {"image_overrides": {**PATCH, "dpeth": 3}}, "unexpected keyword argument 'dpeth'"),
        (IMAGE, {**RESNET, "layers": 1}, "no plain stack, and student.layers is 1: give null"),
        (TEXT, {"text_model": "unheard"}, "give an architecture of the transformers library"),
        (TEXT, {"text_model": "bart", "text_overrides": {}}, "no text encoder of 'bart' alone"),
        (TEXT, {"text_model": "vit", "text_overrides": {}}, "text_overrides has 'pad_token_id'"),
        (TEXT, {"text_overrides": {**BERT, "vocab_size": 50}}, "it has 50 tokens and data.tokenizer 99"),
        (TEXT, {"text_overrides": SHALLOW, "layers": 2}, "it has 1 layers, and student.layers is 2"),
        (TEXT, {"text_model": "roberta", "positions": 512}, "data.context_length is 512, and it has only 511"),
    ],
)
def test_encoders_that_cannot_be_are_one_line(setting, settings, why):
    build = teacher if setting == "teacher.model" else student
    with pytest.raises(UserError, match=f"^{setting} is '[^\n]*{why}[^\n]*$"):
        build(**settings)


RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
CHECKPOINTED = [
    {"image_model": "beit_base_patch16_224", "image_overrides": VIT},  # relative positions
    {"image_model": "vit_small_patch16_dinov3", "image_overrides": VIT},  # rotary positions
    {"image_model": "swin_tiny_patch4_window7_224", "image_overrides": FEATURE_MAPS["swin_tiny_patch4_window7_224"]},
    {"image_model": "resnet18", "image_overrides": FEATURE_MAPS["resnet18"]},
    {"text_model": "albert", "text_overrides": {**BERT, "embedding_size": 16}},  # its layers share their weights
    {"text_model": "deberta-v2", "text_overrides": {**BERT, **RELATIVE, "position_biased_input": False}},
    {"text_model": "t5", "text_overrides": T5},
    {"text_model": "gpt2", "text_overrides": GPT2},  # keeps keys and values unless told otherwise
]


@pytest.mark.parametrize("settings", CHECKPOINTED, ids=lambda settings: next(iter(settings.values())))
def test_with_activation_checkpointing_gradients_are_the_same_and_come_once(settings):
    torch.manual_seed(0)
    size = 64 if "image_model" in settings else S
    built = student(size=size, **settings)
    image = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(3, VOCAB, (2, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4]])

    def gradients():
        built.zero_grad()
        torch.manual_seed(1)  # of what drops out
        sum(x.square().mean() for x in built(image, ids, mask)).backward()
        return {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}

    expected = gradients()
    assert len(built.blocks) >= 4 - ("albert" in settings.values())
    checkpoint_blocks(built.blocks)
    arrived: Counter[str] = Counter()
    for name, parameter in built.named_parameters():
        parameter.register_hook(lambda gradient, name=name: arrived.update([name]))
    assert_close(gradients(), expected)
    assert set(arrived.values()) == {1}
