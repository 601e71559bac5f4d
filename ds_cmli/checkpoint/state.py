"""The state of a run beside the engine: position in the data, random generators, sums.

`state.json` of a checkpoint holds what all ranks share, `rank-R.pt` what each has of its own.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_cmli.checkpoint.storage import load_tensors
from ds_cmli.data.pairs import BadSamples
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import blame

STATE = "state.json"
RANK_FIELDS = ("sums", "micro_batches", "bad_count", "bad_first", "generators")


@dataclass
class TrainState:
    """Everything that the next step depends on except the engine's state."""

    step: int = 0  # optimizer steps done
    evaluated: bool = False  # whether the evaluation that is due at `step` is done
    sampler: dict[str, int] = field(default_factory=dict)  # `GlobalBatchSampler.state_dict`
    best: dict[str, Any] = field(default_factory=dict)  # `summary.best_result`, and its sha256
    worse_in_row: int = 0  # evaluations since the best one
    skipped_in_row: int = 0  # steps skipped because loss or gradients were not finite
    world_size: int = 1
    train_batch_size: int = 0  # pairs of an optimizer step, over all ranks
    accumulation: int = 1
    rebatched: bool = False  # the number of ranks has changed, and with it the micro-batch
    config: dict[str, Any] = field(default_factory=dict)  # what `settings_to_keep` returns
    resumed_from: str = ""  # the path of --resume PATH
    # SHA-256 of the files beside `checkpoint/` that follow from this state, by their names.
    models: dict[str, str | None] = field(default_factory=dict)

    # These are different on each rank. The sums are those of `MicroBatchLosses.stacked`, in fp32.
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))
    micro_batches: int = 0  # since the last logged step, over which `sums` adds up
    bad_count: int = 0  # samples that could not be used
    bad_first: list[tuple[str, str]] = field(default_factory=list)
    generators: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_best(self) -> bool:
        """True if the best result was found at this step."""
        return self.best.get("step") == self.step

    def count_evaluation(self) -> None:
        """Record an evaluation; called after `best` was updated."""
        self.evaluated = True
        self.worse_in_row = 0 if self.is_best else self.worse_in_row + 1

    def out_of_patience(self, patience: int) -> bool:
        return self.evaluated and 0 < patience <= self.worse_in_row

    def shared_part(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in RANK_FIELDS}

    def rank_part(self) -> dict[str, Any]:
        """Return this rank's part. CPU-GPU sync."""
        return {name: getattr(self, name) for name in RANK_FIELDS} | {"sums": self.sums.cpu()}

    def capture(self, sampler: GlobalBatchSampler, bad_samples: BadSamples) -> None:
        """Copy the state that is kept elsewhere, before a checkpoint. CPU-GPU sync."""
        self.world_size = distributed.world_size()
        self.sampler = sampler.state_dict()
        self.generators = generator_states()
        self.bad_count = bad_samples.count
        self.bad_first = list(bad_samples.first)

    def restore(self, rank_part: dict[str, Any], bad_samples: BadSamples) -> None:
        """Put back what `rank_part` returned. Nothing may draw random numbers after it."""
        no_sums = self.sums
        vars(self).update(rank_part)
        self.sums = self.sums.to(no_sums.device)
        if len(self.sums) != len(no_sums):  # resumed with other losses
            self.sums = no_sums
            self.micro_batches = 0
        bad_samples.count = self.bad_count
        bad_samples.first = self.bad_first
        torch.set_rng_state(self.generators["torch"])
        if torch.cuda.is_available() and "cuda" in self.generators:
            torch.cuda.set_rng_state(self.generators["cuda"])


def generator_states() -> dict[str, Tensor]:
    """Return the states of PyTorch's generators: a step draws from no other. CPU-GPU sync."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"torch": torch.get_rng_state(), **cuda}


def read_state(checkpoint: Path) -> TrainState:
    """Return the part that all ranks share. Raises `UserError`."""
    path = checkpoint / STATE
    with blame(f"{path} is no state of a run of this version: --resume another one"):
        return TrainState(**json.loads(path.read_text()))


def read_rank_part(checkpoint: Path, num_written: int) -> dict[str, Any]:
    """Return this rank's part of the state, which `num_written` ranks have written.

    If the number of ranks has changed, rank 0 reads all parts. Each rank gets the mean of `sums`;
    rank 0 gets the counts, of which only the sum is used. A new rank keeps the generators that this
    start has seeded. Collective then.
    """
    rank = distributed.rank()
    files = [checkpoint / f"rank-{number}.pt" for number in range(num_written)]
    if num_written == distributed.world_size():
        return load_tensors(files[rank])
    parts: list[dict[str, Any]] = []
    with distributed.raised_together():  # collective
        if distributed.is_main():
            parts = [load_tensors(file) for file in files]
    parts = distributed.broadcast_object(parts)  # collective
    first = parts[0]
    return {
        "sums": torch.stack([part["sums"] for part in parts]).mean(0),
        "micro_batches": first["micro_batches"],
        "bad_count": sum(part["bad_count"] for part in parts) if rank == 0 else 0,
        "bad_first": first["bad_first"] if rank == 0 else [],
        "generators": parts[rank]["generators"] if rank < num_written else generator_states(),
    }
