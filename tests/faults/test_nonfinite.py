"""Losses and gradients that are not finite: nothing changes, on any rank, and the samples are told."""

import itertools
import json
from contextlib import contextmanager

import pytest
import torch

from ds_cmli import engine
from ds_cmli.distributed.process_group import CollectiveFlags
from ds_cmli.errors import UserError
from ds_cmli.faults import nonfinite
from tests import make
from tests.conftest import pretend_fp16
from tests.drive_train import drive
from tests.make import pairs
from tests.ranks import run

# A loss scale that stays: a halved one would round the smallest gradients otherwise.
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "loss_scale": 256}}}
SLOW = [  # each of DeepSpeed's optimizers and each precision: ZeRO, precision, kind of bad step
    ({"stage": 1}, "fp16", "nan"),
    ({"stage": 1}, "bf16", "nan"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16", "gradient"),
    ({"stage": 3}, "fp32", "gradient"),
    ({"stage": 3, "stage3_param_persistence_threshold": 0}, "bf16", "nan"),
]
CASES = [({"stage": 2}, "fp32", "nan"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def micro_batch(train_engine, batch) -> torch.Tensor:
    """Train on one micro-batch, maybe one of several of a step, and return its weighted loss."""
    losses = train_engine._forward_backward(batch)
    train_engine.update()
    return losses.total


def everything(train_engine) -> list[torch.Tensor]:
    """Return copies of all that an update changes: weights, fp32 copies, their averages, moments, the learning rate."""
    optimizer = train_engine.engine.optimizer
    states = [s[k] for s in optimizer.state.values() for k in sorted(s) if torch.is_tensor(s[k])]
    params = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in train_engine.engine.module.parameters()]
    flat = [p for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
            for p in getattr(optimizer, name, [])]  # fmt: skip
    averages = train_engine.ema.averages if train_engine.ema is not None else []
    return [
        x.detach().clone() for x in (*params, *flat, *averages, *states, torch.tensor(train_engine.engine.get_lr()))
    ]


@contextmanager
def spoiled(train_engine, kind):
    """Inside, the loss is NaN, with finite gradients, or it is finite and the gradients are not."""

    def spoil(module, inputs, output):
        total, losses = output
        if kind == "gradient":
            total.register_hook(lambda gradient: gradient * torch.inf)
        return (total + torch.nan if kind == "nan" else total), losses

    with train_engine.objective.register_forward_hook(spoil):
        yield


def on_two_ranks(rank, world_size, data_folder, zero, precision, kind):
    """Train three steps of two micro-batches, the second step bad on rank 1 alone, and return the samples named."""
    ds_config = {"zero_optimization": zero, "gradient_accumulation_steps": 2, "zero_force_ds_cpu_optimizer": False}
    ds_config |= PRECISIONS[precision]
    sections = {"data": {"source": data_folder}, "optim": {"warmup_share": 0.0, "ema_decay": 0.9}}
    batches = make.batches(make.data_of(make.config(**sections)), 8, 6, rank, world_size)
    with pytest.MonkeyPatch.context() as patch:
        pretend_fp16(patch)
        train_engine, straight = (
            make.train_engine(torch.device("cpu"), ds_config, world=world_size, **sections) for _ in range(2)
        )
    for batch in batches[:2]:
        micro_batch(train_engine, batch)
    assert not train_engine.skipped
    window = [(batches[2].index, micro_batch(train_engine, batches[2]))]
    with spoiled(train_engine, kind if rank == 1 else ""):
        window.append((batches[3].index, micro_batch(train_engine, batches[3])))
    assert train_engine.skipped
    samples = nonfinite.skipped_samples(window, train_engine.engine.optimizer, CollectiveFlags())
    # Logged, although ZeRO-3 holds parts of the parameters only after a skipped step.
    assert train_engine.log_columns()["temperature/cmli"] == pytest.approx(0.02, rel=0.1)
    for batch in batches[4:]:
        micro_batch(train_engine, batch)
    assert not train_engine.skipped
    train_engine.log_columns()
    for batch in [*batches[:2], *batches[4:]]:
        micro_batch(straight, batch)
    if rank == 0:  # ZeRO-3 pads what rank 1 has with any values; weights that it had changed would show here too
        torch.testing.assert_close(everything(train_engine), everything(straight), rtol=0, atol=0)
    return samples


@pytest.mark.parametrize("zero, precision, kind", CASES)
def test_ranks_agree_and_the_samples_of_the_one_at_fault_are_told(tmp_path, zero, precision, kind):
    """Nothing of the bad step is left: all is as in a run that never met it."""
    samples = run(on_two_ranks, 2, pairs(tmp_path / "pairs", count=103), zero, precision, kind)
    assert samples == [[*range(49, 64, 2)] if kind == "nan" else [*range(32, 64)]] * 2


@pytest.fixture
def arguments(alone, source, tmp_path):
    return [*make.small({"--steps": 10, "--output-dir": tmp_path / "run"}), *source]


def bad_steps(monkeypatch, kind, numbers):
    """Have these steps, counted over everything trained in this test, be `spoiled`."""
    step = engine.TrainEngine.step
    count = itertools.count(1)

    def counted(train_engine, micro_batches, heartbeat):
        with spoiled(train_engine, kind if next(count) in numbers else ""):
            return step(train_engine, micro_batches, heartbeat)

    monkeypatch.setattr(engine.TrainEngine, "step", counted)


def test_a_run_goes_over_bad_steps_and_too_many_stop_it(arguments, tmp_path, monkeypatch, capfd):
    bad_steps(monkeypatch, "nan", {3, 4, 7, *range(10, 50)})
    why = r"the run has diverged: 6 steps in a row were skipped, more than 5; the first bad step is 10, "
    with pytest.raises(UserError, match=why + r"the last good checkpoint is \S+/step15\. "):
        drive([*arguments, "--steps", "20", "--save-every", "9"])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run/metrics.jsonl").open()]
    skipped = {line["step"]: line["skipped"] for line in lines if "skipped" in line}
    assert list(skipped) == [3, 4, 7, *range(10, 16)] and all(len(samples) == 8 for samples in skipped.values())
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 5, 6, 8, 9]
    assert capfd.readouterr().out.count("loss or gradients are not finite; samples") == 9
    root = tmp_path / "run" / "checkpoint"
    assert (root / "latest").read_text() == "step15"
    # The file's name says whether this processor trains in bf16.
    files = [next((root / name).glob("*zero_pp_rank_0*optim_states.pt")) for name in ("step9", "step15")]
    good, last = (torch.load(file, weights_only=False)["optimizer_state_dict"] for file in files)
    weights = "single_partition_of_fp32_groups"
    torch.testing.assert_close(last[weights], good[weights], rtol=0, atol=0)


def test_fp16_at_its_smallest_scale_stops_with_a_checkpoint_from_before(arguments, tmp_path, monkeypatch, fp16_device):
    fp16 = {"enabled": True, "initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 1}
    file = make.json_file(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}, "fp16": fp16})
    bad_steps(monkeypatch, "gradient", range(4, 50))
    with pytest.raises(UserError, match="6 steps in a row were skipped"):
        drive([*arguments, "--deepspeed_config", file])
    # Step 4 lowers the scale from 4 to 2, which is no fault; from step 5 on, at 1, each step is one.
    assert (tmp_path / "run" / "checkpoint" / "latest").read_text() == "step10"
    assert [line["step"] for line in make.lines(tmp_path / "run", "skipped")] == [5, 6, 7, 8, 9, 10]
