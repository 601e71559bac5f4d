"""Processes, and what travels between them: text features with their gradients, and column softmax statistics.

Only text moves, the smaller side. A rank computes its block row of the score matrix, its own B images against
the G = B * P texts of all ranks; whatever a loss needs from other rows comes as vectors of length G.

Shapes: B pairs per rank, P ranks, G = B * P, M text positions, D embedding dimension.
Gradients follow one rule: every rank's loss is the mean over its own pairs, and a gradient that belongs to another
rank is *summed* over the ranks that computed a part of it. The average over ranks that data-parallel training takes
is then exactly the gradient of the global batch's mean loss: no factor of P appears anywhere.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import rendezvous

# What launchers call the number of processes that they have started.
RANKS_STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE")


def map_launcher_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for whatever started this process.

    `deepspeed` and `torchrun` set them. A task of `srun` is mapped from its SLURM_* variables, and a plain `python`
    process is a world of one.
    """
    env = os.environ
    _check_launcher()
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if "RANK" not in env and "SLURM_STEP_ID" in env and int(tasks) > 1:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], tasks, env["SLURM_LOCALID"]
        # Where Slurm gives each task a GPU of its own to see (--gpus-per-task), that is its GPU 0.
        if len(env.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and env.get("CUDA_VISIBLE_DEVICES"):
            env["LOCAL_RANK"] = "0"
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _slurm_address(env["SLURM_STEP_NODELIST"])
        env.setdefault("MASTER_PORT", str(rendezvous.slurm_ports()[0]))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        env.setdefault(name, value)
    # Port 0 lets the store pick a free one, which only a world of one can use: nobody else has to find it.
    env.setdefault("MASTER_PORT", "0" if env["WORLD_SIZE"] == "1" else "29500")


def _check_launcher() -> None:
    """Raise `UserError` where ranks were asked for that would not train together: each would be a world of its own."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" not in env:
        raise UserError(f"RANK is {env['RANK']} and WORLD_SIZE is not set: set both, or neither for one process")
    started = {name: env[name] for name in RANKS_STARTED if env.get(name, "").isdecimal()}
    for name, number in started.items():
        if "WORLD_SIZE" in env and int(number) > int(env["WORLD_SIZE"]):
            raise UserError(
                f"{name} is {number}, but WORLD_SIZE is {env['WORLD_SIZE']}: {number} ranks were started and would not "
                "train together; unset RANK and WORLD_SIZE, or set them for every rank"
            )


def _slurm_address(nodes: str) -> str:
    """Address of the first node of a Slurm node list, which rank 0 runs on.

    Raises:
        UserError: there is no `scontrol` to ask (inside a container, for instance), or it knows no such node.
    """
    try:
        first = _scontrol("show", "hostnames", nodes).split()[0]
        try:
            socket.getaddrinfo(first, None)
            return first
        except OSError:  # the node's name in Slurm is not one that this machine's resolver knows
            return _scontrol("show", "node", first).split("NodeAddr=", 1)[1].split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"MASTER_ADDR is not set, and scontrol gives no address for the nodes {nodes!r}: "
            "set MASTER_ADDR to the first node's address"
        ) from None


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout


def init(
    timeout: timedelta = timedelta(minutes=30),
    start: timedelta = timedelta(minutes=10),
    stop: Callable[[], None] = lambda: None,
) -> torch.device:
    """Start the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device. Collective.

    Args:
        timeout: of a collective.
        start: how long the ranks wait for each other here.
        stop: called while they wait; what it raises ends that.

    Raises:
        UserError: not all ranks have come in time.
    """
    map_launcher_environment()
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= here:
            message = f"rank {os.environ['RANK']} has no GPU: its node has {here}; start one rank a GPU"
            if os.environ["RANK"] != "0":  # only rank 0's mistakes are told by themselves
                print(f"error: {message}", file=sys.stderr, flush=True)
            raise UserError(message)
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        store = rendezvous.meet(start, stop)  # collective
        store.set_timeout(timeout)
        name = "nccl" if device.type == "cuda" else "gloo"
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(name, store=store, rank=rank, world_size=ranks, timeout=timeout)  # collective
    return device


def shutdown() -> None:
    """End the process group; without it a process may abort at exit."""
    global exchanging
    exchanging = nullcontext
    if dist.is_initialized():
        # DeepSpeed caches groups and would hand the ended ones to the next engine of this process: let it end them.
        deepspeed_comm = sys.modules.get("deepspeed.comm")
        if deepspeed_comm is not None and deepspeed_comm.is_initialized():
            deepspeed_comm.destroy_process_group()
        else:
            dist.destroy_process_group()


def rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average of `values` over ranks, in place. Collective."""
    if world_size() > 1:
        dist.all_reduce(values)  # collective
        values /= world_size()
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values`, on the CPU or on this rank's device, over ranks, in place. Collective."""
    if world_size() > 1:
        moved = values.cuda() if dist.get_backend() == "nccl" else values  # NCCL takes no CPU tensors
        dist.all_reduce(moved)  # collective
        values.copy_(moved)  # CPU-GPU sync, under NCCL
    return values


def raise_together(mistake: str | None) -> None:
    """Raise the first rank's `UserError` on all ranks, where any has one. Collective."""
    told = gather_objects(mistake)  # collective
    first = next((r for r, message in enumerate(told) if message), None)
    if first is not None:
        raise UserError(told[first] if all(told) else f"rank {first}: {told[first]}")


def broadcast_object(value, source: int = 0):
    """The `value` of rank `source` on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)  # collective
    return box[0]


def gather_objects(value) -> list:
    """Every rank's `value`, in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    out: list = [None] * world_size()
    dist.all_gather_object(out, value)  # collective
    return out


def gather(x: Tensor) -> Tensor:
    """[B, K] of every rank -> [G, K] in rank order, without a gradient. Collective."""
    return x if world_size() == 1 else _all_gather(x, None)


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, ...] of every rank -> [G, ...] in rank order, bit for bit, for any dtype. Collective."""
    # As bytes: gloo supports neither bf16 nor bool.
    x = x.contiguous()
    sent = x.view(torch.uint8) if x.dtype != torch.bool else x.to(torch.uint8)
    out = torch.empty((world_size(group) * x.shape[0], *sent.shape[1:]), dtype=torch.uint8, device=x.device)
    dist.all_gather_into_tensor(out, sent, group=group)  # collective
    return out.view(x.dtype) if x.dtype != torch.bool else out.bool()


def _all_shapes(x: Tensor, group: dist.ProcessGroup | None) -> list[list[int]]:
    """Every rank's shape of `x`, in rank order. Collective, a CPU-GPU sync."""
    return _all_gather(torch.tensor([x.shape], dtype=torch.int64, device=x.device), group).tolist()


# Entered around what moves text between ranks: a training that measures its steps puts its clock here.
exchanging: Callable[[], AbstractContextManager] = nullcontext


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """fp32 (fp64 for fp64), in which gradients of several ranks are added up.

    Contributions in half precision would lose bits, and overflow under loss scaling.
    """
    return torch.promote_types(dtype, torch.float32)


def sum_to_owner(grad: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[G, ...] of every rank, summed over ranks -> this rank's rows [B, ...], fp32 (fp64 for fp64). Collective."""
    wide = accumulated(grad.dtype)
    # Contiguous: gloo sends a strided tensor's storage in the wrong order without complaint.
    grad = grad.to(wide).contiguous()
    if world_size(group) == 1:
        return grad
    own = torch.empty((len(grad) // world_size(group), *grad.shape[1:]), dtype=wide, device=grad.device)
    with exchanging():
        dist.reduce_scatter_tensor(own, grad, group=group)  # collective
    return own


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.dtype = group, x.dtype
        with exchanging():
            return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        return sum_to_owner(grad, ctx.group).to(ctx.dtype), None


def gather_with_gradient(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[B, ...] of every rank -> [G, ...]; the gradient of each row returns to its owner, summed over ranks.

    Shapes must be equal on all ranks. Collective, in forward and in backward.
    """
    return x if world_size(group) == 1 else _GatherWithGradient.apply(x, group)


def pad_text(text: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """This rank's text features [B, M, D] and masks [B, M], padded to the longest M of all ranks. Collective.

    Raises:
        ValueError: on every rank, where batch size or D differ between ranks.
    """
    if world_size(group) == 1:
        return text, mask
    shapes = _all_shapes(text, group)  # collective, and a CPU-GPU sync: they decide how the tensors are padded
    if len({(b, d) for b, _, d in shapes}) > 1:
        raise ValueError(
            f"the ranks' text features must agree in batch size and width, found [B, M, D] = {shapes}: "
            "drop the last incomplete batch"
        )
    missing = max(m for _, m, _ in shapes) - text.shape[1]
    pad = torch.nn.functional.pad
    return pad(text, (0, 0, 0, missing)), pad(mask, (0, missing))


def gather_text(text: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Every rank's text features and masks, as `pad_text` gives them: [B, M, D], bool [B, M] -> [G, M, D], bool [G, M].

    The gradient of the features returns to their owner, summed over ranks in fp32 (fp64 for fp64). Collective.
    """
    if world_size(group) == 1:
        return text, mask
    return gather_with_gradient(text, group), _all_gather(mask, group)


class _ColumnLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, group):
        ctx.group = group
        top = logits.amax(0)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)  # collective, G numbers
        total = (logits - top).exp_().sum(0)
        dist.all_reduce(total, group=group)  # collective, G numbers
        lse = top + total.log_()
        ctx.save_for_backward(logits, lse)
        return lse

    @staticmethod
    def backward(ctx, grad):
        logits, lse = ctx.saved_tensors
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)  # collective: every rank's loss may use every column
        return (logits - lse).exp_().mul_(grad), None


def column_logsumexp(logits: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """log(sum(exp)) over the images of all ranks: this rank's rows [B, G] -> [G], the same on every rank.

    fp32 or fp64. Collective, in forward and in backward: two vectors of length G there, one back.
    """
    return logits.logsumexp(0) if world_size(group) == 1 else _ColumnLogSumExp.apply(logits, group)


def logsumexp_over_ranks(lse: Tensor) -> Tensor:
    """log(sum(exp)) over the ranks of each element: [G] -> [G], equal on every rank, without a gradient. Collective."""
    if world_size() == 1:
        return lse
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)  # collective, G numbers
    total = (lse - top).exp_()
    dist.all_reduce(total)  # collective, G numbers
    return top + total.log_()
