"""Predictions by the command and by `Step`: bytes by hand, what a setting changes, and that nothing stays behind."""

import copy
import json
import os
import pickle
import re
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.cuda import _memory_viz as viz
from torch.utils.checkpoint import DefaultDeviceType
from transformers import AutoConfig

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data import assets
from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import UserError
from ds_cmli.memory.command import command, fit_sentence, parse_memory, sentence, triton_line
from ds_cmli.memory.inputs import longest_batch, without_weights
from ds_cmli.memory.largest_batch import MAX_BATCH, LargestBatch, largest_that_fits, trials_left
from ds_cmli.memory.progress import Progress
from ds_cmli.memory.report import CATEGORIES, PHASES, Report, show
from ds_cmli.memory.step_memory import Step, predicted, predicted_worst
from ds_cmli.memory_model import gpus
from tests import make

ZERO = {"stage": 2, "reduce_bucket_size": 100_000}
ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "bf16": {"enabled": True}}
LOSSES = {"loss.weights": '{"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}'}
GLOBAL = {"loss.weights": '{"global": 1.0}'}
A100 = gpus.find("A100 80GB")


def by_command(folder: Path, name: str, options: dict | None = None, settings: dict | None = None) -> tuple[int, dict]:
    """Return the exit code and the report of ds-cmli-memory."""
    ds_config = make.json_file(folder / f"{name}.ds.json", {"zero_optimization": ZERO, **ADAM})
    words = {"--deepspeed_config": ds_config, "--json": folder / f"{name}.json", **(options or {})}
    code = command.main(make.small(words, settings), standalone_mode=False)
    return code, json.loads((folder / f"{name}.json").read_text())


def test_what_stays_through_a_step_is_counted_once_and_shared_by_ranks(tmp_path):
    """bf16 weights of 2 B each; the fp32 copy and two moments, 12 B, of which two ranks have a half each."""
    files = {"--plot": tmp_path / "memory.png", "--snapshot": tmp_path / "memory.pickle"}
    _, report = by_command(tmp_path, "two", {**files, "--world-size": 2}, LOSSES)
    objective, teacher = make.models(loss={"weights": {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}})
    num_weights = sum(p.numel() for p in objective.parameters())
    num_teacher_weights = sum(p.numel() for p in teacher.parameters())
    categories = report["categories"]
    totals = report["totals"]
    assert categories["parameters"] == pytest.approx(2 * num_weights, rel=0.05)
    assert categories["master weights"] == pytest.approx(4 * num_weights / 2, rel=0.02)
    assert categories["optimizer states"] == pytest.approx(8 * num_weights / 2, rel=0.02)
    assert categories["teacher"] == pytest.approx(2 * num_teacher_weights, rel=0.1)
    assert sum(categories.values()) == totals["requested"] == max(report["phases"].values())
    assert totals["requested"] < totals["allocated"] <= totals["reserved"] < totals["device"]
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
    read_by_pytorchs_tools(pickle.loads(files["--snapshot"].read_bytes()), totals)


