"""Runs a program as one rank of a world that is not there: its collectives return at once.

Results keep their shapes. What is gathered from the other ranks is this rank's, and objects are.
"""

import copy
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.futures import Future
from torch.utils._pytree import tree_leaves

# mypy: disable-error-code="override,assignment"
# PyTorch's stubs overload each collective, and call it with any of them.
from ds_cmli.common.patches import environment, patched, patched_each
from ds_cmli.fits import kernels, lines
from ds_cmli.fits.steps import StepRecorder
from ds_cmli.fits.values import copy_values

NAME = "this_rank_alone"  # of the backend, as it is registered with PyTorch


class NotFollowed(BaseException):
    """Ends a program whose memory would be told wrongly; no `Exception`, which programs catch."""


@dataclass(frozen=True)
class World:
    """The ranks that a program runs among; without a number its process groups have one rank."""

    size: int | None = None
    rank: int = 0

    @contextmanager
    def entered(self, recorder: StepRecorder) -> Iterator[None]:
        """Inside, this process is the rank, the only one of its machine."""
        if NAME.upper() not in dist.Backend._plugins:
            dist.Backend.register_backend(NAME, _Rank.made, True, ["cpu", "cuda"])
        _Rank.recorder, _Rank.unwaited = recorder, {}
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
            "python: connection to another rank": self._connecting,
            "torch: backend of a group": lambda make: _alone(make, stack),
            "torch: processes of a program": lambda _: _spawn,
            "torch: NCCL": lambda _: lambda: True,
            "torch: version of NCCL": lambda _: lambda: (2, 29, 7),
            "torch: patience of NCCL": lambda _: timedelta(minutes=10),
            "torch: parameters compared": lambda _: _nothing,
            "torch: times of DDP": lambda _: _nothing,
        }
        with stack:
            if self.size is not None:
                stack.enter_context(environment(self._variables(self.size)))
            for name, replacement in replacements.items():
                stack.enter_context(patched(name, replacement))
            for name in ("torch: objects of ranks", "torch: objects of ranks, in their module"):
                stack.enter_context(patched_each(name, objects))
            yield
            if dist.is_initialized():
                dist.destroy_process_group()

    def _variables(self, size: int) -> dict[str, str]:
        here = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(self.rank)}
        there = {"RANK": str(self.rank), "WORLD_SIZE": str(size)}
        return here | there | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

    def _meet(self, url: str, rank: int = -1, world_size: int = -1, **_: object) -> Iterator[tuple]:
        """Replaces `rendezvous`, which waits for the other ranks."""
        size = world_size if world_size > 0 else self.size or 1
        yield dist.HashStore(), rank if rank >= 0 else self.rank, size

    def _connecting(self, connect: Callable) -> Callable:
        """Replaces `socket.create_connection`, by which a program would look for rank 0."""

        def run(address: tuple[str, int], *args: object, **options: object) -> socket.socket:
            if self.rank and address[1] == int(os.environ["MASTER_PORT"]):
                raise NotFollowed(
                    f"{lines.current()}: this connects to rank 0, and fits runs rank "
                    f"{self.rank} alone: give --rank 0"
                )
            return connect(address, *args, **options)

        return run


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
        for each in (key, re.sub(r"\d+$", str(self.world.rank), key)):
            if self.check([each]):
                return each
        raise NotFollowed(
            f"{lines.current()}: this waits for {key!r} in a store, which another rank would "
            "write, and fits runs one rank"
        )


class _Done(dist.Work):
    """A collective that is over, but holds its tensors, as NCCL's does, until somebody waits for
    it (not for its future, as DDP does) or another one begins later."""

    def __init__(self, result: object, held: object, unwaited: dict["_Done", int]):
        super().__init__()
        self.held, self.unwaited = held, unwaited
        self.future: Future = Future()
        self.future.set_result(result)

    def wait(self, timeout: object = None) -> bool:
        self.unwaited.pop(self, None)
        self.held = None
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Future:
        return self.future


