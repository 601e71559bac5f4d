"""Optimizers and learning rates: those that a JSON may name, through the real engine."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import lr_schedules

from ds_cmli.checkpoint import resume
from ds_cmli.config.schema import OptimConfig
from tests import make
from tests.conftest import ZERO1

CYCLE = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}
UNTESTED = {"zero_allow_untested_optimizer": True, "bf16": {"enabled": True}}
CONTENTS = {
    **{kind: {"optimizer": {"type": kind}, **UNTESTED} for kind in ("adamw", "SGD", "RMSprop")},
    **{kind: {"scheduler": {"type": kind, "params": {}}} for kind in ("WarmupLR", "WarmupCosineLR")},
    "OneCycle": {"scheduler": {"type": "OneCycle", "params": CYCLE}, "zero_optimization": {"stage": 2}},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_each_step_trains_at_the_rate_that_is_logged_for_it(kind, device, data):
    trained = make.train_engine(device, ZERO1 | CONTENTS[kind], 4, optim={"lr": 1e-2, "warmup_share": 0.5})
    weight, logged, moved, after = trained.objective.student.projection.weight, [], [], []
    for batch in make.batches(data, 8, 4):
        before = weight.detach().clone()
        trained.step([batch])
        logged.append(trained.state()["lr"])
        moved.append(not torch.equal(before, weight))
        after.append(trained.engine.get_lr()[0])
    assert logged[1:] == after[:-1]
    assert [rate > 0 for rate in logged] == moved
    if "scheduler" not in CONTENTS[kind]:
        assert logged == pytest.approx([0.005, 0.01, 0.0075, 0.0025])


@pytest.mark.parametrize("kind", ["ours", "WarmupDecayLR", "WarmupCosineLR"])
def test_a_run_that_goes_on_with_another_schedule_has_the_rates_of_that(kind, tmp_path):
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

    def load_checkpoint(*_, **__):
        for part, saved in zip(going_on, old, strict=True):
            part.load_state_dict(saved.state_dict())

    (tmp_path / resume.CHECKSUMS).write_text("{}")
    parts = {"optimizer": going_on[0], "lr_scheduler": going_on[1], "load_checkpoint": load_checkpoint}
    point = SimpleNamespace(path=tmp_path, resharded=False, changed=True)
    resume._load_engine(point, SimpleNamespace(engine=SimpleNamespace(**parts), ema=None))
    assert rates(*going_on, 4) == pytest.approx(rates(*made(20), 8)[4:])
