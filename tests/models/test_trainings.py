"""Trainings that start from a source: interrupted as if never, memory predicted, at ZeRO-3 as at ZeRO-2."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ds_cmli.config.schema import load_config
from ds_cmli.evaluate.__main__ import command as evaluate
from tests import make
from tests.checkpoint.runs import straight_and_stopped
from tests.models.sources import clip, losses, of_open_clip, run_of, siglip
from tests.stranger.drive import check_memory, used
from tests.test_features_together import JSON

pytestmark = pytest.mark.slow
# A run that began as a CLIP; a CLIP and a SigLIP; of open_clip a CoCa and a SigLIP. "locked" is the whole image tower.
RUNS = """
run       zero2 alone bf16 one    again ema locked
clip      zero3 two   fp32 one    again -   locked
siglip    zero1 two   bf16 cached -     ema lora
coca      zero3 alone bf16 one    again -   locked
oc-siglip zero1 alone bf16 cached again -   lora
""".strip().splitlines()
LORA = {
    "siglip": {"image": ["q_proj", "v_proj"], "text": ["q_proj"]},
    "oc-siglip": {"image": ["qkv"], "text": ["c_fc"]},
}
SETTINGS: dict[str, dict[str, object]] = {
    "ema": {"optim.ema_decay": 0.9, "optim.layer_decay": 0.7},
    "locked": {"student.freeze_image": 2},
    # The side of its pictures is no multiple of the teacher's patches.
    "oc-siglip": {"teacher.overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}},
}
BATCH, STEPS, STOP = 8, 3, 1


def source_of(name: str, folder: Path) -> Path:
    if name in ("coca", "oc-siglip"):
        return of_open_clip(folder / name, name.removeprefix("oc-"))
    if name == "siglip":
        return siglip(folder / name)
    begun = clip(folder / "clip")
    return run_of(begun, folder / "run") if name == "run" else begun


@pytest.mark.parametrize("run", RUNS)
def test_a_training_from_a_source(run, tmp_path):
    values = run.split()
    source, content = source_of(values[0], tmp_path), {}
    settings: dict[str, object] = {"run.match_maps": 0, "teacher.block": 0}
    for value in values:
        content |= JSON.get(value, {})
        settings |= SETTINGS.get(value, {})
    if "lora" in values:
        settings |= {"student.lora": LORA[values[0]], "student.lora_rank": 4}
    micro_batch = BATCH // (1 + ("two" in values)) // content.get("gradient_accumulation_steps", 1)
    given = ["--preset", "tiny", "--steps", str(STEPS), "--micro-batch", str(micro_batch)]
    given += ["--data", make.pairs(tmp_path / "pairs", count=40), "--start-from", str(source)]
    given += ["--losses", ",".join([*losses(source), "target_cmli"])]
    given += ["--deepspeed_config", make.json_file(tmp_path / "ds.json", content)]
    for name, value in settings.items():
        given += ["--set", f"{name}={json.dumps(value)}"]
    straight = straight_and_stopped(given, tmp_path, STOP, "two" in values)
    assert "refused" not in used(straight)
    if values[0] in ("clip", "oc-siglip"):
        check_memory(load_config(straight / "run.json", "the run"), content, 1 + ("two" in values))


@pytest.mark.parametrize("kind", [clip, siglip])
def test_it_is_evaluated_first_and_the_same_at_zero_3_and_goes_on_in_another_run(kind, source, tmp_path):
    """By the preset `finetune`, as docs/finetune.md has it."""
    begun, two, three = kind(tmp_path / "source"), tmp_path / "two", tmp_path / "three"

    def train(start: Path, output: Path, stage: int, steps: int) -> list[dict]:
        """Its lines of metrics with evaluations."""
        ds_config = make.json_file(tmp_path / "ds.json", JSON[f"zero{stage}"])
        given = ["--start-from", str(start), *source, "--losses", ",".join(losses(begun)), "--steps", str(steps)]
        given += ["--lr", "1e-3", "--micro-batch", "8", "--workers", "0", "--set", "run.match_maps=0"]
        assert make.train(*given, "--deepspeed_config", ds_config, "--output-dir", str(output)) == 0
        return make.lines(output, "eval/val/pairs")

    before = CliRunner().invoke(evaluate, [str(begun), *source])
    assert "global" in before.output and "combined" not in before.output  # its patches and words are not trained
    first = train(begun, two, 2, 4)
    assert [line["step"] for line in first] == [0, 4]
    train(begun, three, 3, 4)
    for name, value in make.weights(three).items():
        torch.testing.assert_close(value, make.weights(two)[name], rtol=1e-4, atol=1e-5)
    second = train(two, tmp_path / "next", 2, 1)
    same = "eval/val/global/mean_recall"
    assert second[0]["step"] == 0 and second[0][same] == first[-1][same]
