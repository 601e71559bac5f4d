"""An optimizer that this package has never seen: one entry, and it trains, resumes and is predicted as the others."""

import json

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_cmli.common.errors import UserError
from ds_cmli.config import optimizers
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.validation import number
from ds_cmli.memory.predict import Options, predict
from profiling.memory.measure_cpu import measure
from tests.config.test_mistakes import pairs
from tests.drive_train import drive
from tests.metrics_file import metrics

STEPS = 4
SCALARS = 256  # bytes: the few numbers that operators and the engine hold for a moment


class SignedMomentum(Optimizer):
    """Steps of the learning rate in the direction of the momentum's sign, after weight decay."""

    def __init__(self, params, lr: float = 1e-3, inertia: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "inertia": inertia, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.momentum(parameter)
                    momentum.lerp_(parameter.grad, 1 - group["inertia"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(momentum.sign(), alpha=-group["lr"])

    def momentum(self, parameter: Tensor) -> Tensor:
        return self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))


@pytest.fixture(autouse=True)
def registered(alone, monkeypatch):
    """As if PyTorch had it. DeepSpeed takes an optimizer of PyTorch by its name."""
    monkeypatch.setattr(torch.optim, "SignedMomentum", SignedMomentum, raising=False)
    entry = optimizers.OptimizerEntry("SignedMomentum", kinds={"inertia": number(0, 1)})
    monkeypatch.setitem(optimizers.OPTIMIZERS, "SignedMomentum", entry)


def content(stage: int, **params) -> dict:
    return {
        "optimizer": {"type": "SignedMomentum", "params": params},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }


@pytest.mark.parametrize("stage", [0, 2])
def test_it_trains_and_resumes(tmp_path, stage):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content(stage, lr=1e-3)))
    given = ["--preset", "tiny", "--steps", str(STEPS), "--deepspeed_config", str(file), "--log-every", "1"]
    given += ["--data", pairs(tmp_path / "pairs", count=33), "--save-every", "2"]
    assert drive([*given, "--output-dir", str(tmp_path / "straight")]) == 0
    assert drive([*given, "--output-dir", str(tmp_path / "resumed")], stop_at=2) == 85
    assert drive([*given, "--output-dir", str(tmp_path / "resumed")]) == 0
    straight, resumed = (
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("straight", "resumed")
    )
    assert straight == resumed and len(set(straight)) == STEPS


def test_its_parameters_are_filled_and_checked():
    filled = DeepSpeedConfig.of(content(0)).filled(load_preset("tiny", {}).optim, 1, STEPS)
    assert filled.optimizer_params == {"lr": 1e-3, "weight_decay": 0.05}
    with pytest.raises(UserError, match=r"^optimizer.params.inertia is 1: Input should be less than 1"):
        DeepSpeedConfig.of(content(0, inertia=1))
    with pytest.raises(UserError, match=r"key of optimizer.params is 'betas': did you mean 'inertia'\?"):
        DeepSpeedConfig.of(content(0, betas=[0.5, 0.9]))
    untested = content(1)
    del untested["zero_allow_untested_optimizer"]
    with pytest.raises(UserError, match="'SignedMomentum': DeepSpeed has not tested it at stage 1"):
        DeepSpeedConfig.of(untested)


def test_its_memory_is_predicted_but_for_a_few_numbers():
    config = load_preset("tiny", {"optim": {"micro_batch": 4}})
    options = content(2)
    options["zero_optimization"]["reduce_bucket_size"] = 100_000
    predicted = predict(config, options, 1, target="cpu", options=Options(backend="fake")).report
    measured = measure(config, options, 1)
    assert 0 <= measured.totals["requested"] - predicted.totals["requested"] < SCALARS
    assert predicted.categories["optimizer states"] == measured.categories["optimizer states"] > 0
