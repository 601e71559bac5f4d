"""Reads a snapshot of CUDA's allocator from a file: a pickle of `torch.cuda.memory._dump_snapshot`, or that as JSON.

Such files may come from anywhere: only plain containers, numbers and strings are read, whatever a pickle asks for.
"""

import gzip
import io
import json
import pickle
import re
import reprlib
from pathlib import Path
from typing import Any

from ds_cmli.allocator.beginning import LIVE
from ds_cmli.common.errors import UserError

ENTRY: dict[str, type] = {"action": str, "addr": int, "size": int, "stream": int}
SEGMENT: dict[str, type] = {
    "address": int,
    "total_size": int,
    "stream": int,
    "device": int,
    "blocks": list,
}
BLOCK: dict[str, type] = {"size": int, "state": str, "requested_size": int}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only plain containers are read"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(
            "it asks for an object outside the file, and only plain containers are read"
        )


def read(path: str | Path) -> dict[str, Any]:
    """A snapshot with "segments" and "device_traces", whose values have the types that a replay relies on.

    The file may be compressed with gzip. Raises `UserError` with a message of one line for anything else.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        plain = data[:1] in (b"{", b"[") or data[:1].isspace()
        content = json.loads(data) if plain else _PlainUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged or hostile pickle can raise anything
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{str(path)!r} is no snapshot that can be read: {why}") from None
    _fill_in(content)
    wrong = _wrong(content)
    if wrong:
        raise UserError(f"{str(path)!r} is no snapshot of CUDA's allocator: {wrong}")
    return content


def _fill_in(content: Any) -> None:
    """Read addresses that another tool wrote as strings, decimal or hexadecimal.

    Where there is the history of one device only, or of one stream only, segments that name none are put there.
    """
    if not isinstance(content, dict) or not isinstance(content.get("device_traces"), list):
        return
    traces = [_dictionaries(trace) for trace in content["device_traces"]]
    for entry in (entry for trace in traces for entry in trace):
        _read_number(entry, "addr", "stream")
    devices = [device for device, trace in enumerate(traces) if trace]
    streams = {
        str(entry.get("stream", 0)): entry.get("stream", 0) for trace in traces for entry in trace
    }
    for segment in _dictionaries(content.get("segments")):
        _read_number(segment, "address", "stream")
        if len(devices) == 1:
            segment.setdefault("device", devices[0])
        if len(streams) == 1:
            segment.setdefault("stream", *streams.values())


def _dictionaries(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _read_number(value: Any, *keys: str) -> None:
    for key in keys if isinstance(value, dict) else ():
        if isinstance(value.get(key), str) and re.fullmatch(
            "0[xX][0-9a-fA-F]{1,16}|[1-9][0-9]{0,19}|0", value[key]
        ):
            value[key] = int(value[key], 0)


def _wrong(content: Any) -> str:
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), list) for k in ("segments", "device_traces")
    ):
        return "it has no lists 'segments' and 'device_traces'"
    for number, trace in enumerate(content["device_traces"]):
        if not isinstance(trace, list):
            return f"device_traces[{number}] is no list"
        for at, entry in enumerate(trace):
            wrong = _flaw(entry, ENTRY, optional=("addr", "size", "stream"))
            if wrong:
                return f"device_traces[{number}][{at}] is no event of the allocator: {wrong}"
            if not _is_pool(entry.get("pool_id", (0, 0))):
                return f"device_traces[{number}][{at}] belongs to no pool: its 'pool_id' is {_short(entry['pool_id'])}"
    several = sum(map(bool, content["device_traces"])) > 1
    for number, segment in enumerate(content["segments"]):
        wrong = _flaw(segment, SEGMENT, optional=() if several else ("device",))
        if wrong:
            return f"segments[{number}] is no segment: {wrong}"
        if not _is_pool(segment.get("segment_pool_id", (0, 0))):
            return f"segments[{number}] belongs to no pool: its 'segment_pool_id' is {_short(segment['segment_pool_id'])}"
        for block in segment["blocks"]:
            wrong = _flaw(block, BLOCK, optional=("requested_size",))
            if not wrong and block["state"] not in (*LIVE, "inactive"):
                wrong = f"its 'state' is {_short(block['state'])}"
            if wrong:
                return f"segments[{number}] has what is no block: {wrong}"
        if sum(block["size"] for block in segment["blocks"]) != segment["total_size"]:
            return f"the blocks of segments[{number}] do not fill it"
    return ""


def _is_pool(value: Any) -> bool:
    return isinstance(value, list | tuple) and [type(part) for part in value] == [int, int]


def _flaw(value: Any, types: dict[str, type], optional: tuple[str, ...] = ()) -> str:
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


def _short(value: Any) -> str:
    return reprlib.repr(value).replace("\n", " ")[:80]
