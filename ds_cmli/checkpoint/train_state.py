"""Where a run stands: everything beside the engine's own state that the next step depends on."""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ds_cmli.data.bad import Bad


@dataclass
class TrainState:
    """The same on every rank; JSON in the checkpoint.

    DeepSpeed's files hold the rest of what is shared: weights and temperatures with their fp32 copies, optimizer,
    loss scale and learning rate schedule.
    """

    step: int = 0  # optimizer steps done, skipped ones included; TensorBoard's step too
    sampler: dict[str, int] = field(default_factory=dict)  # `GlobalBatchSampler.state_dict()`: epoch and position
    evaluated: bool = True  # False: the evaluation due at `step` is still to be done
    best: dict[str, Any] = field(default_factory=dict)  # `{"metric", "value", "step", "pairs", "chance"}`
    skipped_in_row: int = 0  # steps skipped for values that were not finite, up to now
    world_size: int = 1
    train_batch_size: int = 0  # pairs of an optimizer step, over all ranks
    accumulation: int = 1
    rebatched: bool = False  # the number of ranks has changed since: micro-batches are then not those asked for
    config: dict[str, Any] = field(default_factory=dict)  # what `settings.py` compares at resume
    digest: str = ""  # of `config`

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class RankState:
    """One rank's own; a file for each in the checkpoint, of plain values and tensors only.

    `sums` holds the losses and ignored negatives added up since the last logged step, fp32, over `micro_batches`.
    """

    sums: torch.Tensor
    micro_batches: int = 0
    bad_count: int = 0
    bad_first: list[Bad] = field(default_factory=list)
    generators: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "sums": self.sums.cpu()}  # CPU-GPU sync


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


def redistribute(ranks: list[dict[str, Any]], rank: int, world_size: int, seed: int) -> RankState:
    """This rank's state out of the states that another number of ranks left.

    Averaged over the new ranks, `sums` give what they gave over the old ones; counts go to rank 0, as only their sum
    is used. A rank that was there goes on with its random generators, a new one starts its own.
    """
    sums = torch.stack([r["sums"] for r in ranks]).mean(0)
    state = RankState(sums, ranks[0]["micro_batches"])
    if rank == 0:
        state.bad_count = sum(r["bad_count"] for r in ranks)
        state.bad_first = ranks[0]["bad_first"]
    if rank < len(ranks):
        state.generators = ranks[rank]["generators"]
    else:
        random.seed(f"{seed} {rank} {world_size}")
        fresh = random.getrandbits(31)
        np.random.seed(fresh)
        torch.manual_seed(fresh)
        state.generators = generators()
    return state
