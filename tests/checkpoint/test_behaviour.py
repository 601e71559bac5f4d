"""Runs by the command, broken and resumed, against unbroken ones: the same losses, weights, samples."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_cmli.engine import build_models
from tests import make
from tests.checkpoint.runs import assert_same

STEPS = {"--steps": 4, "--log-every": 4, "--save-every": 2, "--keep": 3}
SETTINGS = {"student.dropout": 0.3, "optim.ema_decay": 0.5, "student.freeze_image": 1, "student.layers": 2}
LAYOUTS = [(2, 2, 1), *(pytest.param(*row, marks=pytest.mark.slow) for row in ((2, 2, 3), (3, 3, 2)))]


def arguments(folder: Path, run: Path, options: dict, settings: dict | None = None) -> list[str]:
    """Return the words of a training with dropout and averages. Its epoch ends between the second step and the last."""
    source = folder / "pairs"
    if not source.exists():
        make.pairs(source, 31)
    ds_config = make.json_file(folder / "ds.json", {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0})
    fixed = {"--data": source, "--deepspeed_config": ds_config, "--output-dir": run, **STEPS}
    return make.small(fixed | options, SETTINGS | (settings or {}))


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_goes_on_to_the_bit(world, tmp_path):
    """From step 2 of 4; one line of the metrics is the mean over all four."""
    runs = (tmp_path / "straight", tmp_path / "resumed")
    options = {"--micro-batch": 8 // world}
    for run in runs:
        assert make.train(*arguments(tmp_path, run, options), world=world) == 0
        options["--resume"] = run / "checkpoint" / "step2"
    assert_same(*runs)


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_weights_and_those_below_adapters_are_kept_once_and_not_rounded(stage, tmp_path, monkeypatch):
    """bf16 rounds what the engine computes with, at each stage, and after a second start too, though that start's own
    initial weights are others, as those of a newer package may be."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # otherwise ZeRO-3 leaves small ones whole
    ds_config = {"zero_optimization": zero, "bf16": {"enabled": True}}
    options = {"--deepspeed_config": make.json_file(tmp_path / "bf16.json", ds_config), "--save-every": 1, "--steps": 2}
    run = tmp_path / "run"
    argv = arguments(tmp_path, run, options, {"student.lora": '{"text": ["query"]}'})
    assert make.train(*argv) == 0
    shutil.rmtree(run / "checkpoint" / "step2")

    def build_with_zeros(*arguments, **options):
        objective, teacher = build_models(*arguments, **options)
        for parameter in objective.parameters():
            if not parameter.requires_grad:
                parameter.data.zero_()
        return objective, teacher

    with monkeypatch.context() as patch:
        patch.setattr(import_module("ds_cmli.engine.build"), "build_models", build_with_zeros)
        assert make.train(*argv) == 0
    (shared,) = (run / "checkpoint").glob("frozen-*")
    assert not [name for name in load_file(shared) if "lora_" in name]
    trained = load_file(run / "model.safetensors")
    sections = {"student": {"freeze_image": 1, "layers": 2, "lora": {"text": ["query"]}}}
    objective, _ = make.models(**sections, data={"source": str(tmp_path / "pairs")})
    frozen = {name: p for name, p in objective.named_parameters() if not p.requires_grad and ".base_layer" not in name}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in frozen.values())
    for name, p in frozen.items():
        assert torch.equal(trained[name], p), name


def test_statistics_of_batchnorm_are_part_of_the_model(tmp_path):
    resnet = make.FEATURE_MAPS["resnet18"]
    settings = {"student.image_model": "resnet18", "student.image_overrides": resnet, "student.freeze_image": 0}
    settings |= {"student.layers": None, "data.image_size": 64, "loss.weights": {"global": 1.0, "cmli": 1.0}}
    assert make.train(*arguments(tmp_path, tmp_path / "run", {"--steps": 2}, settings)) == 0
    variances = {name: value for name, value in make.weights(tmp_path / "run").items() if "running_var" in name}
    assert variances and all(value.shape and (value > 0).all() for value in variances.values())


@pytest.mark.parametrize("stage, before, after", LAYOUTS)
def test_another_number_of_ranks_goes_on_with_the_batches_and_states(stage, before, after, tmp_path):
    """Frozen layers, a rate for each layer and averages: losses and weights are equal to rounding."""
    make.pairs(tmp_path / "pairs", 43)
    ds_config = make.json_file(tmp_path / "stage.json", {"zero_optimization": {"stage": stage}})
    settings = {"student.dropout": 0.0, "optim.layer_decay": 0.7}

    def train(world: int, name: str, **more_options: object) -> None:
        options = {"--deepspeed_config": ds_config, "--micro-batch": 12 // world, "--log-every": 1, **more_options}
        assert make.train(*arguments(tmp_path, tmp_path / name, options, settings), world=world) == 0

    train(before, "straight")
    train(after, "changed", **{"--resume": tmp_path / "straight" / "checkpoint" / "step2"})
    straight, changed = ([line["loss"] for line in make.lines(tmp_path / name)] for name in ("straight", "changed"))
    assert changed[-2:] == pytest.approx(straight[-2:], rel=1e-4)
    resolved = json.loads((tmp_path / "changed" / "run.json").read_text())["deepspeed"]
    assert resolved["train_batch_size"] == 12 and resolved["train_micro_batch_size_per_gpu"] == 12 // after
    for name in ("model.safetensors", "model.ema.safetensors"):
        expected, weights = (load_file(tmp_path / run / name) for run in ("straight", "changed"))
        limit = 1e-4 if stage == 2 else 1e-3
        assert max((expected[key] - weights[key]).abs().max() for key in expected) < limit
    assert not list((tmp_path / "changed" / "checkpoint").glob("*.writing"))
