"""Real trainings that start from a CLIP or SigLIP, or from a run: evaluated first, resumed, at ZeRO-3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.make import pairs
from tests.models.dual_models import clip, siglip
from tests.ranks import ROOT, clean_environment

pytestmark = pytest.mark.slow
LOSSES = {"clip": "global,cmli,target_cmli", "siglip": "global_sigmoid,cmli"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("given")
    plain = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | {"fp16": {"enabled": False}}
    for stage in (2, 3):
        content = plain | {"zero_optimization": {"stage": stage}}
        (root / f"zero{stage}.json").write_text(json.dumps(content))
    clip(root / "clip"), siglip(root / "siglip")
    return root, pairs(root / "pairs", count=40)


def train(given, start: Path, losses: str, run: Path, *options: str, stage: int = 2) -> str:
    return command(
        given, run, "--preset", "tiny", "--start-from", str(start), "--losses", losses, *options, stage=stage
    )


def command(given, run: Path, *options: str, stage: int = 2) -> str:
    root, data = given
    how = ["--data", data, "--output-dir", str(run), "--set", "run.match_maps=0"]
    how += ["--deepspeed_config", str(root / f"zero{stage}.json"), *options]
    return python(str(ROOT / "ds_cmli" / "train.py"), *how)


def python(*arguments: str) -> str:
    env = clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_it_is_evaluated_first_and_resumes(kind, given, tmp_path):
    start, losses = given[0] / kind, LOSSES[kind]
    train(given, start, losses, tmp_path / "run", "--steps", "4", "--save-every", "2")
    assert [x["step"] for x in lines(tmp_path / "run") if "eval/val/pairs" in x] == [0, 4]
    first = next((tmp_path / "run" / "checkpoint").glob("step*2"))
    train(given, start, losses, tmp_path / "again", "--steps", "4", "--save-every", "2", "--resume", str(first))
    whole, again = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "again"))
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    train(given, start, losses, tmp_path / "three", "--steps", "4", stage=3)
    for name, value in load_file(tmp_path / "three" / "model.safetensors").items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


def test_a_run_starts_another(given, tmp_path):
    train(given, given[0] / "clip", "global,cmli", tmp_path / "run", "--steps", "2")
    train(given, tmp_path / "run", "global,cmli_sigmoid", tmp_path / "next", "--steps", "2")
    last, first = lines(tmp_path / "run")[-1], lines(tmp_path / "next")[0]
    assert (last["step"], first["step"]) == (2, 0)
    same = "eval/val/global/mean_recall"
    assert first[same] == last[same]


def test_the_lines_of_the_page(given, tmp_path):
    """`docs/finetune.md`: before, fine-tuned, exported."""
    start, run = str(given[0] / "clip"), tmp_path / "run"
    before = python("-m", "ds_cmli.evaluate", start, "--data", given[1])
    assert "global" in before and "combined" not in before  # its patches and words are not trained
    small = ("--steps", "4", "--micro-batch", "4", "--workers", "0")
    command(given, run, "--preset", "finetune", "--start-from", start, *small)
    assert [x["step"] for x in lines(run) if "eval/val/pairs" in x] == [0, 4]
    python("-m", "ds_cmli.export", str(run), str(tmp_path / "x"), "--as", "clip", "--interpolate", "0.5")
    begun, half = (load_file(folder / "model.safetensors") for folder in (given[0] / "clip", tmp_path / "x"))
    assert begun.keys() == half.keys() and (half["logit_scale"] != begun["logit_scale"]).all()
