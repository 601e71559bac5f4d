"""What a rank's process group is asked to move: calls and bytes of each kind of collective.

Counts on real and on fake tensors alike; on the CPU in backward passes too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_cmli.common.patches import replaced
from ds_cmli.distributed import process_group as distributed

# Operators of torch's `c10d`: the kind of each, and the argument that holds the tensors of all ranks together.
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
class Count:
    calls: int = 0
    bytes: int = 0  # of the tensors of all ranks together, where the ranks' are gathered or scattered

    def sent(self, kind: str, ranks: int) -> int:
        """Bytes that a rank sends, at the least and on average: each collective as a ring over the ranks."""
        if kind == "send":
            return self.bytes
        return self.bytes * (2 if kind == "all-reduce" else 1) * (ranks - 1) // ranks


Counts = dict[tuple[str, str], Count]  # by part and kind


class Traffic(TorchDispatchMode):
    """Counts while it is entered, by what is moved: the features of texts with their gradients, or the rest.

    What is received, and barriers, are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = {}
        self.part = REST

    @contextmanager
    def counting(self) -> Iterator["Traffic"]:
        """Inside, everything is counted."""
        with replaced(distributed, "exchanging", self._exchanging), self:
            yield self

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        self.part = TEXT
        yield
        self.part = REST

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, whole = OPERATORS.get(func._schema.name.partition("::")[2], ("", 0))
            if kind:
                count = self.counts.setdefault((TEXT if kind == "send" else self.part, kind), Count())
                count.calls += 1
                count.bytes += sum(x.nbytes for x in tree_leaves(args[whole]) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))

    def since(self, before: Counts) -> Counts:
        """What has been counted since `counts` was equal to `before`."""
        none = Count()
        earlier = {key: before.get(key, none) for key in self.counts}
        return {k: Count(c.calls - earlier[k].calls, c.bytes - earlier[k].bytes) for k, c in self.counts.items()}

    def add(self, moved: Counts, times: int = 1) -> None:
        """Count `moved` so many times, without anything being moved."""
        for key, count in moved.items():
            total = self.counts.setdefault(key, Count())
            total.calls, total.bytes = total.calls + times * count.calls, total.bytes + times * count.bytes

    def sent(self, ranks: int) -> int:
        return sum(count.sent(kind, ranks) for (_, kind), count in self.counts.items())
