"""The state of a run beside the engine's: what it is, how a checkpoint holds it, and how other ranks take it over."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.data import BadSamples, GlobalBatchSampler
from ds_cmli.data.bad import Bad

STATE = "state.json"
OF_RANK = ("sums", "micro_batches", "bad_count", "bad_first", "generators")  # the fields that differ between ranks


@dataclass
class TrainState:
    """Everything beside the engine that the next step depends on.

    DeepSpeed's files hold the rest: weights and temperatures with their fp32 copies, optimizer, loss scale and learning
    rate schedule. Sampler, broken samples and random generators are held by others; `capture` and `put_back` move
    their state in here before a checkpoint and out of here after one was read.
    """

    # The same on every rank: `state.json` of a checkpoint.
    step: int = 0  # optimizer steps done, skipped ones included; TensorBoard's step too
    sampler: dict[str, int] = field(default_factory=dict)  # `GlobalBatchSampler.state_dict()`: epoch and position
    evaluated: bool = True  # False: the evaluation due at `step` is still to be done
    best: dict[str, Any] = field(default_factory=dict)  # `{"metric", "value", "step", "pairs", "chance"}`
    worse_in_row: int = 0  # evaluations since the best one
    skipped_in_row: int = 0  # steps skipped for values that were not finite, up to now
    world_size: int = 1
    train_batch_size: int = 0  # pairs of an optimizer step, over all ranks
    accumulation: int = 1
    rebatched: bool = False  # the number of ranks has changed since: micro-batches are then not those asked for
    config: dict[str, Any] = field(default_factory=dict)  # what `settings.py` compares at resume
    digest: str = ""  # of `config`

    # Of each rank: its `rank-R.pt`, plain values and tensors only.
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))  # fp32, of each loss and ignored negatives
    micro_batches: int = 0  # since the last logged step, which `sums` adds up
    bad_count: int = 0  # samples that could not be used
    bad_first: list[Bad] = field(default_factory=list)
    generators: dict[str, Any] = field(default_factory=dict)

    @property
    def is_best(self) -> bool:
        """Whether the best result is that of this step."""
        return self.best.get("step") == self.step

    def count_evaluation(self) -> None:
        """After `best` was brought up to date."""
        self.evaluated, self.worse_in_row = True, 0 if self.is_best else self.worse_in_row + 1

    def out_of_patience(self, patience: int) -> bool:
        return self.evaluated and 0 < patience <= self.worse_in_row

    def shared(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in OF_RANK}

    def of_rank(self) -> dict[str, Any]:
        """CPU-GPU sync."""
        return {name: getattr(self, name) for name in OF_RANK} | {"sums": self.sums.cpu()}

    def capture(self, sampler: GlobalBatchSampler, bad: BadSamples) -> None:
        """Take in what changes outside, before a checkpoint. CPU-GPU sync."""
        self.sampler, self.generators = sampler.state_dict(), generators()
        self.bad_count, self.bad_first = bad.count, list(bad.first)

    def put_back(self, of_rank: dict[str, Any], bad: BadSamples) -> None:
        """Go on from what `of_rank` returned. Last of all: nothing that follows may draw random numbers."""
        device, losses = self.sums.device, len(self.sums)
        vars(self).update(of_rank)
        self.sums = self.sums.to(device)
        if len(self.sums) != losses:  # resumed with other losses
            self.sums, self.micro_batches = torch.zeros(losses, device=device), 0
        bad.count, bad.first = self.bad_count, self.bad_first
        restore_generators(self.generators)


def read_shared(path: Path) -> TrainState:
    """The shared part of a verified checkpoint; raises `UserError` where another version wrote fields unknown here."""
    values = json.loads((path / STATE).read_text())
    if "cut" in values:  # the former name
        values["rebatched"] = values.pop("cut")
    unknown = sorted({*values} - {*TrainState().shared()})
    if unknown:
        raise UserError(
            f"{path / STATE} has {', '.join(unknown)}, which this version does not know: go on with the version that "
            "wrote it, named in the run's config.json"
        )
    return TrainState(**values)


def read_of_rank(path: Path, rank: int) -> dict[str, Any]:
    """The part of one of the ranks that wrote the checkpoint; raises `UserError` as `read_shared`."""
    values = torch.load(path / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
    unknown = sorted({*values} - {*OF_RANK})
    if unknown:
        raise UserError(f"{path}: rank-{rank}.pt has {', '.join(unknown)}, which this version does not know")
    return values


def generators() -> dict[str, Any]:
    """The state of every random generator of this process, as plain values and tensors. CPU-GPU sync."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_generators(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def redistribute(ranks: list[dict[str, Any]], rank: int, world_size: int, seed: int) -> dict[str, Any]:
    """This rank's part of the state, out of the parts that another number of ranks left.

    Averaged over the new ranks, `sums` give what they gave over the former ones; counts go to rank 0, as only their sum
    is used. A rank that existed before goes on with its random generators, a new one starts from its rank and `seed`.
    """
    part = {"sums": torch.stack([r["sums"] for r in ranks]).mean(0), "micro_batches": ranks[0]["micro_batches"]}
    part["bad_count"] = sum(r["bad_count"] for r in ranks) if rank == 0 else 0
    part["bad_first"] = ranks[0]["bad_first"] if rank == 0 else []
    if rank < len(ranks):
        part["generators"] = ranks[rank]["generators"]
    else:
        random.seed(f"{seed} {rank} {world_size}")
        fresh = random.getrandbits(31)
        np.random.seed(fresh)
        torch.manual_seed(fresh)
        part["generators"] = generators()
    return part