def read_by_pytorchs_tools(snapshot: dict, totals: dict[str, int]) -> None:
    """Assert that the state and history of a replay agree, and that PyTorch's tools draw them."""
    segments = snapshot["segments"]
    for segment in segments:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    live = peak = 0
    for entry in snapshot["device_traces"][0]:
        live += {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * entry["size"]
        peak = max(peak, live)
    assert peak == totals["requested"] and live == sum(segment["requested_size"] for segment in segments)
    stacks = viz.segments(snapshot, format_flamegraph=str)
    assert re.search(r"active_allocated;.*init.*master weights.*aten\.", stacks)
    assert "cudaMalloc(" in viz.trace(snapshot) and "Active Memory Timeline" in viz.trace_plot(snapshot)


@pytest.mark.parametrize("room", [99, 100, 1000, 12_345, 10**7, 10**9])
def test_the_largest_that_fits_is_found_by_few_tries(room):
    """Needs jump, as segments of the allocator do, and turn a little back, as when it begins to free."""
    tried = []

    def needs(n: int) -> int:
        tried.append(n)
        return 100 + 7 * n // 20 * 20 - (n > 500) * 9

    n = largest_that_fits(needs, room)
    assert len(tried) <= 12 and (n == 0 or needs(n) <= room)
    larger = n + n // 200 + 1
    assert larger > MAX_BATCH or needs(larger) > room


def test_fit_reports_what_fits_and_what_does_not_fit_has_exit_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ds_cmli.memory.largest_batch.largest_that_fits", partial(largest_that_fits, max_batch=2))
    gpu = {"--gpu-memory": "515MB", "--sm": "8.0"}
    code, fitting = by_command(tmp_path, "found", {**gpu, "--fit": "515MB"}, GLOBAL)
    assert code == 0 and fitting["setting"]["micro_batch"] == 2 and fitting["totals"]["device"] <= 515_000_000
    printed = capsys.readouterr()
    assert printed.out.startswith("fits in 0.52 GB with micro-batch 2\n")
    assert "at the peak" in printed.out and "tried, micro-batch: on the device: 1:" in printed.out
    assert printed.err.startswith("trial 1: micro-batch 1\ntrial 2: micro-batch 2, 1 fits; about ")
    code, above = by_command(tmp_path, "above", {**gpu, "--micro-batch": 256}, GLOBAL)
    printed = capsys.readouterr()
    assert "does not fit on the GPU of 515MB" in printed.out and "peak of phase" in printed.out
    assert printed.err == "trial 1 of 1: a step of one rank, on tensors without data\n"
    assert code == 3 and above["totals"]["device"] > 515_000_000
    assert above["totals"]["device"] - above["totals"]["reserved"] == A100.context_bytes, "a single rank needs no NCCL"
    code, none = by_command(tmp_path, "none", {**gpu, "--fit": "300MB"}, GLOBAL)
    assert code == 3 and none["setting"]["micro_batch"] == 1
    assert fitting["categories"]["parameters"] == above["categories"]["parameters"]
    assert above["categories"]["teacher"] == 0  # the global loss alone needs none
    assert above["categories"]["activations student"] > 256 * 100_000


def config(losses=("global", "cmli", "target_cmli"), micro_batch=8, **sections):
    optim = {"micro_batch": micro_batch, **sections.pop("optim", {})}
    return make.config(loss={"weights": dict.fromkeys(losses, 1.0)}, optim=optim, **sections)


def ds_json(stage=2, **zero) -> dict:
    return {**ADAM, "zero_optimization": {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 100_000, **zero}}


@pytest.fixture(scope="module")
def usual():
    """The prediction of rank 0 of two at stage 2."""
    return predicted(Step(config(("global",)), ds_json(), 2), A100)


def test_an_offloaded_optimizer_takes_nothing_from_the_device(usual):
    offloaded = ds_json(offload_optimizer={"device": "cpu", "pin_memory": True})
    offloaded["zero_force_ds_cpu_optimizer"] = False
    report = predicted(Step(config(("global",)), offloaded, 2), A100)
    assert report.categories["optimizer states"] == report.categories["master weights"] == 0
    optimizer_bytes = usual.categories["optimizer states"] + usual.categories["master weights"]
    assert report.totals["requested"] < usual.totals["requested"] - 0.8 * optimizer_bytes


def test_parameters_are_flattened_on_the_host_where_the_device_has_no_room_for_both(usual):
    """DeepSpeed does so at stages 1 and 2. Both copies then never lie on the device, and the rest stays as it was."""

    def most_before_master_weights(events) -> int:
        first = next(place for place, event in enumerate(events) if event.category == "master weights")
        return max(accumulate(event.bytes for event in events[:first]))

    without_room = replace(A100, total_bytes=0)
    little = predicted(Step(config(("global",)), ds_json(), 2), without_room)
    assert most_before_master_weights(little.events) < most_before_master_weights(usual.events)
    assert little.categories == usual.categories


def test_cached_micro_batches_hold_features_and_a_gpu_without_the_kernels_takes_the_fallback(monkeypatch):
    # A step of this process on the CPU lets PyTorch remember that as the device to draw on.
    monkeypatch.setattr(DefaultDeviceType, "_default_device_type", "cpu")
    json_ = {**ds_json(1), "gradient_accumulation_steps": 2}
    cached = predicted(Step(config(("cmli",), optim={"negatives": "global_batch"}), json_, 2), A100)
    assert cached.categories["cached features"] > 0 and cached.setting["cmli_backend"] == "triton"
    json_ |= {"fp16": {"enabled": True}, "bf16": {"enabled": False}}
    fallback = predicted(Step(config(("cmli",), optim={"negatives": "micro_batch"}), json_, 2), gpus.find("T4"))
    assert fallback.categories["cached features"] == 0 and fallback.setting["cmli_backend"] == "torch"


def test_zero_3_gathers_parameters_and_leaves_nothing_for_the_next_prediction(usual):
    linear = F.linear
    report = predicted(Step(config(("global",)), ds_json(3), 2), A100)
    assert F.linear is linear
    assert {event.stream for event in report.events if event.bytes > 0} > {0}
    assert report.totals["requested"] == max(report.phases.values())
    # Linear layers keep activations as before, although a function of DeepSpeed's allocates it.
    assert report.categories["activations student"] >= usual.categories["activations student"]


def test_a_deterministic_run_is_predicted_with_the_partial_gradients_of_attention_that_it_keeps(usual):
    """Flash attention's backward then has a gradient of the queries for each block of threads that works on a head."""
    deterministic = config(("global",), run={"deterministic": True})
    report = predicted(Step(deterministic, ds_json(), 2), A100)

    def largest_inside_attention(events) -> int:
        op = "aten._scaled_dot_product_flash_attention_backward.default, inside"
        return max(event.bytes for event in events if event.op == op)

    # 8 pairs and 2 heads: 108 multiprocessors / 16, rounded up.
    assert largest_inside_attention(report.events) == 7 * largest_inside_attention(usual.events)
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_each_group_of_ranks_is_a_communicator_on_the_device(usual):
    """All ranks form one group, and DeepSpeed clones it."""
    bytes_outside = usual.totals["device"] - usual.totals["reserved"]
    assert bytes_outside == A100.context_bytes + 2 * A100.nccl_bytes


def test_packaged_weights_are_predicted_with_their_own_sizes():
    chosen, words = without_weights(load_preset("demo", {}))
    packaged = AutoConfig.from_pretrained(assets.fetch("minilm")).to_dict()
    assert packaged["vocab_size"] == words and packaged["model_type"] == chosen.student.text_model
    assert chosen.student.text_overrides and chosen.student.text_overrides.items() <= packaged.items()


@pytest.mark.slow
def test_a_training_has_the_same_bits_before_and_after_predictions_that_end_well_or_badly(alone):
    json_ = {**ds_json(), "activation_checkpointing": {}}
    resolved = DeepSpeedConfig.of(json_).filled(config(), 1, 10)

    def train() -> list[float]:
        train_engine = engine.build(config(), copy.deepcopy(resolved), 300, 10, distributed.init())
        losses = [train_engine.step([longest_batch(config(), 8)])[0].total.item() for _ in range(3)]
        distributed.shutdown()
        return losses

    losses = train()
    apply = nn.Module._apply
    hook = sys.excepthook
    generator = torch.get_rng_state()
    first, eight_ranks, again = (predicted(Step(config(), json_, world), A100).totals for world in (1, 8, 1))
    assert first["requested"] == again["requested"] != eight_ranks["requested"]
    with pytest.raises(UserError, match="no_such_model"):
        predicted(Step(config(student={"image_model": "no_such_model"}), json_, 2), A100)
    assert nn.Module._apply is apply and sys.excepthook is hook and not torch.cuda.is_available()
    assert torch.equal(torch.get_rng_state(), generator) and type(torch.empty(1)) is torch.Tensor
    assert train() == losses


@pytest.mark.slow
def test_the_rank_that_needs_the_most_is_predicted():
    step = Step(config(("global",), 1), ds_json(), 3)
    bytes_by_rank = [predicted(replace(step, rank=rank), A100).totals["requested"] for rank in range(3)]
    worst = predicted_worst(step, A100)
    assert worst.totals["requested"] == max(bytes_by_rank) > min(bytes_by_rank)
    assert bytes_by_rank[worst.setting["rank"]] == max(bytes_by_rank)


def report(stage: int = 2, source: str = "predicted") -> Report:
    setting = {"world_size": 8, "rank": 0, "micro_batch": 64, "zero_stage": stage, "checkpointing": stage == 2}
    setting |= {"losses": ["global", "cmli"]}
    totals = {"requested": 20 * 10**9, "reserved": 22 * 10**9, "device": 24 * 10**9}
    return Report(setting, source, dict.fromkeys(CATEGORIES, 0), dict.fromkeys(PHASES, 0), totals)


def test_what_zero_3_may_reserve_beyond_its_prediction_is_in_every_answer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def shown(printed: Report) -> str:
        show(printed)
        return capsys.readouterr().out

    margin = "with ZeRO-3 up to 5% more"
    largest_batch = LargestBatch(64, report(stage=3), {64: 24 * 10**9, 65: 26 * 10**9})
    answer = "fits in 25.00 GB with micro-batch 64; 65 needs 26.00 GB"
    assert fit_sentence(largest_batch, 25 * 10**9) == f"{answer}; {margin} may be reserved"
    over = "micro-batch 64 with ZeRO-3 over 8 GPUs"
    assert f"{over} needs 24.00 GB ({margin}) and fits on the A100 80GB" in sentence(report(stage=3), A100)
    assert f"taken from the device by the allocator; {margin}" in shown(report(stage=3))
    assert "checkpointing on, losses global + cmli" in shown(report()) and "20,000,000,000" in shown(report())
    assert "checkpointing off, " in shown(report(stage=3))
    for without_margin in (report(stage=2), report(stage=3, source="measured: NVIDIA A100")):
        assert margin not in sentence(without_margin, A100) and margin not in shown(without_margin)
        assert fit_sentence(LargestBatch(64, without_margin, largest_batch.tried), 25 * 10**9) == answer


def test_a_blackwell_gpu_is_predicted_with_a_line_on_this_machines_triton():
    triton = version("triton")
    assert triton_line(gpus.find("B200")).startswith(f"B200 180GB: predicted with this machine's Triton {triton}: ")


def test_progress_without_a_terminal_is_a_line_before_each_trial(capsys):
    search = Progress()
    search.begin("micro-batch 1", 8)
    search.begin("micro-batch 64", 7)
    two_trials = Progress(num_trials=2)
    two_trials.begin("E1 ours")
    two_trials.end()
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "trial 1: micro-batch 1"
    assert re.fullmatch(r"trial 2: micro-batch 64; about \d+ s left", second)
    assert third == "trial 1 of 2: E1 ours"
    tried = ({}, {1: 10}, {1: 10, 64: 50, 128: 200}, {99: 99, 100: 101})
    assert [trials_left(sizes, 100) for sizes in tried] == [8, 7, 6, 1]


def test_sizes_as_they_are_typed():
    assert parse_memory("24GB") == (24 * 10**9, None)
    assert parse_memory("1.5 GiB") == (3 * 2**29, None)
    assert parse_memory("RTX 3090")[1] == "RTX 3090 24GB"
