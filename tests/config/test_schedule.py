"""Optimizers and learning rates: every optimizer and scheduler that a JSON may name, through the real engine."""

import pytest
import torch

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config import optimizers
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schedule import warmup_then_cosine, with_new_settings
from tests.batches import rank_batches
from tests.conftest import ZERO1

STEPS = 4
REQUIRED = {
    **{"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "T_max": 3, "T_0": 2, "base_lr": 1e-4, "max_lr": 1e-2, "gamma": 0.9},
    **{"milestones": [1, 2], "step_size": 2},
}


@pytest.fixture(scope="module")
def batches(data):
    loader = iter(rank_batches(data.train, data, 8))
    return [next(loader) for _ in range(STEPS)]


def decided(content):
    config = load_preset("tiny", {"optim": {"lr": 1e-2, "warmup_share": 0.5}})
    ds_config = engine.on_this_device(DeepSpeedConfig.of(ZERO1 | content))
    return config, engine.filled(config, ds_config, 1, STEPS)


def train(content, device, data, batches):
    """The rates logged for each step, whether each changed the weights, and the rates of the schedule after each."""
    config, ds_config = decided(content)
    engine.try_out(ds_config, STEPS)
    train_engine = engine.build(config, ds_config, data.vocab_size, STEPS, device)
    logged, moved, after = [], [], []
    for batch in batches:
        before = train_engine.objective.student.projection.weight.detach().clone()
        train_engine(batch)
        logged.append(train_engine.state()["lr"])
        moved.append(not torch.equal(before, train_engine.objective.student.projection.weight))
        after.append(train_engine.engine.get_lr()[0])
    return logged, moved, after


def test_every_step_has_a_rate_and_the_first_half_warms_up():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule, rates = warmup_then_cosine(optimizer, 2, 5), []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # 1/2, 2/2, then (1 + cos(pi k/4)) / 2 for k = 1, 2, 3.
    assert rates == pytest.approx([0.5, 1.0, 0.8535534, 0.5, 0.1464466])


def test_the_first_step_trains_and_its_own_rate_is_logged(device, data, batches):
    logged, moved, after = train({}, device, data, batches)
    assert logged == pytest.approx([0.005, 0.01, 0.0075, 0.0025])
    assert all(moved)
    assert logged[1:] == after[:-1]


@pytest.mark.parametrize("kind", sorted({*optimizers.OPTIMIZERS, "adamw"}))
def test_every_optimizer_trains_or_is_one_line(device, data, batches, kind):
    content = {
        **{"optimizer": {"type": kind}, "zero_allow_untested_optimizer": True},
        **{"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    }
    entry = optimizers.OPTIMIZERS[optimizers.optimizer_name(kind)]
    if entry.why_not or entry.compiled:
        with pytest.raises(UserError, match=f"^optimizer.type is '{kind}': [^\n]*$"):
            train(content, device, data, batches)
    else:
        _, moved, _ = train(content, device, data, batches[:2])
        assert all(moved)


@pytest.mark.parametrize("kind", sorted(optimizers.SCHEDULERS))
def test_every_scheduler_trains_or_is_one_line(device, data, batches, kind):
    params = {key: REQUIRED[key] for key in optimizers.SCHEDULERS[kind].required}
    content = {"scheduler": {"type": kind, "params": params}, "zero_optimization": {"stage": 2}}
    if optimizers.SCHEDULERS[kind].why_not:
        with pytest.raises(UserError, match=f"^scheduler.type is '{kind}': [^\n]*$"):
            train(content, device, data, batches)
        return
    logged, moved, after = train(content, device, data, batches)
    assert logged[1:] == after[:-1]
    assert [rate > 0 for rate in logged] == moved


def test_a_scheduler_that_starts_at_0_is_told():
    lines = [engine.try_out(decided({"scheduler": {"type": k}})[1], STEPS) for k in ("WarmupLR", "LinearLR")]
    assert lines == ["scheduler WarmupLR starts at rate 0: the first 2 steps change no weight", None]
    late = {"scheduler": {"type": "StepLR", "params": {"step_size": 9}}}
    line = engine.try_out(decided(late)[1], STEPS)
    assert line == "scheduler StepLR has no effect: the rate is 0.01 at each of the 4 steps"


@pytest.mark.parametrize(
    "content, words",
    [
        ({"optimizer": {"type": "SGD", "params": {"nesterov": True}}}, "does not suit SGD"),
        ({"optimizer": {"type": "AdamW", "params": {"foreach": True, "fused": True}}}, "does not suit AdamW"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": -1}}}, "the rate of step 2 is -0.01"),
        (
            {"scheduler": {"type": "ExponentialLR", "params": {"gamma": 1e200}}},
            r"is 1e\+200: Input should be less than 10{30}$",
        ),
        ({"scheduler": {"type": "ExponentialLR", "params": {"gamma": 1e20}}}, "the rate of step 3 is 1e\\+38"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1.0]}}}, "does not suit WarmupLR"),
        ({"scheduler": {"type": "LinearLR", "params": {"start_factor": 0}}}, "does not suit LinearLR"),
        ({"scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1, "total_steps": 2}}}, "the run has 4 steps"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": 0}}}, "the rate is 0 from step 2 on"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0}}}, "the rate is 0 from step 1 on"),
    ],
)
def test_parameters_that_an_optimizer_or_scheduler_refuses_are_one_line(content, words):
    with pytest.raises(UserError, match=words) as error:
        engine.try_out(decided({"zero_allow_untested_optimizer": True, **content})[1], STEPS)
    assert "\n" not in str(error.value)


def test_no_optimizer_of_deepspeeds_own_is_compiled_unasked():
    for kind in ("Adam", "AdamW"):
        for section in ({}, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}):
            _, ds_config = decided({"optimizer": {"type": kind}, **section})
            assert ds_config.optimizer_params["torch_adam"] is True
            (notice,) = ds_config.notices
            assert notice.startswith(f"optimizer {kind}: PyTorch's own; DeepSpeed's would be compiled first: ")


@pytest.mark.parametrize(
    ("kind", "before", "now"),
    [
        ("PolynomialLR", {"total_iters": 5}, {"total_iters": 20}), ("StepLR", {"step_size": 2}, {"step_size": 3}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 6}, {"max_lr": 0.2, "total_steps": 20}),
        ("CosineAnnealingLR", {"T_max": 5}, {"T_max": 20}), ("LinearLR", {"total_iters": 2}, {"total_iters": 9}),
        ("ExponentialLR", {"gamma": 0.5}, {"gamma": 0.9}), ("MultiStepLR", {"milestones": [1]}, {"milestones": [6]}),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_with_another_schedule_has_the_rates_of_that(kind, before, now):
    def made(params):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        return optimizer, getattr(torch.optim.lr_scheduler, kind)(optimizer, **params)

    def rates(optimizer, schedule, steps):
        results = []
        for _ in range(steps):
            results.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return results

    old, going_on = made(before), made(now)
    rates(*old, 4)
    fresh = dict(going_on[1].state_dict())
    group = {name: value for name, value in going_on[0].param_groups[0].items() if name not in ("params", "lr")}
    going_on[0].load_state_dict(old[0].state_dict())
    going_on[1].load_state_dict(old[1].state_dict())
    going_on[0].param_groups[0].update(group)
    with_new_settings(going_on[1], fresh, going_on[0].param_groups)
    assert rates(*going_on, 4) == pytest.approx(rates(*made(now), 8)[4:])
