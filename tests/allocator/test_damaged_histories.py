"""Histories that were damaged at random: each is replayed or refused in one line."""

import copy
import random

import pytest

from ds_cmli.allocator.blocks import DEFAULTS, Settings
from ds_cmli.allocator.history import replay_history
from ds_cmli.allocator.what_if import what_if
from ds_cmli.common.errors import UserError
from tests.allocator.random_programs import M, recorded

NUMBERS = (0, 1, 512, 2 * M, 20 * M, 7 * M + 3, 1 << 62)


def damage(content, r: random.Random) -> None:
    trace, segments = content["device_traces"][0], content["segments"]
    at, kind = r.randrange(len(trace)), r.randrange(8)
    if kind == 0:
        del trace[at]
    elif kind == 1:
        trace.insert(r.randrange(len(trace)), copy.deepcopy(trace[at]))
    elif kind == 2:
        trace[at - 1], trace[at] = trace[at], trace[at - 1]
    elif kind == 3:
        trace[at][r.choice(("addr", "size", "stream"))] = r.choice(NUMBERS)
    elif kind == 4:
        streams = [r.choice((0, 7)) for _ in trace]
        for event, stream in zip(trace, streams, strict=True):
            event["stream"] = stream
    elif kind == 5 and segments:
        del segments[r.randrange(len(segments))]
    elif kind == 6 and segments:
        segments[r.randrange(len(segments))]["address"] += r.choice((-M, 512, 20 * M))
    elif kind == 7:
        trace[at]["pool_id"] = (0, r.randrange(3))


@pytest.mark.parametrize("settings", [DEFAULTS, Settings(max_split_size=30 * M), Settings(expandable_segments=True)])
def test_a_damaged_history_is_replayed_or_refused(settings):
    refused = different = 0
    for seed in range(150):
        r = random.Random(seed)
        content = recorded(seed, 120, settings, record_pools=r.random() < 0.3)
        for _ in range(r.choice((1, 2, 5))):
            damage(content, r)
        try:
            replayed = replay_history(content, 0)
        except UserError as error:
            assert "\n" not in str(error) and "device 0" in str(error)
            refused += 1
            continue
        different += not replayed.exact
        what_if(replayed.start, content["device_traces"][0], 100 * M)
    assert refused > 30 and different
