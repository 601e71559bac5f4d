"""Histories of random programs on the model, cut in the middle: their beginning is found again."""

import gzip
import json
import pickle
import re

import pytest
from click.testing import CliRunner

from ds_cmli.allocator import snapshot
from ds_cmli.allocator.beginning import LIVE
from ds_cmli.allocator.blocks import Settings
from ds_cmli.allocator.history import replay_history
from ds_cmli.common.errors import UserError
from profiling.replay import command
from tests.allocator.random_programs import M, recorded


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_every_address_is_found_again(first):
    ambiguous = 0
    for seed in range(first, first + 50):
        replayed = replay_history(recorded(seed), 0)
        assert replayed.exact, (seed, replayed)
        ambiguous += replayed.ambiguous
    assert ambiguous  # the programs are such that not everything can be told


@pytest.mark.parametrize(
    "settings",
    [
        Settings(max_split_size=30 * M),
        Settings(roundup_power2_divisions=8),
        Settings(expandable_segments=True),
        Settings(expandable_segments=True, roundup_power2_divisions=4),
    ],
)
def test_every_address_is_found_again_under_the_settings_of_the_recording(settings):
    for seed in range(50):
        replayed = replay_history(recorded(seed, settings=settings), 0)
        assert replayed.exact, (seed, replayed)
    assert replayed.segments_recorded


def test_another_allocators_choice_is_no_match():
    content = recorded(1)
    trace = content["device_traces"][0]
    last = next(entry for entry in reversed(trace) if entry["action"] == "alloc")
    twin = dict(last, addr=last["addr"] + 512)
    trace[trace.index(last)] = twin
    with pytest.raises(UserError, match=r"device 0: event .* contradicts what came after"):
        replay_history(content, 0)


def test_the_rest_behind_a_block_is_told_by_what_was_passed_over():
    """10.5 MiB went where 11 were free: behind the 9 MiB block, then, less than 10.5 of the 10.625 MiB were free."""
    base, eighth = 1 << 40, M // 8
    active = {"state": "active_allocated"}
    segments = [
        {"address": base, "total_size": 20 * M, "stream": 0, "blocks": [
            {"size": 11 * M, "requested_size": 84 * eighth, **active}, {"size": 9 * M, **active}
        ]},
        {"address": base + 64 * M, "total_size": 157 * eighth, "stream": 0, "blocks": [
            {"size": 157 * eighth, "state": "inactive"}
        ]},
    ]  # fmt: skip
    trace = [
        {"action": "alloc", "addr": base, "size": 84 * eighth, "stream": 0},
        {"action": "free_completed", "addr": base + 64 * M, "size": 9 * M, "stream": 0},
    ]
    replayed = replay_history({"segments": segments, "device_traces": [trace]}, 0)
    assert replayed.exact and replayed.allocations == 1 and replayed.ambiguous == 1
    assert replayed.allocated_peak == 20 * M + 9 * M + eighth + 512


def test_two_threads_can_take_segments_at_once():
    """PyTorch lets go of its lock while it waits for the device (release_lock_on_cudamalloc)."""
    first, second = 1 << 40, 1 << 41
    trace = [
        {"action": action, "addr": address, "size": 20 * M, "stream": 0}
        for action in ("segment_alloc", "alloc")
        for address in (second, first)
    ]
    trace[2:] = reversed(trace[2:])
    segments = [
        {"address": address, "total_size": 20 * M, "stream": 0, "blocks": [{"size": 20 * M, "state": LIVE[0]}]}
        for address in (first, second)
    ]
    replayed = replay_history({"segments": segments, "device_traces": [trace]}, 0)
    assert replayed.exact and replayed.reserved_peak_replayed == 40 * M


ORDINARY = {"address": 2**40, "total_size": 2 * M, "stream": 0, "blocks": [{"size": 2 * M, "state": "inactive"}]}


