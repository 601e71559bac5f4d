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
from tests.drive_train import drive
from tests.make import pairs
from tests.ranks import run

# A loss scale that stays: a halved one would round the smallest gradients otherwise.
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "loss_scale": 256}}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = [  # each stage, precision, and kind of bad step
    (1, {}, "fp16", "nan"),
    (2, {}, "fp32", "nan"),
    (2, OFFLOAD, "bf16", "gradient"),
    (3, {}, "fp32", "gradient"),
    (3, {"stage3_param_persistence_threshold": 0}, "bf16", "nan"),
]


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


@pytest.mark.slow
@pytest.mark.parametrize("stage, zero, precision, kind", CASES)
def test_a_bad_step_changes_nothing_and_the_next_goes_on(device, data, stage, zero, precision, kind, fp16_device):
    batches = make.batches(data, 8, 5)
    optim = {"warmup_share": 0.0, "ema_decay": 0.9}
    ds_config = {"gradient_accumulation_steps": 2, "zero_optimization": {"stage": stage, **zero}}
    ds_config |= {"zero_force_ds_cpu_optimizer": False, **PRECISIONS[precision]}
    train_engine, straight = (make.train_engine(device, ds_config, optim=optim) for _ in range(2))
    for batch in batches[:2]:
        micro_batch(train_engine, batch)
    assert not train_engine.skipped
    micro_batch(train_engine, batches[2])
    with spoiled(train_engine, kind):
        micro_batch(train_engine, batches[3])  # the last of an accumulation
    assert train_engine.skipped
    # Logged, although ZeRO-3 holds parts of the parameters only after a skipped step.
    assert train_engine.log_columns()["temperature/cmli"] == pytest.approx(0.02, rel=0.1)
    for batch in batches[3:]:
        micro_batch(train_engine, batch)
    assert not train_engine.skipped
    train_engine.log_columns()
    # Nothing of the bad step is left: the same as a run that never met it.
    for batch in [*batches[:2], *batches[3:]]:
        micro_batch(straight, batch)
    torch.testing.assert_close(everything(train_engine), everything(straight), rtol=0, atol=0)


def on_two_ranks(rank, world_size, data_folder, ds_config):
    """Rank 1 alone meets a loss that is not finite."""
    sections = {"data": {"source": data_folder}, "optim": {"ema_decay": 0.9}}
    train_engine = make.train_engine(torch.device("cpu"), ds_config, world=world_size, **sections)
    (batch,) = make.batches(make.data_of(make.config(**sections)), 8, 1, rank, world_size)
    micro_batch(train_engine, batch)  # from here on the average is not the weights
    values_before = everything(train_engine)
    with spoiled(train_engine, "nan" if rank == 1 else ""):
        window = [(batch.index, micro_batch(train_engine, batch))]
    assert train_engine.skipped
    torch.testing.assert_close(everything(train_engine), values_before, rtol=0, atol=0)
    samples = nonfinite.skipped_samples(window, train_engine.engine.optimizer, CollectiveFlags())
    micro_batch(train_engine, batch)
    assert not train_engine.skipped
    return samples


@pytest.mark.parametrize(
    "stage, more",
    [(2, {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, {}), (3, {}), (2, OFFLOAD), (1, "bf16")))],
)
def test_ranks_agree_and_the_samples_of_the_one_at_fault_are_told(tmp_path, stage, more):
    """With each of DeepSpeed's optimizers."""
    ds_config = {"zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False}
    ds_config |= PRECISIONS["bf16"] if more == "bf16" else {"zero_optimization": {"stage": stage, **more}}
    samples = run(on_two_ranks, 2, pairs(tmp_path / "pairs", count=63), ds_config)
    assert samples == [list(range(1, 16, 2))] * 2


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
