"""The training step through the real DeepSpeed engine, in this process, and what is decided before it."""

import json
import logging
import math
import os
import re
from itertools import accumulate

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data.pairs import Batch
from ds_cmli.engine import plan
from ds_cmli.engine.build import show_log_of_deepspeed
from ds_cmli.engine.train_engine import name_means
from ds_cmli.errors import UserError
from ds_cmli.hardware import bf16_is_fast
from ds_cmli.logs import meter as meter_module
from profiling.speed.op import cpu_sizes
from tests import make
from tests.conftest import ZERO1
from tests.ranks import ROOT

HAS_BF16 = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("avx512_bf16")
FAST = HAS_BF16 and "ONEDNN_MAX_CPU_ISA" not in os.environ  # oneDNN reads it once


@pytest.fixture(scope="module")
def batches(data) -> list[Batch]:
    return make.batches(data, 8, 6)


def totals(train_engine, batches) -> list[float]:
    return [train_engine.step([batch])[0].total.item() for batch in batches]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_five_steps_with_each_shipped_json(device, batches, path):
    train_engine = make.train_engine(device, DeepSpeedConfig.load(path), optim={"lr": 3e-3, "warmup_share": 0.0})
    losses = totals(train_engine, 5 * batches[:1])
    assert all(map(math.isfinite, losses)), losses
    assert losses[-1] < losses[0]  # the same batch five times: it must be learned
    assert train_engine.engine.zero_optimization_stage() == json.loads(path.read_text())["zero_optimization"]["stage"]


def test_activation_checkpointing_changes_memory_and_no_bit_of_the_loss(device, batches):
    def losses_and_peak(section: dict) -> tuple[list[float], int]:
        content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}, **section}
        train_engine = make.train_engine(device, content, student={"shared_blocks": 2, "dropout": 0.1})
        losses = totals(train_engine, batches[:3])
        return losses, max(accumulate(cpu_sizes(lambda: train_engine.step(batches[3:4]))))

    losses, peak = losses_and_peak({})
    checkpointed_losses, checkpointed_peak = losses_and_peak({"activation_checkpointing": {}})
    assert checkpointed_losses == losses and checkpointed_peak < peak


@pytest.mark.parametrize(
    "stage, accumulation, section", [(2, 1, {}), (3, 1, {"activation_checkpointing": {}}), (2, 2, {})]
)
def test_the_flops_of_a_step_are_those_of_its_model(monkeypatch, device, batches, stage, accumulation, section):
    """They are three times the forward pass: what checkpointing or gradient caching computes again does not count."""
    monkeypatch.setattr(meter_module, "peak_flops", lambda *_: 1e6)
    json = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation, **section}
    ours = {"student": {"shared_blocks": 0}, "loss": {"weights": {"cmli": 1.0}}}
    train_engine = make.train_engine(device, json, **ours)
    micro_batches = batches[:accumulation]
    meter = meter_module.Meter(train_engine)
    # PyTorch's counter does not know the attention of CPUs.
    with meter.step(micro_batches), sdpa_kernel(SDPBackend.MATH):
        train_engine.step(micro_batches)
    N = 16  # patches of 14 x 14 pixels
    H = 32
    D = 16
    B = len(batches[0].index)
    positions = sum(batch.input_ids.shape[1] for batch in micro_batches)

    def layer(L, width):  # queries, keys, values and output, the MLP, scores and their values
        return 4 * L * H * H + 2 * L * H * width + 2 * L * L * H

    images = accumulation * (N * 3 * 14**2 * H + layer(N + 1, 4 * H) + N * H * D)
    texts = sum(layer(batch.input_ids.shape[1], 2 * H) for batch in micro_batches) + positions * H * D
    assert meter.flops == 3 * 2 * B * (images + texts + accumulation * B * N * positions * D)
    meter.since = meter_module.time.monotonic() - 10  # however long the step has taken
    columns = meter.lap()
    assert columns["tflops"] == pytest.approx(meter.flops / 10 / 1e12, rel=0.2)
    assert columns["mfu"] == pytest.approx(1e6 * columns["tflops"], rel=0.001)


def test_a_contrastive_loss_ignores_duplicates_and_a_sigmoid_loss_adds_them_as_positives():
    columns = {"loss": 3.0, "loss/global_sigmoid": 1.0, "loss/cmli": 2.0, "added_positives": 2, "ignored_negatives": 2}
    assert name_means([3.0, 1.0, 2.0, 0.25], ("global_sigmoid", "cmli"), num_pairs=8) == columns


