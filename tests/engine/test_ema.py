"""The average of the weights: by hand, and in every ZeRO stage, precision and accumulation, on one and two ranks.

That a skipped step leaves it alone: tests/faults/test_nonfinite.py; that a run goes on with it, exactly and in another
layout: tests/checkpoint.
"""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_cmli import engine
from ds_cmli.checkpoint.weights import full_averages, full_weights
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine.ema import EMA
from ds_cmli.faults.preemption import Preempted
from ds_cmli.memory.inputs import longest_batch, without_weights
from tests.ranks import run

DECAY, STEPS, BATCH = 0.75, 2, 4
STUDENT = {"freeze_image": 1, "dropout": 0.0}


def stand_in(module):
    """For an engine in fp32 on one rank, whose master weights are the module's own."""
    optimizer = SimpleNamespace(single_partition_of_fp32_groups=[*module.parameters()], update_lp_params=lambda: None)
    return SimpleNamespace(module=module, optimizer=optimizer)


def test_by_hand():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema = EMA(stand_in(module), DECAY)
    for weight, average in [(2.0, 1.25), (4.0, 1.9375), (0.0, 1.453125)]:  # 3/4 of the last average, 1/4 of the weight
        module.weight.data.fill_(weight)
        ema.update()
        assert ema.averages[0].item() == average
    with ema.as_weights():
        assert module.weight.item() == 1.453125
    assert module.weight.item() == 0.0


def test_master_weights_in_16_bits_are_refused():
    with pytest.raises(UserError, match=r"^optim\.ema_decay is 0\.75 and .* master weights in 16 bits"):
        EMA(stand_in(nn.Linear(1, 1).bfloat16()), DECAY)


@pytest.mark.parametrize("error", [UserError("one rank's data"), RuntimeError(), KeyboardInterrupt(), MemoryError()])
def test_the_weights_are_put_back_after_any_error(error):
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema = EMA(stand_in(module), DECAY)
    for inside in (ema.as_weights, ema.as_master_weights):
        module.weight.data.fill_(2.0)
        with pytest.raises(type(error)), inside():
            assert module.weight.item() == 1.0
            raise error
        assert (module.weight.item(), ema.averages[0].item()) == (2.0, 1.0)


def test_an_error_of_one_of_several_ranks_puts_its_master_weights_back_without_a_collective(monkeypatch):
    refreshed = []
    monkeypatch.setattr("ds_cmli.engine.ema.refresh_weights", refreshed.append)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(stand_in(module), DECAY)
    before = module.weight.item()
    ema.averages[0].fill_(7.0)
    for error, refreshes in ((UserError("one rank's data"), 1), (Preempted(), 2)):
        refreshed.clear()
        with pytest.raises(type(error)), ema.as_weights():
            assert module.weight.item() == 7.0
            raise error
        assert len(refreshed) == refreshes and module.weight.item() == before


def ds_json(stage, precision, accumulation=1, **zero):
    return {
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, **zero},
        **({precision: {"enabled": True}} if precision != "fp32" else {}),
    }


def some_batch(config, seed):
    torch.manual_seed(seed)
    batch = longest_batch(config, BATCH)
    batch.image.random_(0, 256)
    batch.input_ids.random_(5, 200)
    return batch


def weights_of(train_engine):
    """Whole, in fp32, of the trained parameters: a copy."""
    full = full_weights(train_engine)
    return {n: full[n].clone() for n, p in train_engine.objective.named_parameters() if p.requires_grad}


def used_weights(train_engine):
    return [getattr(p, "ds_tensor", p).detach().clone() for p in train_engine.objective.parameters()]


def embedded(train_engine, batch):
    """Image and text features as an evaluation has them."""
    objective = train_engine.objective.eval()
    with torch.no_grad():
        student, texts = objective.student, (batch.input_ids, batch.attention_mask)
        result = [*student.image_embeddings(batch.image), *student.text_embeddings(*texts)]
    objective.train()
    return result


def check(rank, ranks, layouts):
    """One line for each layout whose average is not as it should be."""
    os.environ["LOCAL_RANK"] = str(rank)
    optim = {"ema_decay": DECAY, "warmup_share": 0.0, "lr": 0.01}
    config, vocab_size = without_weights(
        load_preset("tiny", {"student": STUDENT, "teacher": {"block": 0}, "optim": optim})
    )
    wrong = []
    for layout in layouts:
        content = {**ds_json(*layout), "train_micro_batch_size_per_gpu": BATCH}
        json = engine.filled(config, DeepSpeedConfig.of(content), ranks, 100)
        train_engine = engine.build(config, json, vocab_size, 100, torch.device("cpu"))
        expected = weights_of(train_engine)
        for step in range(STEPS):
            train_engine.step([some_batch(config, 10 * step + rank) for _ in range(json.accumulation)])
            expected = {n: DECAY * expected[n] + (1 - DECAY) * x for n, x in weights_of(train_engine).items()}
        averages = full_averages(train_engine)
        live = weights_of(train_engine)
        if not all(torch.allclose(averages[n], x, rtol=1e-6, atol=1e-8) for n, x in expected.items()):
            wrong.append(f"{layout}: not the average")
        if not any((averages[n] - x).abs().max() > 1e-3 for n, x in live.items()):
            wrong.append(f"{layout}: nothing has moved")
        before, batch = used_weights(train_engine), some_batch(config, 0)
        features = embedded(train_engine, batch)
        error = Preempted if ranks > 1 or layout[2] == 2 else UserError
        with pytest.raises(error), train_engine.ema.as_weights():
            assert not any(map(torch.equal, features, embedded(train_engine, batch)))
            inside = weights_of(train_engine)
            raise error("in an evaluation")
        if not all(torch.equal(inside[n], averages[n]) for n in inside):
            wrong.append(f"{layout}: an evaluation has other weights")
        if not all(map(torch.equal, before, used_weights(train_engine))):
            wrong.append(f"{layout}: the weights are not put back")
        if not all(map(torch.equal, features, embedded(train_engine, batch))):
            wrong.append(f"{layout}: other features after the evaluation")
        train_engine.engine.destroy()
    return wrong


LAYOUTS = [*itertools.product((1, 2, 3), ("fp32", "bf16"), (1, 2))]


# Every pair of a stage, a precision and a number of micro-batches.
PAIRS = [layout for layout in LAYOUTS if (layout[0] + (layout[1] == "bf16") + layout[2]) % 2]


@pytest.mark.slow
def test_every_stage_precision_and_accumulation(device):
    assert check(0, 1, PAIRS) == []


@pytest.mark.slow
def test_two_ranks():
    assert run(check, 2, [(1, "fp32", 2), (2, "bf16", 1), (3, "bf16", 2)]) == [[], []]