class _Rank(dist.ProcessGroup):
    """A process group of which only this rank is there."""

    recorder: StepRecorder
    # Collectives that nobody has waited for yet, by the number of steps done before them.
    unwaited: dict[_Done, int]

    @classmethod
    def made(cls, options, _: object) -> "_Rank":
        return cls(options.group_rank, options.group_size)  # type: ignore[call-arg]

    def getBackendName(self) -> str:
        return "nccl"

    def _set_group_name(self, name: str) -> None:
        self.given_name = name

    @property
    def group_name(self) -> str:
        return self.given_name

    def _over(self, result: object, others: object = None, held: object = None) -> _Done:
        self.recorder.see_exchanged(tree_leaves((result, others)))
        step = self.recorder.done.total()
        if self.recorder.phase == "backward":
            # NCCL's thread has found those of earlier steps done.
            for work, begun in list(self.unwaited.items()):
                if begun < step:
                    del self.unwaited[work]
        work = _Done(result, (others, held), self.unwaited)
        self.unwaited[work] = step
        return work

    def allreduce(self, tensors: list[Tensor], opts: object = None) -> _Done:
        return self._over(tensors)

    broadcast = reduce = allreduce_coalesced = allreduce

    def send(self, tensors: list[Tensor], *_: object) -> _Done:
        return self._over(tensors)

    recv = recv_anysource = send

    def barrier(self, opts: object = None) -> _Done:
        return self._over(None, held=torch.empty(1, device="cuda"))

    def monitored_barrier(self, *_: object, **__: object) -> None:
        pass

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None
    ) -> _Done:
        """Gather tensors of equal sizes through a flat copy, as NCCL does."""
        held = [_flat(parts) for parts in outputs]
        for parts, own in zip(outputs, inputs, strict=True):
            for part in parts:
                copy_values(part, own)
        return self._over(outputs, inputs, held)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None
    ) -> _Done:
        for parts in outputs:
            for part, own in zip(parts, inputs, strict=True):
                copy_values(part, own)
        return self._over(outputs, inputs)

    def all_gather_single(self, output: Tensor, own: Tensor, *_: object) -> _Done:
        copy_values(output, own)
        return self._over(output, own)

    all_to_all_single = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None
    ) -> _Done:
        for output, own in zip(outputs, inputs, strict=True):
            copy_values(output, own)
        return self._over(outputs, inputs)

    alltoall = all_gather_single_coalesced

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object = None
    ) -> _Done:
        return self._over(outputs, inputs, [_flat(parts) for parts in inputs])

    def reduce_scatter_single(self, output: object, given: object, opts: object = None) -> _Done:
        return self._over(output, given)

    reduce_scatter_single_coalesced = reduce_scatter_single

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None
    ) -> _Done:
        for part in tree_leaves(outputs):
            copy_values(part, inputs[0])
        return self._over(outputs, inputs)

    def scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object = None
    ) -> _Done:
        if inputs:
            copy_values(outputs[0], inputs[0][self.rank()])
        return self._over(outputs, inputs)


def _flat(parts: Sequence[Tensor]) -> Tensor | None:
    """The buffer that NCCL takes for a list of tensors of equal sizes."""
    first = parts[0]
    if any(part.numel() != first.numel() for part in parts):
        return None
    return first.new_empty(len(parts) * first.numel())


def _alone(make: Callable, stack: ExitStack) -> Callable:
    """Replaces `_new_process_group_helper`: the group is ours, and goes by the asked name."""

    def run(size, rank, ranks, backend, store, name, *args, device_id=None, **options):
        kernels.leave_out_deepspeeds(stack)
        options["backend_options"] = None
        group, kept = make(size, rank, ranks, dist.Backend(NAME), store, name, *args, **options)
        if isinstance(group, _Rank):
            asked = "nccl" if backend in (None, "undefined") else backend
            c10d._world.pg_map[group] = dist.Backend(asked), kept
            c10d._world.pg_backend_config[group] = str(c10d.BackendConfig(dist.Backend(asked)))
        return group, kept

    return run


def _spawn(function: Callable, args: tuple = (), nprocs: int = 1, **_: object) -> None:
    """Replaces `torch.multiprocessing.spawn`: one process is this one."""
    if nprocs > 1:
        raise NotFollowed(
            f"{lines.current()}: the program starts {nprocs} processes itself, and fits follows "
            "one: let it start one, or run as a launcher starts it, and give --world-size"
        )
    function(0, *args)


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
