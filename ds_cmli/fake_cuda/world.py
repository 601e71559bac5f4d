"""Runs as one rank of a world that is not there.

Where it gathers objects of the other ranks, it finds this rank's.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ds_cmli.common.patches import environment, patched, patched_each
from ds_cmli.fake_cuda import kernels
from ds_cmli.fake_cuda.collectives import Rank
from ds_cmli.fake_cuda.steps import StepRecorder

NAME = "this_rank_alone"  # of the backend, as it is registered with PyTorch
NCCL = {"is_nccl_available": lambda: True, "version": lambda: (2, 29, 7)}


@dataclass(frozen=True)
class World:
    """The ranks of a run; without a number its process groups have one rank."""

    size: int | None = None
    rank: int = 0

    @contextmanager
    def entered(self, recorder: StepRecorder) -> Iterator[None]:
        """Inside, this process is the rank, the only one of its machine."""
        if NAME.upper() not in dist.Backend._plugins:
            dist.Backend.register_backend(NAME, Rank.made, True, ["cpu", "cuda"])
        Rank.recorder, Rank.unwaited = recorder, {}
        _Store.world = self
        objects: dict[str, Callable] = {
            "all_gather_object": _all_gather_object,
            "gather_object": _gather_object,
            "broadcast_object_list": _nothing,
            "scatter_object_list": _scatter_object_list,
        }
        stack = ExitStack()
        replacements: dict[str, Callable] = {
            "torch: meeting of ranks": lambda _: self._meet,
            "torch: store of ranks": lambda _: _Store,
            "torch: backend of a group": lambda make: _alone(make, stack),
            "torch: patience of NCCL": lambda _: timedelta(minutes=10),
        }
        with stack:
            if self.size is not None:
                stack.enter_context(environment(self._variables(self.size)))
            for name, replacement in replacements.items():
                stack.enter_context(patched(name, replacement))
            stack.enter_context(patched_each("torch: objects of ranks", objects))
            stack.enter_context(patched_each("torch: NCCL", NCCL))
            yield
            if dist.is_initialized():
                dist.destroy_process_group()

    def _variables(self, size: int) -> dict[str, str]:
        local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(self.rank)}
        there = {"RANK": str(self.rank), "WORLD_SIZE": str(size)}
        return local | there | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

    def _meet(self, url: str, rank: int = -1, world_size: int = -1, **_: object) -> Iterator[tuple]:
        """Replaces `rendezvous`, which waits for the other ranks."""
        size = world_size if world_size > 0 else self.size or 1
        yield dist.HashStore(), rank if rank >= 0 else self.rank, size


class _Store(dist.HashStore):
    """Replaces `TCPStore`: the other ranks do what this one does, under their own numbers."""

    world: World

    def __init__(self, host_name: str, port: int, *_: object, **__: object):
        super().__init__()
        self.host, self.port = host_name, port

    def add(self, key: str, amount: int) -> int:
        return super().add(key, amount * (self.world.size or 1))

    def get(self, key: str) -> bytes:
        return super().get(self._written(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return list(map(self.get, keys))

    def wait(self, keys: list[str], *_: object) -> None:
        for key in keys:
            self._written(key)

    def _written(self, key: str) -> str:
        """The key, or where another rank would write it, that of this rank."""
        for name in (key, re.sub(r"\d+$", str(self.world.rank), key)):
            if self.check([name]):
                return name
        raise KeyError(f"another rank would write {key!r} to the store")


def _alone(make: Callable, stack: ExitStack) -> Callable:
    """Replaces `_new_process_group_helper`: the group is ours, and goes by the asked name."""

    def run(size, rank, ranks, backend, store, name, *args, device_id=None, **options):
        kernels.leave_out_deepspeeds(stack)
        options["backend_options"] = None
        group, kept = make(size, rank, ranks, dist.Backend(NAME), store, name, *args, **options)
        if isinstance(group, Rank):
            backend_name = "nccl" if backend in (None, "undefined") else backend
            c10d._world.pg_map[group] = dist.Backend(backend_name), kept
            c10d._world.pg_backend_config[group] = str(
                c10d.BackendConfig(dist.Backend(backend_name))
            )
        return group, kept

    return run


def _nothing(*_: object, **__: object) -> None:
    pass


def _all_gather_object(into: list, own: object, group: object = None) -> None:
    into[:] = [copy.deepcopy(own) for _ in into]


def _gather_object(own: object, into: list | None = None, *_: object, **__: object) -> None:
    if into is not None:
        _all_gather_object(into, own)


def _scatter_object_list(into: list, given: list | None, *_: object, **options: object) -> None:
    if given:
        into[0] = given[int(os.environ.get("RANK", 0)) % len(given)]
