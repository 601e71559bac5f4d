"""What a start leaves out or begins with at random is a line each; a start that loses nothing has none."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, SiglipTextConfig, SiglipTextModel

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.data.tokens import SpecialTokens
from ds_cmli.engine import build_models
from tests.checkpoint.runs import TINY
from tests.drive_train import drive
from tests.metrics_file import metrics

VIT = PRESETS["tiny"]["student"]["image_overrides"]
BERT = PRESETS["tiny"]["student"]["text_overrides"]
VOCAB = 99
CLIP = {**VIT, "patch_size": 14}


@pytest.fixture
def lines(tmp_path, capsys):
    """A function that gives the lines of a start with these settings of the student and of the teacher."""

    def lines(student=None, teacher=None, **more):
        config = load_preset("tiny", {"student": student or {}, "teacher": teacher or {}, **more})
        special = SpecialTokens(pad_id=1) if "siglip" in config.student.text_model else SpecialTokens()
        capsys.readouterr()
        build_models(config, VOCAB, special=special)
        printed = capsys.readouterr().out.splitlines()
        return [line for line in printed if "keys there not used: norm.bias, norm.weight" not in line]

    return lines


@pytest.fixture
def weights(tmp_path):
    """Local weights of the encoders of `tiny`, of a CLIP and of a SigLIP in the same sizes."""
    torch.manual_seed(0)

    def vit(name):
        model = timm.create_model(name, num_classes=0, img_size=56, **VIT)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors", {"format": "pt"})
        return str(tmp_path / f"{name}.safetensors")

    def text(config, kind, **options):
        folder = tmp_path / config.model_type
        kind(config, **options).save_pretrained(folder)
        return str(folder)

    siglip = SiglipTextConfig(vocab_size=VOCAB, max_position_embeddings=32, pad_token_id=1, **BERT)
    return {
        "vit": vit("vit_tiny_patch16_224"),
        "clip": vit("vit_base_patch16_clip_224"),
        "quick": vit("vit_base_patch16_clip_quickgelu_224"),
        "beit": vit("beit_base_patch16_224"),
        "bert": text(BertConfig(vocab_size=VOCAB, **BERT), BertModel, add_pooling_layer=False),
        "siglip": text(siglip, SiglipTextModel),
    }


def own(weights):
    """Settings of a start that loses nothing."""
    student = {"image_weights": weights["vit"], "text_weights": weights["bert"]}
    return {"student": student, "teacher": {"weights": weights["vit"]}}


def test_a_start_that_loses_nothing_has_no_line(lines, weights):
    assert lines(**own(weights)) == []


def image(weights, kind, name):
    return {"image_model": name, "image_weights": weights[kind], "text_weights": weights["bert"]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers": 1}, r"student.image_model '\S+': the first 1 of its 2 blocks are used, without what follows them"),
        ({"layers": 1}, r"student.text_model 'bert': the first 1 of its 2 blocks are used, without what follows them"),
        ({"text_overrides": {**BERT, "hidden_size": 48}, "text_weights": "random"},
         r"student.text_model is 48 wide and the student 32: the linear layer between them starts at random"),
        (lambda w: {"text_weights": f"{w['bert']}/model.safetensors"},
         r"student.text_weights \S+: a file without config.json: heads, activation and the like are those of 'bert'"),
        (lambda w: image(w, "clip", "vit_base_patch16_clip_224"),
         r"student.image_weights \S+: the projection and logit scale of .* are not used: images and texts start una"),
        (lambda w: image(w, "clip", "vit_base_patch16_clip_224"),
         r"'vit_base_patch16_clip_224' computes GELU: weights that were trained with QuickGELU need 'vit_base_patch16"),
        (lambda w: image(w, "quick", "vit_base_patch16_clip_quickgelu_224.openai"),
         r"computes QuickGELU: weights that were trained with GELU need 'vit_base_patch16_clip_224'"),
        (lambda w: {"text_model": "siglip", "text_weights": w["siglip"], "text_overrides": {}},
         r"student.text_weights \S+siglip\S+: the projection and logit scale of its contrastive training are not used"),
        (lambda w: {"text_model": "siglip", "text_weights": w["siglip"], "text_overrides": {}},
         r"'siglip': a text is pooled at its last token, where the model's own place is the last position of a filled"),
        (lambda w: image(w, "beit", "beit_base_patch16_224"),
         r"student.image_model 'beit_base_patch16_224': the class token replaces its own pooling 'avg'"),
        ({"freeze_image": 1, "image_weights": "random"},
         r"warning: \d+ random matrices of the image encoder are frozen, by student.freeze_image or .*, and never"),
        ({"freeze_text": 2, "text_weights": "random"},
         r"warning: \d+ random matrices of the text encoder are frozen, by student.freeze_text or .*, and never"),
        ({"lora": {"text": ["query"]}, "text_weights": "random"},
         r"warning: \d+ random matrices of the text encoder are frozen, by student.freeze_text or .*, and never"),
        ({"lora": {"image": ["qkv"]}, "image_weights": "random"},
         r"warning: \d+ random matrices of the image encoder are frozen, by student.freeze_image or .*, and never"),
    ],
)  # fmt: skip
def test_what_is_lost_is_one_line(settings, expected, lines, weights):
    values = own(weights)
    values["student"] |= settings(weights) if callable(settings) else settings
    result = lines(**values)
    assert sum(bool(re.search(expected, line)) for line in result) == 1, result


@pytest.mark.parametrize("settings", [{"lora": {"text": ["query"]}}, {"freeze_text": 2}, {"freeze_image": 1}])
def test_what_is_frozen_of_weights_that_are_given_is_no_warning(settings, lines, weights):
    values = own(weights)
    values["student"] |= settings
    assert not [line for line in lines(**values) if "warning" in line]


def test_blocks_that_the_weights_lack_are_no_layers_to_freeze(lines, weights, tmp_path):
    from safetensors.torch import load_file

    some = {key: value for key, value in load_file(weights["vit"]).items() if "blocks.1" not in key}
    save_file(some, tmp_path / "some.safetensors", {"format": "pt"})
    values = own(weights)
    values["student"] |= {"image_weights": str(tmp_path / "some.safetensors"), "weights_partial": True}
    assert not [line for line in lines(**values) if "warning" in line]
    values["student"] |= {"freeze_image": 1}  # block 0, which is there
    assert not [line for line in lines(**values) if "warning" in line]
    values["student"] |= {"freeze_image": 2}
    assert [line for line in lines(**values) if "warning: 4 random matrices of the image encoder" in line]


def test_a_random_teacher_is_a_warning_where_a_loss_has_it(lines, weights):
    values = own(weights) | {"teacher": {"weights": "random"}}
    line = "teacher.weights is 'random': the student learns features of no meaning"
    assert lines(**values) == [line]
    assert lines(**values, loss={"weights": {"global": 1.0}}) == []
    wide = {"weights": "random", "overrides": {**VIT, "embed_dim": 48}}
    between = "teacher.model is 48 wide and the student 32: the linear layer between them starts at random"
    assert lines(**own(weights) | {"teacher": wide}) == [between, line]


def test_a_finished_run_is_not_gone_on_with_elsewhere_or_for_fewer_steps(source, tmp_path, alone, capfd):
    arguments = [*TINY, "--steps", "3", *source]
    run, new = ["--output-dir", str(tmp_path / "run")], ["--output-dir", str(tmp_path / "new")]
    assert drive([*arguments, *run]) == 0
    resumed = [*arguments, "--resume", str(tmp_path / "run")]
    changed = "--resume-with-changes"
    for more in (new, ["--steps", "2", changed], [*new, "--steps", "2", changed], ["--lr", "0.1", changed]):
        with pytest.raises(UserError, match=r"checkpoint/step3 is of a run that has ended, and .*, 3 of them done: "):
            drive([*resumed, *more])
    assert not (tmp_path / "new" / "checkpoint").exists()
    assert drive(resumed) == 0
    assert f"the run in {tmp_path / 'run'} is finished, 3 steps" in capfd.readouterr().out
    assert drive([*resumed, *new, "--steps", "4", changed]) == 0
    rate = next(line["lr"] for line in metrics(tmp_path / "new") if "loss" in line)
    assert f"with changes: step 4 of 4 has a learning rate of {rate:.2e}" in capfd.readouterr().out