@pytest.mark.parametrize(
    ("section", "shown"),
    [({}, False), ({"comms_logger": {"enabled": False}}, False), ({"comms_logger": {"enabled": True}}, True)],
)
def test_deepspeeds_lines_are_shown_if_the_json_asks_for_one_of_its_logs(monkeypatch, section, shown):
    logger = logging.getLogger("DeepSpeed")
    for name, value in (("filters", [lambda record: False]), ("handlers", []), ("level", logging.WARNING)):
        monkeypatch.setattr(logger, name, value)
    show_log_of_deepspeed(DeepSpeedConfig(section))
    assert (not logger.filters, logger.level == logging.INFO) == (shown, shown)


@pytest.mark.parametrize("gpu, bf16, runs", [(False, True, "bf16"), (False, False, "fp32"), (True, False, "fp16")])
def test_fp16_falls_back_to_what_the_device_is_fast_in(monkeypatch, capsys, gpu, bf16, runs):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(plan, "bf16_is_fast", lambda: bf16)
    ds_config = engine.adapt_to_device(DeepSpeedConfig.of({**ZERO1, "fp16": {"enabled": True}}))
    assert ds_config.precision == runs
    out = capsys.readouterr().out
    assert (f"training in {runs} on this device (cpu), where" in out) == (not gpu)
    assert gpu or re.match(r"device: cpu, \S+ with(out)? bf16, \d+ threads\n", out)


@pytest.mark.parametrize("level", ["AVX2", "avx512_core", "AVX512_CORE_BF16", None])
def test_bf16_is_fast_where_the_processor_has_it_and_onednn_may_use_it(monkeypatch, level):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level) if level else monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", False)
    assert bf16_is_fast() == bool(FAST and level in ("AVX512_CORE_BF16", None))


@pytest.mark.parametrize(
    "device, reason, backend, kernels",
    [
        ("cuda", None, "triton", ""),
        ("cuda", "Failed to find C compiler.", "torch", "Triton does"),
        ("cpu", None, "auto", ""),
        ("cpu", "no compiler", "auto", "the C++ kernels do"),  # the op chooses
    ],
)
def test_the_backend_is_the_devices_and_a_line_says_why_its_kernels_do_not_run(
    monkeypatch, capsys, device, reason, backend, kernels
):
    tried = []
    monkeypatch.setattr(plan, "why_not_triton", lambda *sizes: tried.append(sizes) or reason)
    monkeypatch.setattr(plan, "why_not_cpu", lambda: reason)
    config = load_preset("tiny", {})
    chosen = engine.resolve_backend(config, DeepSpeedConfig.of(ZERO1), torch.device(device))
    assert chosen.loss.cmli_backend == backend
    # Images of 256 patches take the largest tiles.
    largest = (torch.device("cuda"), torch.float32, 256, config.data.context_length, config.student.embed_dim)
    assert tried == ([largest] if device == "cuda" else [])
    line = f"{kernels} not run, the all-pairs losses take PyTorch's operators, which are slower: {reason}\n"
    assert capsys.readouterr().out == ("" if reason is None else line)


@pytest.mark.parametrize(
    "backend, device, reason",
    [
        ("triton", "cpu", "there is no GPU"),
        ("cpu", "cuda", "the losses are computed on a GPU"),
        ("cpu", "cpu", "no compiler"),
        ("triton", "cuda", "no compiler"),
    ],
)
def test_kernels_that_do_not_run_are_refused(monkeypatch, backend, device, reason):
    monkeypatch.setattr(plan, "why_not_triton", lambda *_: "no compiler")
    monkeypatch.setattr(plan, "why_not_cpu", lambda: "no compiler")
    config = load_preset("tiny", {"loss": {"cmli_backend": backend}})
    with pytest.raises(UserError, match=rf"is '{backend}', which does not run \({reason}\): give 'auto' or 'torch'"):
        engine.resolve_backend(config, DeepSpeedConfig.of(ZERO1), torch.device(device))


def test_without_a_loss_over_tokens_no_backend_is_tried(monkeypatch):
    monkeypatch.setattr(plan, "why_not_cpu", lambda: pytest.fail("it is tried"))
    config = load_preset("tiny", {"loss": {"weights": {"global": 1.0}, "cmli_backend": "triton"}})
    assert engine.resolve_backend(config, DeepSpeedConfig.of(ZERO1), torch.device("cpu")) == config
