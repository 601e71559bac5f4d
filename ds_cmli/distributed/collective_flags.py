"""Decisions that all ranks take together, such as whether any rank was signalled, has failed, or has to save."""

import torch
import torch.distributed as dist

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.launchers import this_node


class CollectiveFlags:
    """Small messages between the ranks' CPUs, over a gloo group. Over NCCL each of them would be a CPU-GPU sync."""

    def __init__(self):
        self.group: dist.ProcessGroup | None = None
        if distributed.world_size() > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")  # collective

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank. Collective."""
        if distributed.world_size() == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.group)  # collective, on the CPU
        return raised.bool().tolist()

    def gather(self, value) -> list:
        """Every rank's `value`, on every rank. Collective."""
        if distributed.world_size() == 1:
            return [value]
        out: list = [None] * distributed.world_size()
        dist.all_gather_object(out, value, group=self.group)  # collective, on the CPU
        return out

    def raise_together(self, error: Exception | None) -> None:
        """Raise on all ranks after some have failed: an unexpected error on its own rank, else the first rank's message
        as a `UserError`. Collective."""
        message = None if error is None else str(error) or type(error).__name__
        nodes, messages = zip(*self.gather((this_node(), message)), strict=True)  # collective
        if error is not None and not isinstance(error, UserError):
            raise error
        rank, message = next((r, m) for r, m in enumerate(messages) if m is not None)
        alone = distributed.world_size() == 1
        raise UserError(message if alone else f"{distributed.named(rank, nodes)}: {message}")
