"""Measured steps beside predicted ones on the CPU, shares of larger worlds, and what is read off CUDA's counters."""

import contextlib
import json
import types

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group as distributed
from ds_cmli.memory import cpu_events, measure
from ds_cmli.memory.fake import process_group
from ds_cmli.memory.inputs import longest_batch, without_weights
from ds_cmli.memory.profiler import Profiles
from ds_cmli.memory.report import CATEGORIES, PHASES, summarise
from ds_cmli.memory_model.blocks import Event
from profiling.memory import measure_cpu

pytestmark = pytest.mark.usefixtures("one_predictor")
FP32 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}}
BF16 = {**FP32, "bf16": {"enabled": True}}


def test_events_recorded_in_parts_are_those_of_one_piece():
    held = []

    def work(move):
        for number in range(5):
            held.append(torch.empty(1000 * (number + 1)))
            move()
            held[-1].clone()
            if number % 2:
                held.pop(0)  # from an earlier part
        held.clear()

    with measure_cpu.recording_in_parts() as (entry, move):
        work(move)
    sizes = [size for _, size in entry]
    assert sizes == cpu_events.sizes(lambda: work(lambda: None))
    assert sizes[:3] == [4000, 4000, -4000] and sum(sizes) == 0 and len(sizes) == 20


@pytest.mark.slow
def test_rank_0s_real_share_falls_with_the_ranks():
    shares = {}
    for ranks in (1, 2, 8):
        report = measure_cpu.measure(load_preset("tiny", {}), BF16, ranks)
        assert sum(report.categories.values()) == report.totals["requested"]
        shares[ranks] = (report.categories["optimizer states"], report.categories["master weights"])
    # Each of the two groups of parameters is padded to a multiple of 2 x ranks, and has a count of steps.
    objective, _ = engine.build_models(*without_weights(load_preset("tiny", {})))
    groups = [sum(p.numel() for p in group["params"]) for group in engine.parameter_groups(objective, 0.0)]
    for ranks, (states, master) in shares.items():
        padded = sum(-(-n // (2 * ranks)) * 2 * ranks for n in groups)
        assert master == 4 * padded / ranks
        assert states == 2 * master + 8
    print({ranks: f"{states:,} B" for ranks, (states, _) in shares.items()})


@pytest.fixture
def trained(tmp_path):
    """A training of four steps, its first two profiled: (content of memory.json, folder, steps before it was there).

    Its texts are shorter than they could be, as those of the prediction then have to be.
    """
    config, written = load_preset("tiny", {}), []
    ds_config = DeepSpeedConfig.of(FP32).filled(config.optim, 1, 20)
    with process_group(1):
        train_engine = engine.build(config, ds_config, without_weights(config)[1], 20, torch.device("cpu"))
        with measure.profiling_memory(2, train_engine, config, ds_config, tmp_path) as after_step:
            for _ in range(4):
                written.append((tmp_path / measure.FILE).exists())
                train_engine(longest_batch(config, 8, 16))
                after_step()
    return json.loads((tmp_path / measure.FILE).read_text()), tmp_path, written


def test_the_first_steps_of_a_training_beside_the_prediction(trained):
    content, folder, written = trained
    assert written == [False, False, True, True]  # after the second step, not at the end
    assert [path.name for path in folder.iterdir()] == [measure.FILE]
    measured = content["measurement"]
    assert measured["source"] == "measured: CPU allocator"
    assert list(measured["categories"]) == list(CATEGORIES) and list(measured["phases"]) == list(PHASES)
    assert sum(measured["categories"].values()) == measured["totals"]["requested"]
    assert measured["categories"]["data"] > 8 * 3 * 56 * 56  # the images, one byte a value
    # The same batch on real tensors: parameters and optimizer states to the byte, the peak within 0.5 %.
    for name in ("teacher", "optimizer states", "master weights"):
        assert content["differences"]["categories"][name]["bytes"] == 0
    assert content["differences"]["totals"]["requested"]["ratio"] == pytest.approx(1, abs=0.005)


def test_the_bucket_that_zero_3_made_before_is_measured(tmp_path):
    config = load_preset("tiny", {})
    ds_config = DeepSpeedConfig.of({"zero_optimization": {"stage": 3, "reduce_bucket_size": 100_000}})
    ds_config = ds_config.filled(config.optim, 1, 20)
    with process_group(1):
        train_engine = engine.build(config, ds_config, without_weights(config)[1], 20, torch.device("cpu"))
        with measure.profiling_memory(1, train_engine, config, ds_config, tmp_path) as after_step:
            train_engine(longest_batch(config, 8))
            after_step()
    content = json.loads((tmp_path / measure.FILE).read_text())
    assert content["measurement"]["categories"]["ZeRO buckets"] == 4 * 100_000
    assert content["differences"]["totals"]["requested"]["ratio"] == pytest.approx(1, abs=0.005)


def test_texts_without_padding_need_no_mask(tmp_path, monkeypatch):
    # What a ZeRO-3 engine leaves behind in a process keeps 16,384 B less of activations: it must not count here.
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    config = load_preset("tiny", {})
    ds_config = DeepSpeedConfig.of({"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}})
    ds_config = ds_config.filled(config.optim, 1, 20)
    batch = longest_batch(config, 8)
    batch.attention_mask[:] = True
    batch.token_mask[:, 1:-1] = True
    with process_group(1):
        train_engine = engine.build(config, ds_config, without_weights(config)[1], 20, torch.device("cpu"))
        with measure.profiling_memory(2, train_engine, config, ds_config, tmp_path) as after_step:
            for _ in range(2):
                train_engine(batch)
                after_step()
    content = json.loads((tmp_path / measure.FILE).read_text())
    # With the masks of a batch that has padding, 65,536 B more of activations would be predicted.
    assert abs(content["differences"]["categories"]["activations student"]["bytes"]) < 4096
    # The batch was made before the profiler began.
    assert content["measurement"]["categories"]["temporaries"] > 0
    assert content["differences"]["totals"]["requested"]["ratio"] == pytest.approx(1, abs=0.0001)


def test_nothing_asked_nothing_measured(tmp_path):
    with measure.profiling_memory(None, None, None, {}, tmp_path) as after_step:
        after_step()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [0, -1, 15])
def test_steps_that_are_not_taken_are_named(steps):
    with pytest.raises(UserError, match=f"--profile-memory is {steps}: give 1 to 14 steps"):
        Profiles(memory=steps).left(14, 10, print)


def test_one_profiler_at_a_time():
    for one in (Profiles(memory=2), Profiles(trace="1:2"), Profiles()):
        assert one.left(4, 0, print) == one
    with pytest.raises(UserError, match="--profile-memory is 2 and --profile is '1:2': both"):
        Profiles(trace="1:2", memory=2).left(4, 0, print)
    with pytest.raises(UserError, match="--profile is '1:5': give some of the steps 1 to 4"):
        Profiles(trace="1:5").left(4, 0, print)


def test_both_profilers_are_told_of_each_step(tmp_path):
    train_engine = engine.TrainEngine(None, None, None, torch.device("cpu"), torch.float32, [])
    with Profiles().around(train_engine, None, {}, tmp_path, 0) as after_step:
        after_step()
    assert not list(tmp_path.iterdir())
    with Profiles(trace="12:12").around(train_engine, None, {}, tmp_path, 10) as after_step:
        for _ in range(3):
            torch.ones(3).add(1)
            after_step()
    assert len(list((tmp_path / "profile").glob("rank0.*.json"))) == 1


def test_differences_of_what_both_have():
    predicted = {"totals": {"requested": 90, "device": 7}, "phases": {"init": 4}, "categories": {"data": 3}}
    measured = {"totals": {"requested": 100}, "phases": {"init": 0}, "categories": {"data": 3}}
    assert measure.differences(predicted, measured) == {
        "totals": {"requested": {"bytes": -10, "ratio": 0.9}},
        "phases": {"init": {"bytes": 4}},
        "categories": {"data": {"bytes": 0, "ratio": 1.0}},
    }


def test_the_allocators_total_over_the_trackers_categories():
    events = [Event(1, 100, "parameters", "init"), Event(2, 30, "temporaries", "forward")]
    totals = {"requested": 142, "allocated": 1024, "reserved": 2 << 20, "device": 300 << 20}
    report = measure.combined(summarise(events, {}, ""), totals, {"preset": "tiny"}, "measured: a GPU")
    assert report.categories["temporaries"] == 42  # 30, and 12 that only the allocator saw
    assert sum(report.categories.values()) == 142
    assert (report.totals, report.phases["init"]) == (totals, 100)


def test_a_prediction_is_for_the_gpu_that_was_measured(monkeypatch, capsys):
    asked = []
    predictor = types.SimpleNamespace(ask=lambda request: asked.append(request.gpu))
    monkeypatch.setattr(measure.predict_subprocess, "Predictor", lambda _: contextlib.nullcontext(predictor))
    request = measure.predict_subprocess.Request(None, None, 1)
    for name in ("NVIDIA H100 NVL", "Tesla T4", ""):  # "": a CPU
        measure._predicted(request, name)
    assert asked == ["H100 NVL 94GB", "T4 16GB", ""]
    answer = measure._predicted(request, "NVIDIA L40")
    assert (answer.report, len(asked)) == (None, 3)
    assert answer.failed.startswith("this GPU, 'NVIDIA L40', is not listed: give its memory and compute capability")
    assert answer.failed in capsys.readouterr().out


def test_what_cudas_counters_say(monkeypatch):
    counters = {"requested_bytes.all.peak": 10, "allocated_bytes.all.peak": 512, "reserved_bytes.all.peak": 40 << 20}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {**counters, "reserved_bytes.all.current": 30 << 20})
    monkeypatch.setattr(measure, "gpu_bytes", lambda device: 330 << 20)
    result = measure.statistics(torch.device("cuda"))
    # 300 MiB beside the allocator's, and what it had reserved at its peak.
    assert result == {"requested": 10, "allocated": 512, "reserved": 40 << 20, "device": 340 << 20}
    monkeypatch.setattr(measure, "gpu_bytes", lambda device: None)
    assert "device" not in measure.statistics(torch.device("cuda"))


def test_what_the_driver_counts_for_this_process(monkeypatch):
    assert measure.own_bytes({7: 100, 8: 200}, 8) == 200
    assert measure.own_bytes({7: 100}, 8) == 100  # a container's other numbers
    assert measure.own_bytes({7: 100, 9: 200}, 8) is None
    assert measure.own_bytes({}, 8) is None

    import pynvml

    process = types.SimpleNamespace(pid=7, usedGpuMemory=123)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-abc": 1}.__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", {1: [process]}.__getitem__)
    assert measure.gpu_bytes(torch.device("cuda")) == 123
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    if not torch.cuda.is_available():
        assert measure.gpu_bytes(torch.device("cuda")) is None  # no driver, no error


def test_no_process_group_remains():
    with process_group(3):
        assert distributed.world_size() == 3
    assert distributed.world_size() == 1
