"""Counts the calls and bytes of each kind of collective that a rank's process group runs.

It counts on real and on fake tensors alike, and on the CPU in backward passes too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_cmli.common.probe import Probe, probe

# Operators of torch's `c10d`: the kind of each, and the position of the argument with the tensors
# of all ranks.
OPERATORS = {
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_coalesced_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
}
TEXT, REST = "text", "rest"


@dataclass
class CallCount:
    calls: int = 0
    bytes: int = 0  # for gathers and scatters, of the tensors of all ranks together

    def sent(self, kind: str, ranks: int) -> int:
        """The least bytes that a rank sends on average, if each collective is a ring of ranks."""
        if kind == "send":
            return self.bytes
        rounds = 2 if kind == "all-reduce" else 1
        return self.bytes * rounds * (ranks - 1) // ranks


Counts = dict[tuple[str, str], CallCount]  # by part and kind


class Traffic(TorchDispatchMode, Probe):
    """Counts while it is entered: text features with their gradients, and everything else.

    Received messages and barriers are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = {}
        self.part = REST

    @contextmanager
    def counting(self) -> Iterator["Traffic"]:
        """Count everything inside."""
        with probe.subscribed(self), self:
            yield self

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        self.part = TEXT
        with super().exchanging():
            yield
        self.part = REST

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            kind, whole = OPERATORS.get(func._schema.name.partition("::")[2], ("", 0))
            if kind:
                part = TEXT if kind == "send" else self.part
                count = self.counts.setdefault((part, kind), CallCount())
                count.calls += 1
                for x in tree_leaves(args[whole]):
                    if isinstance(x, Tensor):
                        count.bytes += x.nbytes
        return func(*args, **(kwargs or {}))

    def since(self, before: Counts) -> Counts:
        """What has been counted since the time when `counts` was equal to `before`."""
        out = {}
        for key, now in self.counts.items():
            earlier = before.get(key, CallCount())
            out[key] = CallCount(now.calls - earlier.calls, now.bytes - earlier.bytes)
        return out

    def add(self, moved: Counts, times: int = 1) -> None:
        """Add `moved` to the counts `times` times, without any communication."""
        for key, count in moved.items():
            total = self.counts.setdefault(key, CallCount())
            total.calls += times * count.calls
            total.bytes += times * count.bytes

    def sent(self, ranks: int) -> int:
        return sum(count.sent(kind, ranks) for (_, kind), count in self.counts.items())