@pytest.mark.parametrize(
    "event, more, line",
    [
        ("segment_map", {}, "device 0: event 0 .segment_map of 2,097,152 B at 0x1. contradicts what came after"),
        (
            "segment_map",
            {"segments": [ORDINARY]},
            "device 0 was recorded with expandable segments and ordinary ones",
        ),
        ("dance", {}, "device 0 has events .'dance'., which the replay does not know"),
        (
            "oom",
            {"allocator_settings": {"roundup_power2_divisions": {"1": 4, "2": 8}}},
            "with roundup_power2_divisions",
        ),
        ("oom", {"allocator_settings": {"roundup_power2_divisions": {"1": 3}}}, "with roundup_power2_divisions"),
        (
            "oom",
            {"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "large_segment_size_mb:40"}},
            "which the replay knows only 20",
        ),
        ("alloc", {}, "device 0: event 0 .alloc of 2,097,152 B at 0x1. contradicts what came after"),
        ("free_completed", {}, "the block at 0x1 lies in no segment"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(tmp_path, event, more, line):
    content = {"segments": [], "device_traces": [[{"action": event, "addr": 1, "size": 2 * M, "stream": 0}]], **more}
    (tmp_path / "history.json").write_text(json.dumps(content))
    done = CliRunner().invoke(command, [str(tmp_path / "history.json"), "--json"])
    assert isinstance(done.exception, UserError) and re.search(line, str(done.exception)) and not done.output


def test_the_command_prints_an_object_per_device(tmp_path):
    content = recorded(3)
    other = recorded(4)
    for segment in other["segments"]:
        segment["device"] = 1
    both = {"segments": content["segments"] + other["segments"], "device_traces": [
        content["device_traces"][0], other["device_traces"][0], []
    ]}  # fmt: skip
    path = tmp_path / "history.json.gz"
    path.write_bytes(gzip.compress(json.dumps(both).encode()))
    lines = [json.loads(line) for line in CliRunner().invoke(command, [str(path), "--json"]).stdout.splitlines()]
    assert [line["device"] for line in lines] == [0, 1]
    for line in lines:
        assert line["allocations"] == line["at_recorded_address"] > 0
        assert line["segments_recorded"] == line["segments_replayed"]
        assert line["reserved_peak_recorded"] == line["reserved_peak_replayed"] >= line["allocated_peak"] > 0
        assert "ambiguous" in line
    assert "replayed at their recorded address" in CliRunner().invoke(command, [str(path)]).output


SEGMENT = {"address": M, "total_size": 2 * M, "stream": 0, "blocks": [{"size": 2 * M, "state": "inactive"}]}


ASLEEP = {**SEGMENT, "device": 0, "blocks": [{"size": 2 * M, "state": "asleep"}]}
EVENTS = [{"action": "snapshot"}]


class Hostile:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize(
    "content, why",
    [
        (pickle.dumps({"segments": Hostile()}), "it asks for .*open, and only plain containers"),
        (b"cos\nsystem\n(S'touch executed'\ntR.", "it asks for os.system"),
        (pickle.dumps({"segments": []}), "no lists 'segments' and 'device_traces'"),
        (
            pickle.dumps({"segments": [], "device_traces": [[{"action": "alloc", "addr": "x"}]]}),
            "is no event .* its 'addr' is 'x'",
        ),
        (json.dumps({"segments": [{**SEGMENT, "segment_pool_id": 3}], "device_traces": []}).encode(), "to no pool"),
        (json.dumps({"segments": [{**SEGMENT, "total_size": M}], "device_traces": []}).encode(), "do not fill it"),
        (
            json.dumps({"segments": [SEGMENT], "device_traces": [EVENTS, EVENTS]}).encode(),
            "is no segment: it has no 'device'",
        ),
        (json.dumps({"segments": [], "device_traces": [[{**EVENTS[0], "pool_id": 3}]]}).encode(), "to no pool"),
        (json.dumps({"segments": [ASLEEP], "device_traces": []}).encode(), "no block: its 'state' is 'asleep'"),
        (pickle.dumps([1])[:-3], "is no snapshot that can be read"),
        (b"[" * 100_000, "is no snapshot that can be read"),
        (b"\x1f\x8bnothing", "is no snapshot that can be read"),
        (b"", "is no snapshot that can be read"),
    ],
)
def test_only_plain_containers_are_read(tmp_path, monkeypatch, content, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot").write_bytes(content)
    with pytest.raises(UserError, match=why) as error:
        snapshot.read("snapshot")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


def test_what_other_tools_leave_out_or_write_differently_is_read(tmp_path):
    content = recorded(6)
    trace = [
        {"action": event["action"], "addr": f"{event['addr']:#x}", "size": event["size"], "stream": event["stream"]}
        for event in content["device_traces"][0]
    ]
    trace[3:3] = [{"action": "snapshot"}, {"action": "oom", "size": 5, "device_free": 7}]
    segments = [
        {
            "address": f"{segment['address']:#X}",
            "total_size": segment["total_size"],
            "stream": segment["stream"],
            "segment_pool_id": segment["segment_pool_id"],
            "blocks": [{"size": block["size"], "state": block["state"]} for block in segment["blocks"]],
        }
        for segment in content["segments"]
    ]
    (tmp_path / "stripped.json").write_text(json.dumps({"segments": segments, "device_traces": [trace, []]}))
    replayed = replay_history(snapshot.read(tmp_path / "stripped.json"), 0)
    assert replayed.exact and replayed.allocations and replayed.out_of_memory > 0


def test_a_snapshot_of_ours_is_read(tmp_path):
    content = recorded(5)
    (tmp_path / "ours.pickle").write_bytes(pickle.dumps(content))
    assert snapshot.read(tmp_path / "ours.pickle") == content
    with pytest.raises(UserError, match="cannot be read: No such file"):
        snapshot.read(tmp_path / "missing")
