"""Questions to hand-made histories whose answers follow from PyTorch's rules."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from ds_cmli.allocator.allocator import CachingAllocator, Replay
from ds_cmli.allocator.beginning import State, beginning
from ds_cmli.allocator.blocks import Settings, rounded
from ds_cmli.allocator.history import replay_history
from ds_cmli.allocator.snapshot import build
from ds_cmli.allocator.what_if import what_if
from ds_cmli.common.errors import UserError
from profiling.replay import command

K, M = 1 << 10, 1 << 20


def trace_of(*steps: int) -> list[dict[str, Any]]:
    """Positive: allocate so many bytes; -n: free the n-th allocation, counted from 1; 0: empty the cache."""
    allocator, blocks = CachingAllocator(), []
    for step in steps:
        if step > 0:
            blocks.append(allocator.malloc(step))
        elif step < 0:
            allocator.free(blocks[-step - 1])
        else:
            allocator.empty_cache()
    return build(Replay(0, 0, 0, [], [], allocator.actions))["device_traces"][0]


def asked(*steps: int, limit: int | None = None, **settings: Any):
    return what_if(State(), trace_of(*steps), limit, Settings(**settings))


def test_a_limit_is_met_by_what_is_free_or_said_with_what_is_missing():
    steps = (30 * M, -1, 40 * M)
    assert (asked(*steps).fits, asked(*steps).reserved_peak) == (True, 70 * M)
    tight = asked(*steps, limit=40 * M)  # the first segment goes back
    assert (tight.fits, tight.reserved_peak) == (True, 40 * M)
    short = asked(30 * M, 12 * M, 40 * M, -1, limit=70 * M)
    assert (short.fits, short.failed_at, short.failed_request) == (False, 2, 40 * M)
    assert short.too_much == 30 * M + 12 * M + 40 * M - 70 * M
    rounding = asked(30 * M, 5 * M, limit=49 * M)  # 5 MiB take a segment of 20
    assert (rounding.fits, rounding.too_much) == (False, M)


def test_what_the_program_gives_back_is_given_back():
    assert asked(30 * M, -1, 0, 40 * M).reserved_peak == 40 * M
    assert asked(30 * M, -1, 40 * M).reserved_peak == 70 * M


def test_blocks_from_the_split_size_on_stay_whole():
    # 60 MiB free: a request of 10 MiB splits it by default, and takes a segment of its own where 60 is too large.
    steps = (60 * M, -1, 10 * M, 60 * M)
    assert asked(*steps).reserved_peak == 120 * M
    assert asked(*steps, max_split_size=32 * M).reserved_peak == 70 * M
    # Of the large ones, a request gets one less than 20 MiB larger than itself, and all of it.
    assert asked(60 * M, -1, 41 * M, max_split_size=32 * M).reserved_peak == 60 * M
    assert asked(60 * M, -1, 41 * M, max_split_size=32 * M).allocated_peak == 60 * M
    assert asked(60 * M, -1, 40 * M, max_split_size=32 * M).reserved_peak == 100 * M
    # Where there is no room, the large ones go back first: here the one that is enough, not the other.
    freed = asked(60 * M, 40 * M, -1, -2, 39 * M, 10 * M, limit=110 * M, max_split_size=32 * M)
    assert (freed.fits, freed.reserved_peak) == (True, 110 * M)


def test_requests_are_rounded_up_to_parts_of_a_power_of_two():
    # As PyTorch's notes say: of 1200 with 4 divisions between 1024 and 2048, 1280; in units that are large enough here.
    assert rounded(1200 * K, 4) == 1280 * K
    assert [rounded(n * K, 4) for n in (1024, 1025, 1281, 1793, 2048)] == [
        1024 * K,
        1280 * K,
        1536 * K,
        2048 * K,
        2048 * K,
    ]
    assert rounded(513, 4) == 1024 and rounded(2048, 4) == 2048 and rounded(2049, 4) == 2560
    # 33, then 35 MiB: 40 each with 8 divisions of 32 to 64, so the second finds the first's place.
    steps = (33 * M, -1, 35 * M)
    assert asked(*steps).reserved_peak == (34 + 36) * M
    assert asked(*steps, roundup_power2_divisions=4).reserved_peak == 40 * M
    assert asked(*steps, roundup_power2_divisions=8).allocated_peak == 36 * M


def test_old_segments_are_collected_from_the_threshold_on():
    # 30 MiB are free for two requests' time, 24 MiB for none, when 40 MiB are asked for with 88 MiB reserved.
    steps = (30 * M, 24 * M, -1, 33 * M, -2, 40 * M)
    assert asked(*steps, limit=200 * M).reserved_peak == (30 + 24 + 34 + 40) * M
    # 88 of 200 are above 0.3: what is at least as old as the mean goes; that is enough, and the other stays.
    assert asked(*steps, limit=200 * M, garbage_collection_threshold=0.3).reserved_peak == (24 + 34 + 40) * M
    assert asked(*steps, limit=200 * M, garbage_collection_threshold=0.9).reserved_peak == (30 + 24 + 34 + 40) * M


def test_from_the_middle_it_begins_as_the_recording_did():
    steps = (30 * M, 12 * M, -1, 20 * M, 40 * M)
    trace = trace_of(*steps)
    allocator = CachingAllocator()
    blocks = [allocator.malloc(30 * M), allocator.malloc(12 * M)]
    allocator.free(blocks[0])
    allocator.malloc(20 * M), allocator.malloc(40 * M)
    content = {**build(Replay(0, 0, 0, [], list(allocator.segments.values()), [])), "device_traces": [trace[4:]]}
    start = beginning(content, 0)
    assert replay_history(content, 0).exact
    assert what_if(start, trace[4:]).reserved_peak == 82 * M
    assert what_if(start, trace[4:], limit=81 * M).too_much == M
    little = what_if(start, trace[4:], limit=10 * M)
    assert (little.fits, little.failed_at, little.too_much) == (False, -1, 32 * M)


def test_the_command_answers(tmp_path):
    path = tmp_path / "history.json"
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * M))
    allocator.malloc(40 * M)
    path.write_text(json.dumps(build(Replay(0, 0, 0, [], list(allocator.segments.values()), allocator.actions))))

    def run(*arguments: str):
        return CliRunner().invoke(command, [str(path), *arguments])

    assert json.loads(run("--limit", "40MiB", "--json").output)["what_if"]["fits"] is True
    assert "it does not fit in 1,000 B: allocation 1 of 31,457,280 B fails" in run("--limit", "1000").output
    assert "the smallest GPU that it fits on" in run().output
    for limit, code in ((["--limit", "1000"], 3), (["--limit", "1GB"], 0), ([], 0)):
        assert command.main([str(path), *limit], standalone_mode=False) == code
    for wrong in (["--limit", "much"], ["--garbage-collection-threshold", "0.5"], ["--roundup-power2-divisions", "3"]):
        failed = run(*wrong)
        assert isinstance(failed.exception, UserError) and wrong[0] in str(failed.exception)


@pytest.mark.parametrize("size", [1, 512, 513, 4 * K + 1, M, 3 * M + 7])
def test_rounding_never_takes_away(size):
    for divisions in (0, 2, 4, 16):
        assert size <= rounded(size, divisions) <= 2 * max(size, 512)


def test_expandable_segments_join_what_is_free():
    steps = (30 * M, -1, 45 * M)
    assert asked(*steps).reserved_peak == (30 + 46) * M
    assert asked(*steps, expandable_segments=True).reserved_peak == 60 * M


def snapshot_of(tmp_path, name, steps, frames):
    """A snapshot whose n-th event has the n-th of these stacks."""
    trace = trace_of(*steps)
    blocks = CachingAllocator()
    for entry, stack in zip([e for e in trace if e["action"] == "alloc"], frames, strict=True):
        entry["frames"] = stack
        blocks.malloc(entry["size"])
    content = build(Replay(0, 0, 0, [], list(blocks.segments.values()), []))
    path = tmp_path / name
    path.write_text(json.dumps({**content, "device_traces": [trace]}))
    return str(path)


def frame(file, line, name):
    return {"filename": file, "line": line, "name": name}


LIBRARY = [frame("??", 0, "c10::malloc"), frame("/env/site-packages/torch/nn/linear.py", 9, "forward")]


def test_what_holds_memory_at_the_peak_is_named_by_the_users_line(tmp_path):
    stacks = [LIBRARY, [*LIBRARY, frame("/home/me/model.py", 12, "attend")], []]
    path = snapshot_of(tmp_path, "a.json", (30 * M, 40 * M, 12 * M), stacks)
    done = CliRunner().invoke(command, [path])
    assert "41,943,040 B  me/model.py:12 attend (1 blocks)" in done.output
    assert "31,457,280 B  nn/linear.py:9 forward (1 blocks)" in done.output
    assert "12,582,912 B  blocks of 12,582,912 B without a recorded stack (1 blocks)" in done.output
    lines = CliRunner().invoke(command, [path, "--limit", "75497472B"]).output.splitlines()
    failed = "it does not fit in 75,497,472 B: allocation 3 of 12,582,912 B fails, and 10,485,760 B would have to go"
    assert f"  what if: {failed}" in lines
    assert lines[-2:] == [
        "          41,943,040 B  me/model.py:12 attend (1 blocks)",
        "          31,457,280 B  nn/linear.py:9 forward (1 blocks)",
    ]


def test_two_snapshots_are_compared_by_what_holds_memory(tmp_path):
    stacks = [LIBRARY, [frame("/home/me/model.py", 12, "attend")]]
    first = snapshot_of(tmp_path, "a.json", (30 * M, 40 * M), stacks)
    second = snapshot_of(tmp_path, "b.json", (30 * M, 50 * M), stacks)
    assert CliRunner().invoke(command, [first, second]).output.splitlines()[-2:] == [
        "the second's peak compared with the first's: +10,485,760 B",
        "         +10,485,760 B  me/model.py:12 attend",
    ]


def test_the_settings_that_reserve_least_come_first(tmp_path):
    path = snapshot_of(tmp_path, "a.json", (30 * M, 40 * M), [LIBRARY, LIBRARY])
    (line,) = CliRunner().invoke(command, [path, "--settings", "--json"]).output.splitlines()
    content = json.loads(line)["settings"]
    assert content["(nothing set)"] == 70 * M and content["expandable_segments:True"] == 80 * M
    assert list(content.values()) == sorted(content.values())


def test_a_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    path = snapshot_of(tmp_path, "a.json", (30 * M, 40 * M), [LIBRARY, LIBRARY])
    CliRunner().invoke(command, [path, "--plot", str(tmp_path / "memory.png")])
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


def a_segment(device: int, address: int) -> dict[str, Any]:
    block = {"size": 2 * M, "state": "active_allocated", "requested_size": 2 * M}
    return {"address": address, "total_size": 2 * M, "stream": 0, "device": device, "blocks": [block]}


@pytest.mark.parametrize(
    ("segments", "traces", "lines"),
    [
        ([], [["snapshot"]], ["  the history holds no allocation, so nothing of it shows"]),
        ([0], [["snapshot"]], ["  the history begins in the middle: 2,097,152 B in 1 block(s) were there before",
                               "  the history holds no allocation, so nothing of it shows"]),
        ([0], [[]], ["holds no history: switch recording on before training; device 0: 2,097,152 B are reserved"]),
        ([0, 1], [[], ["snapshot"]], ["device 0: 2,097,152 B are reserved in 1 segment(s), but it has no history",
                                      "  the history begins in the middle"]),
        ([], [[]], ["holds no history: switch recording on before training"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_json", [False, True])
def test_a_history_without_what_it_is_read_for_is_told(segments, traces, lines, as_json, tmp_path):
    entries = [[{"action": action, "addr": 0, "size": 0, "stream": 0} for action in item] for item in traces]
    content = {"segments": [a_segment(device, (1 + device) << 40) for device in segments], "device_traces": entries}
    path = tmp_path / "snapshot.json"
    path.write_text(json.dumps(content))
    done = CliRunner().invoke(command, [str(path), *["--json"][: int(as_json)]])
    said = (done.stderr if as_json else done.output) + str(done.exception or "")
    assert all(line in said for line in lines)
    assert "smallest GPU" not in said or segments
