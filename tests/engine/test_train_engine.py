"""One training step through the real DeepSpeed engine, in this process."""

import json
from itertools import accumulate

import pytest
import torch

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.registry import LOSSES
from ds_cmli.data.batch import Batch
from ds_cmli.engine import planning
from profiling.speed.op import cpu_sizes
from tests import make
from tests.conftest import ZERO1
from tests.engine.steps import FP16, build
from tests.ranks import ROOT


@pytest.fixture(scope="module")
def batches(data) -> list[Batch]:
    return make.batches(data, 8, 6)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_five_steps_with_each_shipped_json(device, data, batches, path):
    train_engine = build(device, data, DeepSpeedConfig.load(path), {"optim": {"lr": 3e-3, "warmup_share": 0.0}})
    losses = [train_engine(batches[0])[0].item() for _ in range(5)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0]  # the same batch five times: it must be learned
    assert train_engine.engine.zero_optimization_stage() == json.loads(path.read_text())["zero_optimization"]["stage"]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_alone(device, data, batches, loss):
    train_engine = build(device, data, {"zero_optimization": {"stage": 2}}, {"loss": {"weights": {loss: 2.0}}})
    total, item = train_engine(batches[0])
    assert list(item) == [loss]
    assert total.item() == pytest.approx(2 * item[loss].item())
    assert (train_engine.teacher is None) == (not LOSSES[loss].teacher)
    assert total.item() > 0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_starts_at_its_step(device, data, batches, stage, accumulation):
    """Before, all is as without it, but that it is computed; over pairs too, with gradient caching."""
    content = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
    totals = []
    for start in ({}, {"cmli": 3, "target_cmli": 2}):
        loss = {"weights": {"global": 1.0, "cmli": 0.5, "target_cmli": 2.0}, "start": start}
        one_block = {"student": {"layers": 1}, "teacher": {"block": 0}}
        train_engine = build(device, data, content, {"loss": loss, **one_block})
        result = [train_engine.step(batches[accumulation * n :][:accumulation])[-1] for n in range(3)]
        totals.append(result)
    parts = [{name: x.item() for name, x in losses.each.items()} for losses in totals[1]]
    assert totals[1][0].total.item() == pytest.approx(parts[0]["global"])
    assert totals[1][1].total.item() == pytest.approx(parts[1]["global"] + 2 * parts[1]["target_cmli"])
    assert totals[1][2].total.item() == pytest.approx(
        parts[2]["global"] + 0.5 * parts[2]["cmli"] + 2 * parts[2]["target_cmli"]
    )
    assert parts[0]["cmli"] == totals[0][0].each["cmli"].item() > 0
    assert parts[1]["cmli"] != totals[0][1].each["cmli"].item()  # it has not been trained yet


def test_a_start_after_the_end_gets_a_line(data, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, str(int(name == "WORLD_SIZE")))
    for start, lines in ((20, 1), (19, 0)):
        config = load_preset("tiny", {"loss": {"start": {"cmli": start}}})
        planning.make_plan(config, DeepSpeedConfig.of(ZERO1), 100)
        said = capsys.readouterr().out
        assert said.count("loss.start: cmli counts from step 20 on, and the run has 20 steps") == lines


def test_teacher_stays_frozen_and_outside_the_engine(device, data, batches):
    train_engine = build(device, data, {"zero_optimization": {"stage": 2}})
    before = [p.clone() for p in train_engine.teacher.parameters()]
    train_engine(batches[0])
    train_engine.teacher.train()
    assert not train_engine.teacher.training
    assert all(torch.equal(p, q) for p, q in zip(before, train_engine.teacher.parameters(), strict=True))
    engine = {id(p) for p in train_engine.engine.module.parameters()}
    assert not any(id(p) in engine or p.requires_grad for p in train_engine.teacher.parameters())


def test_activation_checkpointing_changes_memory_and_no_bit_of_the_loss(device, data, batches):
    losses, peaks = [], []
    for section in ({}, {"activation_checkpointing": {}}):
        train_engine = build(
            device, data, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100000}, **section},
            {"student": {"shared_blocks": 2, "dropout": 0.1}},
        )  # fmt: skip
        losses.append([train_engine(b)[0] for b in batches[:3]])
        peaks.append(max(accumulate(cpu_sizes(lambda: train_engine(batches[3])))))  # noqa: B023
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert peaks[1] < peaks[0]
    print(f"peak of a step without checkpointing {peaks[0]:,} B, with {peaks[1]:,} B")


def test_fp16_with_dynamic_loss_scaling_skips_an_overflow_and_goes_on(fp16_device, device, data, batches):
    train_engine = build(device, data, FP16)
    assert train_engine.dtype == torch.float16
    weights = train_engine.objective.student.projection.weight.clone()
    train_engine(batches[0])  # a scale of 2^40 overflows fp16
    assert train_engine.engine.skipped_steps == 1
    assert torch.equal(weights, train_engine.objective.student.projection.weight)
    scale = train_engine.state()["loss_scale"]
    assert scale == 2.0**39
    train_engine.engine.optimizer.loss_scaler.cur_scale = 1024.0
    skipped = train_engine.engine.skipped_steps
    losses = [train_engine(batches[0])[0].item() for _ in range(5)]
    assert train_engine.engine.skipped_steps == skipped
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "device_name, fp16, bf16, runs",
    [
        ("cpu", True, True, "bf16"),
        ("cpu", True, False, "fp32"),
        ("cuda", False, True, "bf16"),
        ("cuda", False, False, "fp32"),
        ("cuda", True, True, "fp16"),
    ],
)
def test_fp16_falls_back_to_what_the_device_is_fast_in(monkeypatch, device_name, fp16, bf16, runs):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "device_name", lambda: device_name)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: fp16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(engine.planning, "bf16_is_fast", lambda: bf16)
    ds_config = engine.on_this_device(DeepSpeedConfig.of(FP16))
    assert ds_config.precision == runs
    if runs != "fp16":
        (notice,) = ds_config.notices
        assert device_name in notice and runs in notice and "\n" not in notice
    else:
        assert ds_config.notices == ()


def test_the_backend_that_runs_is_told_in_one_line(monkeypatch):
    config, gpu, cpu = load_preset("tiny", {}), torch.device("cuda"), torch.device("cpu")
    outcome, json = (
        load_preset("tiny", {"loss": {"cmli_backend": "triton"}}),
        DeepSpeedConfig.of(ZERO1),
    )
    monkeypatch.setattr(planning, "why_not_triton", lambda *_: None)
    own, line = engine.with_backend(config, json, gpu)
    assert (own.loss.cmli_backend, line) == ("triton", None)
    monkeypatch.setattr(planning, "why_not_triton", lambda *_: "Failed to find C compiler.")
    own, line = engine.with_backend(config, json, gpu)
    assert own.loss.cmli_backend == "torch"
    assert "PyTorch's operators, which are slower: Failed to find C compiler." in line and "\n" not in line
    own, line = engine.with_backend(config, json, cpu)
    assert (own.loss.cmli_backend, line) == ("auto", None)
    for device in (cpu, gpu):
        with pytest.raises(UserError, match=r"cmli_backend is 'triton', which does not run"):
            engine.with_backend(outcome, json, device)
    without = load_preset("tiny", {"loss": {"weights": {"global": 1.0}, "cmli_backend": "triton"}})
    assert engine.with_backend(without, json, cpu) == (without, None)
