"""Writes and reads snapshots of CUDA's allocator, as `torch.cuda.memory._dump_snapshot` does.

Predicted allocations are written with the same schema, so that a prediction and a measurement open
in the same tools, such as PyTorch's memory viewer (pytorch.org/memory_viz). Files to read may come
from anywhere, also as JSON: only plain containers, numbers and strings are read, whatever a pickle
asks for.
"""

import gzip
import io
import itertools
import pickle
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ds_cmli.allocator.allocator import Replay, replay
from ds_cmli.allocator.beginning import LIVE
from ds_cmli.allocator.blocks import Block, Event, Segment
from ds_cmli.allocator.state import Record, Snapshot
from ds_cmli.common.errors import UserError, one_line
from ds_cmli.common.json_text import parse

ENTRY: dict[str, type] = {"action": str, "addr": int, "size": int, "stream": int}
SEGMENT: dict[str, type] = {
    "address": int,
    "total_size": int,
    "stream": int,
    "device": int,
    "blocks": list,
}
BLOCK: dict[str, type] = {"size": int, "state": str, "requested_size": int}
NUMBER = "0[xX][0-9a-fA-F]{1,16}|[1-9][0-9]{0,19}|0"


def write(events: Iterable[Event], path: str | Path) -> Replay:
    """Replay `events` in the model, and pickle its final state and history to `path`."""
    replayed = replay(events)
    Path(path).write_bytes(pickle.dumps(build(replayed)))
    return replayed


def build(replayed: Replay) -> Snapshot:
    """The snapshot as `torch.cuda.memory._snapshot()` returns it.

    Every block and action carries its event's stack.
    """
    parts = [part for segment in replayed.segments for part in _mapped(segment)]
    trace = []
    for time, action in enumerate(replayed.actions):
        entry = {
            "action": action.name,
            "addr": action.address,
            "size": action.bytes,
            "stream": action.stream,
            "time_us": time,  # only the order of the events is known, not when they happen
            "frames": frames(action.event),
        }
        if action.event is not None:
            entry["category"] = action.event.category
        trace.append(entry)
    return {
        "segments": list(map(_segment, sorted(parts, key=lambda part: part[0].address))),
        "device_traces": [trace],
        "allocator_settings": {},
        "external_annotations": [],
    }


def _mapped(segment: Segment) -> Iterator[list[Block]]:
    """Yield the blocks of each part that has memory: an ordinary segment is one such part."""
    for mapped, blocks in itertools.groupby(segment.blocks(), key=lambda block: block.mapped):
        if mapped:
            yield list(blocks)


def _segment(blocks: list[Block]) -> Record:
    segment = blocks[0].segment
    size = sum(block.size for block in blocks)
    in_use = sum(block.size for block in blocks if block.requested)
    return {
        "device": 0,
        "address": blocks[0].address,
        "total_size": size,
        "allocated_size": in_use,
        "active_size": in_use,
        "requested_size": sum(block.requested for block in blocks),
        "stream": segment.stream,
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": segment.pool,
        "is_expandable": size < segment.size,
        "frames": frames(segment.event),
        "blocks": list(map(_block, blocks)),
    }


def _block(block: Block) -> Record:
    return {
        "address": block.address,
        "size": block.size,
        "requested_size": block.requested,
        "state": "active_allocated" if block.requested else "inactive",
        "frames": frames(block.event),
    }


def frames(event: Event | None) -> list[Record]:
    """A stack for the viewer, innermost frame first: operator, category, phase."""
    if event is None:
        return []
    names = [event.op or "allocation", event.category, event.phase]
    return [{"name": name, "filename": "predicted", "line": 0} for name in names]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only plain containers are read"
        )

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError(
            "it asks for an object outside the file, and only plain containers are read"
        )


