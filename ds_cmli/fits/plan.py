"""A plan: which settings of a training fit on which GPU, and which of them cost the least work.

Each line of the table is a prediction of its own. Work is counted, not timed: passes over the
model, where a forward pass is one and a backward pass two, and bytes as multiples of the weights'.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

from ds_cmli.allocator import gpus
from ds_cmli.common.errors import UserError

PLAIN_PASSES = 3  # forward, and backward, which counts as two
MACHINE = 8  # GPUs that a machine has at most
MOST_WORKERS = 4  # predictions at a time: each takes 1 to 2 GB of the host's memory


@dataclass(frozen=True)
class Settings:
    """What a line of the table sets; None: the training has no place for it."""

    stage: int | None = None
    checkpointing: bool | None = None
    offload: bool | None = None
    lora: bool | None = None

    def __str__(self) -> str:
        words = [f"ZeRO-{self.stage}"] * (self.stage is not None)
        words += [name for name, value in vars(self).items() if value is True]
        return " + ".join(words) or "plain"

    def changes(self, other: "Settings") -> int:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return sum(mine != theirs for mine, theirs in pairs)


class Work(NamedTuple):
    """What a step does."""

    flops: float  # multiples of a plain step's
    between_gpus: int  # multiples of the weights' bytes; a plain step reduces and gathers them once
    to_host: float  # the same


@dataclass(frozen=True)
class Step:
    """The step of a training, which every line keeps."""

    own: Settings  # as it is configured
    pairs: int  # of a step, on each rank
    world_size: int
    caching: bool = False  # whether accumulation takes a second forward pass, for the negatives
    accumulates: bool = True  # whether a smaller micro-batch can keep the step's pairs

    @property
    def micro_batches(self) -> list[int]:
        """The divisors of the pairs of a step, from the largest on."""
        if not self.accumulates:
            return [self.pairs]
        return [n for n in range(self.pairs, 0, -1) if self.pairs % n == 0]

    def work(self, settings: Settings, micro_batch: int) -> Work:
        times = self.pairs // micro_batch
        cached = self.caching and times > 1
        passes = PLAIN_PASSES + bool(settings.checkpointing) + cached
        reduced = gathered = 1  # how often gradients and weights are, in each step
        if (settings.stage or 0) >= 2:
            reduced = times
        if settings.stage == 3:
            gathered = times * (2 + cached)
        to_host = bool(settings.offload) * (reduced + 1) / self.world_size
        between = (self.world_size > 1) * (reduced + gathered)
        return Work(passes / PLAIN_PASSES, between, to_host)


class Need(NamedTuple):
    """What a prediction says."""

    device: int  # bytes
    # By GPU on which it fits: retries of the allocator, which then returned its cache.
    fits: Mapping[str, int]


@dataclass(frozen=True)
class Line:
    settings: Settings
    micro_batch: int
    device: int  # bytes
    work: Work
    # On which no larger micro-batch fits, from the smallest on, with the retries of the allocator.
    gpus: Mapping[str, int]

    def order(self, own: Settings, prices: Mapping[str, float]) -> tuple[float, ...]:
        """Sort the least work first: of the same model, without retries and offload, then FLOPs."""
        settings, work = self.settings, self.work
        cheapest = ((prices.get(name, math.inf), size(name)) for name in self.gpus)
        gpu = min(cheapest, default=(math.inf, self.device))
        return (
            not self.gpus,
            settings.lora != own.lora,
            all(self.gpus.values()),
            work.to_host,
            work.flops,
            work.between_gpus,
            settings.changes(own),
            *gpu,
            -self.micro_batch,
        )


def size(gpu: str) -> int:
    return gpus.find(gpu).total.bytes


def workers() -> int:
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def deepspeed(world_size: int) -> list[str]:
    """DeepSpeed's launcher: by a hostfile where a machine has not so many GPUs."""
    if world_size > MACHINE:
        return ["deepspeed", "--hostfile", "hostfile"]
    return ["deepspeed", "--num_gpus", str(world_size)]


