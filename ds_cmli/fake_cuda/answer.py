"""Whether recorded steps fit: their events through the allocator's model.

All sizes are bytes: "requested" is what the program asked for, "allocated" what the caching
allocator handed out for it, "reserved" what it took from the device, "device" all that the process
occupies there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ds_cmli.memory_model import gpus
from ds_cmli.memory_model.blocks import Event, OutOfMemory
from ds_cmli.memory_model.caching_allocator import Replay, replay
from ds_cmli.memory_model.cuda_layouts import MATRICES

WITH_BIAS = str(torch.ops.aten.addmm.default)
_aten = torch.ops.aten
OF_VECTORS = _aten.mv.default, _aten.addmv.default, _aten.dot.default, _aten.vdot.default
PRODUCTS = frozenset(map(str, (*MATRICES, *OF_VECTORS, _aten._euclidean_dist.default)))
LT_WORKSPACE = 1 << 20  # bytes, of cublasLt
WITHOUT_LIMIT = 1 << 44  # bytes of a device, more than any needs
KEEPS_WORKSPACES = torch.__version__ < "2.15"  # compared as versions
StreamPlace = tuple[bool, int]  # whether in the thread of backward, and the stream


def with_cublas(
    events: list[Event], workspaces: int, given: Mapping[StreamPlace, int] = MappingProxyType({})
) -> list[Event]:
    """Add what cuBLAS holds from torch's allocator, which belongs to no tensor.

    The program's thread and that of backward each take a workspace for a stream at their first
    matrix product there, once its result has been allocated, and keep it. From PyTorch 2.15 on each
    product takes one and returns it, and one with a bias takes LT_WORKSPACE.

    Args:
        given: how many events precede a place's first product into a tensor that it was given.
    """
    out: list[Event] = []
    taken, left = set[StreamPlace](), dict(given)
    block = 0

    def take(place: StreamPlace, phase: str, op: str = "") -> None:
        nonlocal block
        block -= 1
        size = workspaces // 2
        if op == WITH_BIAS and not KEEPS_WORKSPACES:
            size = min(size, LT_WORKSPACE)
        out.append(Event(block, size, "temporaries", phase, "cuBLAS", place[1]))
        if KEEPS_WORKSPACES:
            taken.add(place)
        else:
            out.append(Event(block, -size, "temporaries", phase, "cuBLAS", place[1]))

    for number, event in enumerate(events):
        for place in [key for key in left if number >= left[key]]:
            del left[place]
            if place not in taken:
                take(place, "backward" if place[0] else "forward")
        out.append(event)
        place = event.phase == "backward", event.stream
        if place not in taken and event.bytes > 0 and event.op in PRODUCTS:
            take(place, event.phase, event.op)
    return out


@dataclass(frozen=True)
class Room:
    """A GPU, or a limit in place of its memory.

    Args:
        gpu: the listed name of the GPU whose operators and context are meant.
        limit: bytes of the whole device; None: those of the GPU.
    """

    gpu: str
    limit: int | None = None

    @property
    def bytes(self) -> int:
        return gpus.find(self.gpu).total.bytes if self.limit is None else self.limit

    def __str__(self) -> str:
        size = f"{self.bytes / 1e9:.2f} GB"
        return size if self.limit is not None else f"{self.gpu} ({size})"


def on_device(events: Sequence[Event], room: Room, world_size: int) -> tuple[Replay, int]:
    """Replay events where no more than the room can be reserved, else without a limit.

    Returns also the bytes that the process then occupies: more than the room's do not fit.
    """
    outside = gpus.device_bytes(0, room.gpu, world_size)
    try:
        replayed = replay(events, limit=room.bytes - outside)
    except OutOfMemory:
        replayed = replay(events)
    return replayed, replayed.reserved_peak + outside
