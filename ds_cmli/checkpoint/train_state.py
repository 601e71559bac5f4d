"""The state of a run without the engine's, in a checkpoint, and for other numbers of ranks."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import read
from ds_cmli.config.schema import Number, PositiveCount
from ds_cmli.config.validation import check_kind
from ds_cmli.data.batch import Bad
from ds_cmli.data.pairs import BadSamples
from ds_cmli.data.sampler import GlobalBatchSampler

STATE = "state.json"


Position = Annotated[int, Field(ge=0, lt=2**63)]
Nothing = Annotated[dict[str, object], Field(max_length=0)]


class SamplerState(TypedDict):
    epoch: Number
    position: Position
    length: Position
    seed: Number


class Best(TypedDict):
    """The best result."""

    metric: str
    value: float
    step: Number
    pairs: Number
    chance: float


class Generators(TypedDict, total=False):
    """The states of all random generators of a process, as plain values and tensors."""

    python: tuple
    numpy: tuple
    torch: Tensor
    cuda: Tensor


class OfRank(TypedDict):
    """The fields of `TrainState` that differ between ranks."""

    sums: Tensor
    micro_batches: int
    bad_count: int
    bad_first: list[Bad]
    generators: Generators


OF_RANK = tuple(OfRank.__annotations__)


@dataclass
class TrainState:
    """Everything that the next step depends on except the engine's state.

    DeepSpeed's files hold the rest: weights and temperatures with their fp32 copies, optimizer,
    loss scale and learning rate schedule. Sampler, bad samples and random generators are kept
    elsewhere; `capture` copies their state here before a checkpoint is saved, and `put_back`
    restores the latter two after one was read.
    """

    # The same on every rank: `state.json` of a checkpoint.
    step: Number = 0  # optimizer steps done, skipped ones included; also TensorBoard's step
    sampler: dict[str, int] = field(default_factory=dict)  # epoch and position
    evaluated: bool = True  # False: the evaluation due at `step` is still to be done
    # `{"metric", "value", "step", "pairs", "chance"}`
    best: dict[str, Any] = field(default_factory=dict)
    worse_in_row: Number = 0  # evaluations since the best one
    # How many of the last steps in a row were skipped for values that were not finite.
    skipped_in_row: Number = 0
    # Lines of metrics.jsonl that belong to the steps done; 0: not known, as in older runs.
    metrics_lines: Number = 0
    world_size: PositiveCount = 1
    train_batch_size: Number = 0  # pairs of an optimizer step, over all ranks
    accumulation: PositiveCount = 1
    # The number of ranks has changed, so micro-batches are not those of the settings.
    rebatched: bool = False
    config: dict[str, Any] = field(default_factory=dict)  # what `settings.py` compares at resume
    digest: str = ""  # the SHA-256 of `config`

    # Different on each rank: `rank-R.pt` of a checkpoint, plain values and tensors only. The sums
    # are those of `MicroBatchLosses.stacked`, in fp32.
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))
    # Number of micro-batches since the last logged step, over which `sums` adds up.
    micro_batches: int = 0
    bad_count: int = 0  # samples that could not be used
    bad_first: list[Bad] = field(default_factory=list)
    generators: Generators = field(default_factory=Generators)

    @property
    def is_best(self) -> bool:
        """Whether the best result was found at this step."""
        return self.best.get("step") == self.step

    def count_evaluation(self) -> None:
        """Record an evaluation; called after `best` was updated."""
        self.evaluated = True
        self.worse_in_row = 0 if self.is_best else self.worse_in_row + 1

    def out_of_patience(self, patience: int) -> bool:
        return self.evaluated and 0 < patience <= self.worse_in_row

    def shared(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in OF_RANK}

    def of_rank(self) -> OfRank:
        """The fields of this rank. CPU-GPU sync."""
        of_rank = {name: value for name, value in vars(self).items() if name in OF_RANK}
        return cast("OfRank", of_rank | {"sums": self.sums.cpu()})

    def capture(self, sampler: GlobalBatchSampler, bad: BadSamples) -> None:
        """Copy the state that is kept elsewhere, before a checkpoint. CPU-GPU sync."""
        self.sampler, self.generators = sampler.state_dict(), generators()
        self.bad_count, self.bad_first = bad.count, list(bad.first)

    def put_back(self, of_rank: OfRank, bad: BadSamples) -> None:
        """Restore what `of_rank` returned. Last: nothing may draw random numbers after it."""
        device, losses = self.sums.device, len(self.sums)
        vars(self).update(of_rank)
        self.sums = self.sums.to(device)
        if len(self.sums) != losses:  # resumed with other losses
            self.sums, self.micro_batches = torch.zeros(losses, device=device), 0
        bad.count, bad.first = self.bad_count, self.bad_first
        restore_generators(self.generators)


def read_shared(path: Path) -> TrainState:
    """Read the shared part of a verified checkpoint; `UserError` on fields of another version."""
    try:
        values = read(path / STATE, dict)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / STATE} is no state of a run ({error}): --resume another one"
        ) from None
    unknown = sorted({*values} - {*TrainState().shared()})
    if unknown:
        raise UserError(
            f"{path / STATE} has {', '.join(unknown)}, which this version does not know: go on "
            "with the version that wrote it, named in the run's config.json"
        )
    try:
        kinds = get_type_hints(TrainState, include_extras=True)
        kinds |= {"sampler": SamplerState | Nothing, "best": Best | Nothing}
        for name in ("step", "sampler", "config", *values):
            check_kind(name, values.get(name), kinds[name])
    except ValueError as error:
        raise UserError(f"{path / STATE} is damaged: {error}: --resume another one") from None
    return TrainState(**values)


def read_of_rank(path: Path, rank: int) -> OfRank:
    """Read the part of one of the ranks that wrote it; raises `UserError` as `read_shared` does."""
    values = torch.load(path / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
    if not isinstance(values, dict) or not {"sums", "generators"} <= {*values}:
        raise UserError(f"{path}: rank-{rank}.pt is no state of a rank: --resume another one")
    unknown = sorted({*map(str, values)} - {*OF_RANK})
    if unknown:
        raise UserError(
            f"{path}: rank-{rank}.pt has {', '.join(unknown)}, which this version does not know"
        )
    return cast("OfRank", values)


def generators() -> Generators:
    """The states of all random generators. CPU-GPU sync."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: Generators = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_generators(state: Generators) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def redistribute(ranks: list[OfRank], rank: int, world_size: int, seed: int) -> OfRank:
    """This rank's part of the state, computed from the parts that another number of ranks saved.

    The mean of `sums` over the new ranks equals that over the former ranks. Counts go to rank 0,
    because only their sum is used. A rank that existed before continues its random generators; a
    new one seeds them with its rank and `seed`.
    """
    if rank < len(ranks):
        own = ranks[rank]["generators"]
    else:
        random.seed(f"{seed} {rank} {world_size}")
        fresh = random.getrandbits(31)
        np.random.seed(fresh)
        torch.manual_seed(fresh)
        own = generators()
    part: OfRank = {
        "sums": torch.stack([r["sums"] for r in ranks]).mean(0),
        "micro_batches": ranks[0]["micro_batches"],
        "bad_count": 0,
        "bad_first": [],
        "generators": own,
    }
    if rank == 0:
        part["bad_count"] = sum(r["bad_count"] for r in ranks)
        part["bad_first"] = ranks[0]["bad_first"]
    return part