def torchrun(world_size: int) -> list[str]:
    """PyTorch's launcher, which runs on each machine."""
    nodes = math.ceil(world_size / MACHINE)
    while world_size % nodes:
        nodes += 1
    words = ["torchrun", "--nproc_per_node", str(world_size // nodes)]
    if nodes == 1:
        return words
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "NODE:29400"]
    return [*words, "--nnodes", str(nodes), *rendezvous]


def grid(step: Step) -> tuple[list[Settings], list[str]]:
    """The combinations to predict, the configured one first, and why others are left out."""
    own, left_out = step.own, []
    stages: list[int | None] = [own.stage]
    if own.stage is not None and step.world_size > 1:
        stages = [own.stage, *({2, 3} - {own.stage})]
        if own.stage >= 2:
            left_out.append(
                "stages 0 and 1: 2 needs less memory, and sends as much in one micro-batch"
            )
    elif own.stage is not None:
        stages = [own.stage, int(not own.stage)]
        left_out.append("other stages: on one rank they divide nothing")
    settings = [replace(own, stage=stage) for stage in stages]
    for name in ("checkpointing", "offload", "lora"):
        if getattr(own, name) is not None:
            settings += [replace(one, **{name: not getattr(one, name)}) for one in settings]
    if own.offload is not None:
        settings = [one for one in settings if one.stage or not one.offload]
        if own.stage == 0 or step.world_size == 1:
            left_out.append("offload at stage 0: DeepSpeed has none")
    if own.offload is not None and own.lora is not None:
        settings = [one for one in settings if one == own or not (one.offload and one.lora)]
        left_out.append("offload with LoRA: what is left of the optimizer's states is small")
    return settings, left_out


class Training(Protocol):
    """What is planned for: how a line of it is predicted and started."""

    step: Step

    def measure(self, settings: Settings, micro_batch: int, gpu: str = "") -> Need:
        """Predict a line, with the operators of `gpu`; "": of one GPU for all.

        Raises:
            UserError: the training cannot run with these settings.
        """

    def start(self, settings: Settings, micro_batch: int) -> str:
        """The command that starts it, whose files are written."""


@dataclass
class Search:
    """The lines of each combination."""

    training: Training
    names: Sequence[str]  # of the GPUs
    tell: Callable[[str], None]
    done: int = 0  # combinations

    def __post_init__(self) -> None:
        self.refused: list[str] = []

    def lines(self, settings: Sequence[Settings]) -> list[Line]:
        """Search all combinations, several at a time.

        Raises:
            UserError: the first combination, which is the configured one, cannot be predicted.
        """
        candidates = self.training.step.micro_batches
        by_gpu = min(len(candidates), len(self.names) * len(candidates).bit_length() + 1)
        kinds = f"{len(settings)} combinations of settings, {len(candidates)} micro-batches"
        self.tell(f"{kinds}: {len(settings)} to {len(settings) * by_gpu} predictions")
        with ThreadPoolExecutor(workers()) as pool:
            of_each = list(pool.map(partial(self._of, len(settings)), settings))
        self.tell("")
        if not of_each[0]:
            own = f"{settings[0]}: "
            raise UserError(next(line for line in self.refused if line.startswith(own)))
        return [line for lines in of_each for line in lines]

    def _of(self, total: int, settings: Settings) -> list[Line]:
        candidates, known = self.training.step.micro_batches, dict[int, Need]()
        largest = dict[int, list[str]]()  # GPUs by micro-batch; 0: those on which none fits
        try:
            for gpu in self.names:
                low, high = 0, len(candidates)  # what is before `low` does not fit
                while low < high:
                    middle = _guess(candidates, low, high, known, size(gpu))
                    micro_batch = candidates[middle]
                    if micro_batch not in known:
                        known[micro_batch] = self.training.measure(settings, micro_batch)
                        taken = f"{known[micro_batch].device / 1e9:.2f} GB"
                        where = f"{settings}, micro-batch {micro_batch}"
                        self.tell(f"{self.done} of {total} done; {where}: {taken}")
                    if gpu in known[micro_batch].fits:
                        high = middle
                    else:
                        low = middle + 1
                largest.setdefault([*candidates, 0][low], []).append(gpu)
        except UserError as error:
            self.refused.append(f"{settings}: {error}")
            largest.clear()
        self.done += 1
        lines = []
        for micro_batch, on in largest.items():
            at = micro_batch or candidates[-1]
            work = self.training.step.work(settings, at)
            fits = {name: known[at].fits[name] for name in on if micro_batch}
            lines.append(Line(settings, at, known[at].device, work, fits))
        return lines


def _guess(
    candidates: Sequence[int], low: int, high: int, known: Mapping[int, Need], room: int
) -> int:
    """The place from `low` to `high` of the largest candidate that fits on the line through what is
    known: of one prediction that through the origin."""
    if not known:
        return low
    first, last = min(known), max(known)
    bytes_of_one = known[last].device / last
    if first != last:
        bytes_of_one = (known[last].device - known[first].device) / (last - first)
    if bytes_of_one <= 0:
        return (low + high) // 2
    most = first + (room - known[first].device) / bytes_of_one
    return next((i for i in range(low, high) if candidates[i] <= most), high - 1)


def in_order(lines: Iterable[Line], own: Settings, prices: Mapping[str, float]) -> list[Line]:
    """The lines that fit somewhere, from the least work on, and then the others."""
    return sorted(lines, key=lambda line: line.order(own, prices))
