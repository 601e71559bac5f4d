"""Trainings that start from a source: interrupted as if never, memory predicted, at ZeRO-3 as at ZeRO-2."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ds_cmli.config.schema import load_config
from ds_cmli.evaluate.__main__ import command as evaluate
from ds_cmli.export import command as export
from tests.checkpoint.runs import json_file, straight_and_stopped
from tests.drive_train import drive
from tests.make import lines, pairs, weights, write_run
from tests.models.dual_models import clip, siglip
from tests.stranger.drive import check_memory, used
from tests.test_export import run_of
from tests.test_features_together import JSON

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]
# Of open_clip: a ViT, a CoCa, a ConvNeXt, a SigLIP. "locked" is the whole image tower.
RUNS = """
export    zero3 alone bf16 one    again ema -
run       zero2 alone bf16 one    again ema locked
clip      zero3 two   fp32 one    again -   locked
siglip    zero1 two   bf16 cached -     ema lora
vit       zero3 alone fp32 one    again -   locked
coca      zero2 alone bf16 one    again ema locked
convnext  zero3 alone bf16 one    -     ema -
oc-siglip zero1 two   bf16 cached again -   lora
""".strip().splitlines()
# open_clip's smallest models have sides that are no multiples of the teacher's patches.
OTHER_PATCHES = {"teacher.overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}}
LORA = {
    "siglip": {"image": ["q_proj", "v_proj"], "text": ["q_proj"]},
    "oc-siglip": {"image": ["qkv"], "text": ["c_fc"]},
}
SETTINGS: dict[str, dict[str, object]] = {
    "ema": {"optim.ema_decay": 0.9, "optim.layer_decay": 0.7},
    "locked": {"student.freeze_image": 2},
    "convnext": OTHER_PATCHES,
    "oc-siglip": OTHER_PATCHES,
}
OF_OPEN_CLIP = {"vit": "vit", "coca": "coca", "convnext": "convnext", "oc-siglip": "siglip"}
BATCH, STEPS, STOP = 8, 3, 1


def source_of(name: str, folder: Path) -> Path:
    if name in OF_OPEN_CLIP:
        pytest.importorskip("open_clip", reason="pip install 'ds-cmli[test]'")
        from tests.models.open_clip_models import saved

        return saved(folder / name, OF_OPEN_CLIP[name])
    if name == "siglip":
        return siglip(folder / name)
    if name == "export":
        (folder / "plain").mkdir()
        write_run(folder / "plain")
        export.main([str(folder / "plain"), str(folder / name)], standalone_mode=False)
        return folder / name
    begun = clip(folder / "clip")
    return run_of(begun, folder / "run", {"global": 1.0, "cmli": 1.0}) if name == "run" else begun


@pytest.mark.parametrize("run", RUNS)
def test_a_training_from_a_source(run, tmp_path):
    values = run.split()
    content: dict = {}
    settings: dict[str, object] = {"run.match_maps": 0, "teacher.block": 0}
    for value in values:
        content |= JSON.get(value, {})
        settings |= SETTINGS.get(value, {})
    if "lora" in values:
        settings |= {"student.lora": LORA[values[0]], "student.lora_rank": 4}
    loss = "global_sigmoid" if "siglip" in values[0] else "global"
    micro_batch = BATCH // (1 + ("two" in values)) // content.get("gradient_accumulation_steps", 1)
    given = ["--preset", "tiny", "--steps", str(STEPS), "--micro-batch", str(micro_batch)]
    given += ["--data", pairs(tmp_path / "pairs", count=40), "--start-from", str(source_of(values[0], tmp_path))]
    given += ["--losses", f"{loss},cmli,target_cmli", *json_file(tmp_path / "ds.json", content)]
    for name, value in settings.items():
        given += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    straight = straight_and_stopped(given, tmp_path, STOP, "two" in values)
    assert "refused" not in used(straight)
    check_memory(load_config(straight / "run.json", "the run"), content, 1 + ("two" in values))


def train(folder: Path, source: Path, losses: str, output: Path, *more: str, stage: int = 2) -> list[dict]:
    """Its lines of metrics with evaluations."""
    data = folder / "pairs"
    given = ["--data", str(data) if data.exists() else pairs(data, count=40), "--start-from", str(source)]
    given += ["--preset", "tiny", "--losses", losses, "--set", "run.match_maps=0"]
    given += json_file(folder / f"zero{stage}.json", JSON[f"zero{stage}"])
    assert drive([*given, "--output-dir", str(output), *more]) == 0
    return lines(output, "eval/val/pairs")


@pytest.mark.parametrize("make, losses", [(clip, "global,cmli,target_cmli"), (siglip, "global_sigmoid,cmli")])
def test_it_is_evaluated_first_and_the_same_at_zero_3_and_goes_on_in_another_run(make, losses, tmp_path):
    source, two, three = make(tmp_path / "source"), tmp_path / "two", tmp_path / "three"
    first = train(tmp_path, source, losses, two, "--steps", "4")
    assert [line["step"] for line in first] == [0, 4]
    train(tmp_path, source, losses, three, "--steps", "4", stage=3)
    for name, value in weights(three).items():
        torch.testing.assert_close(value, weights(two)[name], rtol=1e-4, atol=1e-5)
    second = train(tmp_path, two, "global,cmli_sigmoid" if make is clip else losses, tmp_path / "next", "--steps", "1")
    same = "eval/val/global/mean_recall"
    assert second[0]["step"] == 0 and second[0][same] == first[-1][same]


def test_the_lines_of_the_page(tmp_path):
    """`docs/finetune.md`: before, fine-tuned, exported."""
    source, run, data = clip(tmp_path / "clip"), tmp_path / "run", pairs(tmp_path / "pairs", count=40)
    before = CliRunner().invoke(evaluate, [str(source), "--data", data])
    assert "global" in before.output and "combined" not in before.output  # its patches and words are not trained
    small = ["--steps", "4", "--micro-batch", "4", "--workers", "0", "--set", "run.match_maps=0"]
    given = ["--preset", "finetune", "--start-from", str(source), "--data", data, "--output-dir", str(run)]
    assert drive([*given, *small, *json_file(tmp_path / "ds.json", JSON["zero2"])]) == 0
    assert [line["step"] for line in lines(run, "eval/val/pairs")] == [0, 4]
    half = tmp_path / "half"
    export.main([str(run), str(half), "--as", "clip", "--interpolate", "0.5"], standalone_mode=False)
    begun, between = weights(source), weights(half)
    assert begun.keys() == between.keys() and (between["logit_scale"] != begun["logit_scale"]).all()
