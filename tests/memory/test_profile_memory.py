"""`--profile-memory`: what a training's first steps take, and what is read off CUDA's counters and the driver's."""

import json
import types

import pytest
import torch

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group as distributed
from ds_cmli.memory import profile, step_memory
from ds_cmli.memory.inputs import longest_batch, without_weights
from ds_cmli.memory.profile import Profiles
from ds_cmli.memory.report import CATEGORIES, PHASES, summarise
from ds_cmli.memory_model.caching_allocator import Event


def test_the_first_steps_of_a_training(tmp_path, alone):
    """On a CPU: what tensors hold. The same sizes are known by hand."""
    config, written = load_preset("tiny", {}), []
    json_ = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}}
    ds_config = DeepSpeedConfig.of(json_).filled(config.optim, 1, 20)
    train_engine = engine.build(config, ds_config, without_weights(config)[1], 20, distributed.init())
    try:
        with profile.profiling_memory(2, train_engine, config, ds_config, tmp_path) as after_step:
            for _ in range(4):
                written.append((tmp_path / profile.FILE).exists())
                train_engine(longest_batch(config, 8, 16))
                after_step()
    finally:
        distributed.shutdown()
    assert written == [False, False, True, True]  # after the second step, not at the end
    assert [path.name for path in tmp_path.iterdir()] == [profile.FILE]
    content = json.loads((tmp_path / profile.FILE).read_text())["measurement"]
    assert content["source"] == "measured: CPU" and content["setting"]["steps"] == 2
    assert list(content["categories"]) == list(CATEGORIES) and list(content["phases"]) == list(PHASES)
    assert sum(content["categories"].values()) == content["totals"]["requested"]
    count = sum(p.numel() for p in train_engine.objective.parameters() if p.requires_grad)
    assert content["categories"]["optimizer states"] == pytest.approx(8 * count, rel=0.01)
    assert content["categories"]["activations student"] > 100_000


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
    assert profile.differences(predicted, measured) == {
        "totals": {"requested": {"bytes": -10, "ratio": 0.9}},
        "phases": {"init": {"bytes": 4}},
        "categories": {"data": {"bytes": 0, "ratio": 1.0}},
    }


def test_the_allocators_total_over_the_recorders_categories():
    events = [Event(1, 100, "parameters", "init"), Event(2, 30, "temporaries", "forward")]
    totals = {"requested": 142, "allocated": 1024, "reserved": 2 << 20, "device": 300 << 20}
    report = summarise(events, {"preset": "tiny"}, "measured: a GPU")
    report.take(totals)
    assert report.categories["temporaries"] == 42  # 30, and 12 that only the allocator saw
    assert sum(report.categories.values()) == 142
    assert (report.totals, report.phases["init"]) == (totals, 100)


def test_a_gpu_that_is_not_listed_is_measured_and_not_predicted(capsys):
    assert profile._predicted(None, "NVIDIA L40") is None
    assert "not predicted: this GPU, 'NVIDIA L40', is not listed: give its memory" in capsys.readouterr().out


def test_what_cudas_counters_say(monkeypatch):
    counters = {"requested_bytes.all.peak": 10, "allocated_bytes.all.peak": 512, "reserved_bytes.all.peak": 40 << 20}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {**counters, "reserved_bytes.all.current": 30 << 20})
    monkeypatch.setattr(step_memory, "gpu_bytes", lambda device: 330 << 20)
    result = step_memory.statistics(torch.device("cuda"))
    # 300 MiB beside the allocator's, and what it had reserved at its peak.
    assert result == {"requested": 10, "allocated": 512, "reserved": 40 << 20, "device": 340 << 20}
    monkeypatch.setattr(step_memory, "gpu_bytes", lambda device: None)
    assert "device" not in step_memory.statistics(torch.device("cuda"))


def test_what_the_driver_counts_for_this_process(monkeypatch):
    assert step_memory.own_bytes({7: 100, 8: 200}, 8) == 200
    assert step_memory.own_bytes({7: 100}, 8) == 100  # a container's other numbers
    assert step_memory.own_bytes({7: 100, 9: 200}, 8) is None
    assert step_memory.own_bytes({}, 8) is None

    import pynvml

    process = types.SimpleNamespace(pid=7, usedGpuMemory=123)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-abc": 1}.__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", {1: [process]}.__getitem__)
    assert step_memory.gpu_bytes(torch.device("cuda")) == 123