def read(path: str | Path) -> Snapshot:
    """A snapshot with "segments" and "device_traces", of the types that a replay needs.

    The file may be compressed with gzip. Raises `UserError` with a message of one line for anything
    else.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        plain = data[:1] in (b"{", b"[") or data[:1].isspace()
        content = parse(data, dict) if plain else _PlainUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged or hostile pickle can raise anything
        why = one_line(error)[:200]
        raise UserError(f"{str(path)!r} is no snapshot that can be read: {why}") from None
    _fill_in(content)
    flaw = _flaw(content)
    if flaw:
        raise UserError(f"{str(path)!r} is no snapshot of CUDA's allocator: {flaw}")
    return content


def _fill_in(content: object) -> None:
    """Read addresses that another tool wrote as strings, decimal or hexadecimal.

    Where there is the history of one device only, or of one stream only, segments that name none
    are put there.
    """
    if not isinstance(content, dict) or not isinstance(content.get("device_traces"), list):
        return
    devices, streams = [], {}
    for device, trace in enumerate(content["device_traces"]):
        events = _dictionaries(trace)
        if events:
            devices.append(device)
        for event in events:
            _read_numbers(event, "addr", "stream")
            stream = event.get("stream", 0)
            streams[str(stream)] = stream
    for segment in _dictionaries(content.get("segments")):
        _read_numbers(segment, "address", "stream")
        if len(devices) == 1:
            segment.setdefault("device", devices[0])
        if len(streams) == 1:
            segment.setdefault("stream", *streams.values())


def _dictionaries(value: object) -> list[Record]:
    if isinstance(value, list):
        return [one for one in value if isinstance(one, dict)]
    return []


def _read_numbers(values: Record, *keys: str) -> None:
    for key in keys:
        text = values.get(key)
        if isinstance(text, str) and re.fullmatch(NUMBER, text):
            values[key] = int(text, 0)


def _flaw(content: object) -> str:
    """What keeps `content` from being a snapshot; "" if nothing does."""
    if not isinstance(content, dict):
        content = {}
    segments, traces = content.get("segments"), content.get("device_traces")
    if not isinstance(segments, list) or not isinstance(traces, list):
        return "it has no lists 'segments' and 'device_traces'"
    for number, trace in enumerate(traces):
        if not isinstance(trace, list):
            return f"device_traces[{number}] is no list"
        for at, entry in enumerate(trace):
            place = f"device_traces[{number}][{at}]"
            flaw = _flaw_of(entry, ENTRY, optional=("addr", "size", "stream"))
            if flaw:
                return f"{place} is no event of the allocator: {flaw}"
            if not _is_pool(entry.get("pool_id", (0, 0))):
                return f"{place} belongs to no pool: its 'pool_id' is {_short(entry['pool_id'])}"
    several = sum(map(bool, traces)) > 1
    for number, segment in enumerate(segments):
        flaw = _flaw_of_segment(segment, f"segments[{number}]", several)
        if flaw:
            return flaw
    return ""


def _flaw_of_segment(segment: object, place: str, several_devices: bool) -> str:
    flaw = _flaw_of(segment, SEGMENT, optional=() if several_devices else ("device",))
    if flaw or not isinstance(segment, dict):
        return f"{place} is no segment: {flaw}"
    pool = segment.get("segment_pool_id", (0, 0))
    if not _is_pool(pool):
        return f"{place} belongs to no pool: its 'segment_pool_id' is {_short(pool)}"
    for block in segment["blocks"]:
        flaw = _flaw_of(block, BLOCK, optional=("requested_size",))
        if not flaw and block["state"] not in (*LIVE, "inactive"):
            flaw = f"its 'state' is {_short(block['state'])}"
        if flaw:
            return f"{place} has what is no block: {flaw}"
    if sum(block["size"] for block in segment["blocks"]) != segment["total_size"]:
        return f"the blocks of {place} do not fill it"
    return ""


def _is_pool(value: object) -> bool:
    return isinstance(value, list | tuple) and list(map(type, value)) == [int, int]


def _flaw_of(value: object, types: dict[str, type], optional: tuple[str, ...] = ()) -> str:
    """What keeps a value from being a dictionary with these fields; "" if nothing does."""
    if not isinstance(value, dict):
        return f"it is {_short(value)}"
    for key, kind in types.items():
        if key not in value:
            if key not in optional:
                return f"it has no {key!r}"
        elif type(value[key]) is not kind or (kind is int and value[key] < 0):
            return f"its {key!r} is {_short(value[key])}"
    return ""


def _short(value: object) -> str:
    return reprlib.repr(value).replace("\n", " ")[:80]
