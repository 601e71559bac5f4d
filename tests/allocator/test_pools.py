"""Segments of private pools that were released during a history, most of which do not tell their pool."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from ds_cmli.allocator.blocks import Settings
from ds_cmli.allocator.history import replay_history
from ds_cmli.allocator.what_if import what_if
from profiling.replay import command
from tests.allocator.random_programs import M, recorded

A, B, C = (n << 40 for n in (1, 2, 3))


def event(action: str, address: int, size: int = 20 * M, **more: Any) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, **more}


def taken(address: int) -> list[dict[str, Any]]:
    return [event("segment_alloc", address), event("alloc", address)]


def free(address: int) -> list[dict[str, Any]]:
    return [event("free_requested", address), event("free_completed", address)]


def history(trace: list[dict[str, Any]], *at_end: int, pool: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """With free segments of 20 MiB at the end."""
    segments = [
        {"address": address, "total_size": 20 * M, "stream": 0, "segment_pool_id": pool, "blocks": [
            {"size": 20 * M, "state": "inactive"}
        ]} for address in at_end
    ]  # fmt: skip
    return {"segments": segments, "device_traces": [trace]}


# The default pool's segment at A is free when a CUDA graph takes one at B. The graph's goes back before A is used.
GRAPH = [*taken(B), *free(B), event("segment_free", B), event("alloc", A), *free(A)]


def test_a_segment_that_was_taken_beside_a_free_one_was_of_another_pool():
    replayed = replay_history(history(GRAPH, A), 0)
    assert replayed.exact and replayed.allocations == 2
    assert (replayed.released_private, replayed.released_unknown) == (1, 0)
    assert (replayed.reserved_peak_replayed, replayed.allocated_peak) == (40 * M, 20 * M)


def test_a_what_if_keeps_a_private_pools_memory_apart():
    """The default pool's request takes C, though the graph's block at B is free."""
    trace = [event("alloc", A), *taken(B), *free(B), *taken(C), *free(C), *free(A), event("segment_free", B)]
    replayed = replay_history(history(trace, A, C), 0)
    assert replayed.exact and replayed.released_private == 1
    assert what_if(replayed.start, trace, 60 * M).fits and not what_if(replayed.start, trace, 59 * M).fits


def test_an_event_that_tells_its_pool_is_believed():
    trace = [dict(one, pool_id=[0, 3] if one["addr"] == B else [0, 0]) for one in GRAPH]
    replayed = replay_history(history(trace, A), 0)
    assert replayed.exact and (replayed.released_private, replayed.released_unknown) == (0, 0)
    # Without a request that tells, and without being told, the segment counts as the default pool's.
    trace = [event("alloc", A), *taken(B), *free(B), event("segment_free", B), *free(A)]
    replayed = replay_history(history(trace, A), 0)
    assert replayed.exact and (replayed.released_private, replayed.released_unknown) == (0, 0)
    assert replayed.start.taken[1].pool == (0, 0)
    trace[1] = dict(trace[1], pool_id=(0, 3))
    assert replay_history(history(trace, A), 0).start.taken[1].pool == (0, 3)


def test_an_address_can_belong_to_one_pool_after_another():
    """The device gives the default pool's released addresses to a private pool, which holds them at the end."""
    trace = [*taken(A), *free(A), event("segment_free", A), *taken(B), *taken(A), *free(A), *free(B)]
    content = history(trace, A)
    content["segments"][0]["segment_pool_id"] = (0, 1)
    content["segments"] += history([], B)["segments"]
    replayed = replay_history(content, 0)
    assert replayed.exact and (replayed.released_private, replayed.released_unknown) == (0, 1)
    assert [replayed.start.taken[number].pool for number in (0, 5, 7)] == [(0, 0), (0, 0), (0, 1)]


@pytest.mark.parametrize("settings", [Settings(), Settings(max_split_size=30 * M), Settings(expandable_segments=True)])
def test_what_is_told_is_true(settings):
    """The same programs with and without the pool in each event."""
    private = 0
    for seed in range(200, 230):
        replayed = replay_history(recorded(seed, settings=settings, record_pools=True), 0)
        content = recorded(seed, settings=settings)
        result = replay_history(content, 0)
        assert replayed.exact and result.exact and not replayed.released_private and not replayed.released_unknown
        assert result.reserved_peak_replayed == replayed.reserved_peak_replayed
        events = recorded(seed, settings=settings, record_pools=True)["device_traces"][0]
        released = [one["pool_id"] != (0, 0) for one in events if one["action"] in ("segment_free", "segment_unmap")]
        assert result.released_private <= sum(released)
        assert result.released_private + result.released_unknown <= len(released)
        private += result.released_private
    assert private > 50


def test_the_command_says_what_the_history_does_not(tmp_path):
    trace = [*taken(C), *free(C), event("segment_free", C), *GRAPH]
    path = tmp_path / "history.json"
    path.write_text(json.dumps(history(trace, A)))
    values = json.loads(CliRunner().invoke(command, [str(path), "--json"]).output)
    assert (values["released_private"], values["released_unknown"]) == (2, 0)
    text = CliRunner().invoke(command, [str(path)]).output
    assert "2 released segments were those of private pools" in text
    assert "if PYTORCH_ALLOC_CONF was not set" in text and "rules that the model does not know" not in text
    # A request that no pool explains: the default pool's passes over the default pool's free block.
    path.write_text(json.dumps(history([*taken(B), *free(B)], A, B)))
    text = CliRunner().invoke(command, [str(path)]).output
    assert "comes from rules that the model does not know, or from PYTORCH_ALLOC_CONF" in text
