"""Optimizers and learning rates: every optimizer and scheduler that a JSON may name, through the real engine."""

import pytest
import torch
from deepspeed.runtime import lr_schedules

from ds_cmli import engine
from ds_cmli.checkpoint.resume import with_new_settings
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import OptimConfig
from tests import make
from tests.conftest import ZERO1

STEPS = 4


@pytest.fixture(scope="module")
def batches(data):
    return make.batches(data, 8, STEPS)


def train(content, device, data, batches):
    """The rates logged for each step, whether each changed the weights, and the rates of the schedule after each."""
    config = load_preset("tiny", {"optim": {"lr": 1e-2, "warmup_share": 0.5}})
    ds_config = engine.filled(config, engine.on_this_device(DeepSpeedConfig.of(ZERO1 | content)), 1, STEPS)
    train_engine = engine.build(config, ds_config, data.vocab_size, STEPS, device)
    logged, moved, after = [], [], []
    for batch in batches:
        before = train_engine.objective.student.projection.weight.detach().clone()
        train_engine.step([batch])
        logged.append(train_engine.state()["lr"])
        moved.append(not torch.equal(before, train_engine.objective.student.projection.weight))
        after.append(train_engine.engine.get_lr()[0])
    return logged, moved, after


def test_the_first_step_trains_and_its_own_rate_is_logged(device, data, batches):
    logged, moved, after = train({}, device, data, batches)
    assert logged == pytest.approx([0.005, 0.01, 0.0075, 0.0025])
    assert all(moved)
    assert logged[1:] == after[:-1]


@pytest.mark.parametrize("kind", ["adamw", "SGD", "RMSprop"])
def test_pytorchs_optimizers_train(device, data, batches, kind):
    content = {"optimizer": {"type": kind}, "zero_allow_untested_optimizer": True, "bf16": {"enabled": True}}
    _, moved, _ = train(content, device, data, batches[:2])
    assert all(moved)


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupCosineLR", "OneCycle"])
def test_deepspeeds_schedules_train(device, data, batches, kind):
    params = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2} if kind == "OneCycle" else {}
    content = {"scheduler": {"type": kind, "params": params}, "zero_optimization": {"stage": 2}}
    logged, moved, after = train(content, device, data, batches)
    assert logged[1:] == after[:-1]
    assert [rate > 0 for rate in logged] == moved


@pytest.mark.parametrize("kind", ["ours", "WarmupDecayLR", "WarmupCosineLR"])
def test_a_run_that_goes_on_with_another_schedule_has_the_rates_of_that(kind):
    def made(steps):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        if kind == "ours":
            optim = OptimConfig(warmup_share=2 / steps)
            return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: optim.rate(done + 1, steps))
        return optimizer, getattr(lr_schedules, kind)(optimizer, total_num_steps=steps, warmup_num_steps=2)

    def rates(optimizer, schedule, steps):
        results = []
        for _ in range(steps):
            results.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return results

    old, going_on = made(9), made(20)
    rates(*old, 4)
    fresh = dict(going_on[1].state_dict())
    going_on[0].load_state_dict(old[0].state_dict())
    going_on[1].load_state_dict(old[1].state_dict())
    with_new_settings(going_on[1], fresh, going_on[0].param_groups)
    assert rates(*going_on, 4) == pytest.approx(rates(*made(20), 8)[4:])
