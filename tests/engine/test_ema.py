"""The average of the weights: by hand, and in every ZeRO stage and precision.

That a skipped step leaves it alone: tests/faults/test_nonfinite.py; that a run goes on with it, exactly and in another
layout: tests/checkpoint.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine.ema import EMA
from ds_cmli.errors import UserError
from ds_cmli.faults.preemption import Preempted
from tests import make
from tests.ranks import run

DECAY = 0.75
STEPS = 2


def average_of(module):
    """Return the EMA of an engine in fp32 on one rank, whose master weights are the module's own."""
    optimizer = SimpleNamespace(single_partition_of_fp32_groups=[*module.parameters()], update_lp_params=lambda: None)
    return EMA(SimpleNamespace(module=module, optimizer=optimizer), DECAY)


def one_weight(value):
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(value)
    return module, average_of(module)


def test_by_hand():
    module, ema = one_weight(1.0)
    for weight, average in [(2.0, 1.25), (4.0, 1.9375), (0.0, 1.453125)]:  # 3/4 of the last average, 1/4 of the weight
        module.weight.data.fill_(weight)
        ema.update()
        assert ema.averages[0].item() == average
    with ema.as_weights():
        assert module.weight.item() == 1.453125
    assert module.weight.item() == 0.0
    with pytest.raises(UserError, match=r"^optim\.ema_decay is 0\.75 and .* master weights in 16 bits"):
        average_of(module.bfloat16())


@pytest.mark.parametrize(
    "error, ranks, refreshes",
    [(UserError("data"), 1, 2), (KeyboardInterrupt(), 1, 2), (UserError("of one rank"), 2, 1), (Preempted(), 2, 2)],
)
def test_after_any_error_the_weights_are_put_back(monkeypatch, error, ranks, refreshes):
    """The ones that forward passes use by a collective, unless one of several ranks alone may have raised it."""
    module, ema = one_weight(1.0)
    refreshed = []
    monkeypatch.setattr("ds_cmli.engine.ema.refresh_weights", refreshed.append)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for inside, count in ((ema.as_weights, refreshes), (ema.as_master_weights, 0)):
        module.weight.data.fill_(2.0)
        refreshed.clear()
        with pytest.raises(type(error)), inside():
            assert module.weight.item() == 1.0
            raise error
        assert (module.weight.item(), ema.averages[0].item(), len(refreshed)) == (2.0, 1.0, count)


def weights_of(trained):
    """Return a copy of the trained parameters, whole and in fp32, on each rank."""
    from deepspeed.utils import safe_get_full_fp32_param

    trained_parameters = [(n, p) for n, p in trained.objective.named_parameters() if p.requires_grad]
    return {n: safe_get_full_fp32_param(p).clone().flatten() for n, p in trained_parameters}


def embedded(trained, batch):
    """Return features as an evaluation has them, of the weights that forward passes use."""
    student = trained.objective.eval().student
    with torch.no_grad():
        result = torch.cat([*map(torch.flatten, student(batch.image, batch.input_ids, batch.attention_mask))])
    trained.objective.train()
    return result


def check(rank, ranks, layouts):
    optim = {"ema_decay": DECAY, "warmup_share": 0.0, "lr": 0.01, "micro_batch": 4}
    sections = {"optim": optim, "student": {"layers": 2, "freeze_image": 1}}
    batches = make.batches(make.data_of(make.config(**sections)), 4, 2 * STEPS, rank, ranks)
    for layout in layouts:
        stage, precision, accumulation = layout
        content = {"gradient_accumulation_steps": accumulation, "zero_optimization": {"stage": stage}}
        if precision == "bf16":
            content["bf16"] = {"enabled": True}
        trained = make.train_engine(torch.device("cpu"), content, world=ranks, **sections)
        expected = weights_of(trained)
        for step in range(STEPS):
            trained.step(batches[accumulation * step :][:accumulation])
            expected = {n: DECAY * expected[n] + (1 - DECAY) * x for n, x in weights_of(trained).items()}
        with trained.ema.as_master_weights():
            averages = weights_of(trained)
        live = weights_of(trained)
        features = embedded(trained, batches[0])
        for n, x in expected.items():
            torch.testing.assert_close(averages[n], x, rtol=1e-6, atol=1e-8, msg=f"{layout}: {n}")
        assert any((averages[n] - x).abs().max() > 1e-3 for n, x in live.items()), layout
        with pytest.raises(Preempted), trained.ema.as_weights():
            assert not torch.equal(features, embedded(trained, batches[0])), layout
            evaluated = weights_of(trained)
            raise Preempted("in an evaluation")
        torch.testing.assert_close(evaluated, averages, rtol=0, atol=0)
        assert torch.equal(features, embedded(trained, batches[0])), layout
        trained.engine.destroy()


@pytest.mark.slow
def test_every_stage_and_precision_on_two_ranks():
    run(check, 2, [(1, "fp32", 2), (2, "bf16", 1), (3, "bf16", 2)])
