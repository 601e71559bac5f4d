"""Estimates a step on many ranks: predicted memory and traffic, and its time from rates.

The traffic is counted in the trainer's own step on tensors without data (`predict`), and equals
that of real ranks. The time comes from a simple model, stated in `step_time`; rates are given or
measured, and it is as accurate as they are.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ds_cmli.cmli.token_keep import kept
from ds_cmli.config.registry import compares_tokens
from ds_cmli.config.schema import Config
from ds_cmli.distributed.traffic import TEXT, CallCount, Traffic
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.throughput import StepTimer
from ds_cmli.memory.largest_rank import predict_largest
from ds_cmli.memory.predict import Options


@dataclass(frozen=True)
class Rates:
    flops: float  # FLOP/s that a rank reaches in its matrix products
    node_bandwidth: float  # bytes/s that a rank sends if all ranks are in one node
    bandwidth: float  # bytes/s that a rank sends if several nodes take part
    latency: float  # seconds until a message begins to arrive
    ranks_per_node: int
    # Seconds of `scores` if a share of the pairs is kept, computed otherwise than from `flops`.
    scores: "Callable[[StepCost, float], float] | None" = None


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step costs one rank."""

    ranks: int
    stage: int
    exchange: str  # "gather" or "ring"
    cached: bool  # gradient caching: negatives from all micro-batches
    accumulation: int
    memory: int  # bytes on the device; on a CPU the requested bytes
    model_flops: float  # FLOPs of student and teacher, without recomputation
    # Images of this rank in one product, texts, patches, text positions and features; None: no such losses.
    sizes: tuple[int, int, int, int, int] | None
    checkpointing: bool
    counts: dict[tuple[str, str], CallCount]  # traffic, by part and kind

    @property
    def product_flops(self) -> float:
        """FLOPs of the similarities of this rank's images and all texts, computed once."""
        return 0.0 if self.sizes is None else 2.0 * self.accumulation * math.prod(self.sizes)

    @property
    def scores_twice(self) -> bool:
        """Whether scores are computed twice: a ring and gradient caching find argmax indices again."""
        return self.cached or (self.exchange == "ring" and self.ranks > 1)


def step_cost(
    config: Config,
    ds_config: Mapping[str, Any],
    ranks: int,
    exchange: str,
    cached: bool,
    target: str,
    gpu: str,
) -> StepCost:
    """Predict a step with this exchange of texts, with gradient caching if `cached`."""
    loss = replace(config.loss, cmli_exchange=exchange)  # type: ignore[arg-type]
    optim = replace(config.optim, negatives="global_batch" if cached else "micro_batch")
    config = replace(config, loss=loss, optim=optim)
    traffic, engines = Traffic(), []

    def watch(train_engine: TrainEngine, step: int) -> AbstractContextManager:
        if step == 0:
            train_engine.timer = StepTimer()  # makes the engine count the FLOPs of its products
            engines.append(train_engine)
            traffic.counts.clear()  # of the rank that was predicted before
            return nullcontext()
        return traffic.counting()

    report = predict_largest(
        config, ds_config, ranks, target=target, gpu=gpu, options=Options(watch=watch)
    ).report
    train_engine = engines.pop()
    accumulation = train_engine.accumulation
    micro_batch = report.setting["micro_batch"]
    texts = micro_batch * ranks * (accumulation if train_engine.caching else 1)
    sizes = None
    if compares_tokens(config.loss.weights):
        rows, columns = train_engine.objective.student.grid
        patches, tokens = (
            kept(config.loss.cmli_token_keep, n)
            for n in (rows * columns, config.data.context_length)
        )
        sizes = (micro_batch, texts, patches, tokens, config.student.embed_dim)
    product = 0.0 if sizes is None else 2.0 * math.prod(sizes)
    (counted,) = train_engine.flops.values()
    return StepCost(
        ranks, report.setting["zero_stage"], exchange, train_engine.caching, accumulation,
        report.totals.get("device", report.totals["requested"]), accumulation * (counted - 3 * product), sizes,
        bool(report.setting["checkpointing"]), traffic.counts,
    )  # fmt: skip


def step_time(cost: StepCost, rates: Rates, kept: float = 1.0) -> dict[str, float]:
    """Seconds of each part of a step; the step takes their sum.

    kept: the share of the pairs whose gradients are computed; the scores are always those of all pairs.

    model: the matrix products of student and teacher. Activation checkpointing and gradient caching
        each run the forward pass once more, which adds a third.
    scores: the all-pairs operator, three products in forward and backward. A ring adds one product,
        because it computes argmax indices again. So does gradient caching, with a ring or without,
        because it computes the scores twice. Where `rates.scores` is given, it says the time instead.
    text: the exchange of text features and their gradients. A ring's transfers overlap with
        `scores`, so only their time beyond `scores` counts; a gather does not overlap.
    rest: the exchange of gradients, parameters and softmax statistics, without any overlap.

    A collective takes its bytes divided by the bandwidth, plus log2(ranks), rounded up, times the
    latency. A transfer to the next rank takes the latency once.
    """
    model_again = cost.checkpointing + cost.cached
    scores = cost.product_flops * (1 + cost.scores_twice + 2 * kept) / rates.flops
    if rates.scores is not None:
        scores = rates.scores(cost, kept)
    out = {"model": cost.model_flops * (1 + model_again / 3) / rates.flops, "scores": scores}
    moved = {"text": 0.0, "rest": 0.0}
    bandwidth = rates.node_bandwidth if cost.ranks <= rates.ranks_per_node else rates.bandwidth
    for (part, kind), count in cost.counts.items():
        hops = 1 if kind == "send" else math.ceil(math.log2(cost.ranks)) if cost.ranks > 1 else 0
        moved[part] += count.sent(kind, cost.ranks) / bandwidth + count.calls * hops * rates.latency
    if cost.exchange == "ring" and cost.ranks > 1:
        moved[TEXT] = max(0.0, moved[TEXT] - out["scores"])
    return out | moved


def crossovers(costs: list[StepCost], rates: Rates, memory: int) -> list[str]:
    """Say from how many ranks on a ring takes less memory or time, and which steps fit."""
    lines = []
    kinds = sorted({(cost.stage, cost.cached) for cost in costs})
    for stage, cached in kinds:
        name = f"ZeRO {stage}, {'cached' if cached else 'not cached'}"
        of = {
            e: {c.ranks: c for c in costs if (c.stage, c.cached, c.exchange) == (stage, cached, e)}
            for e in ("gather", "ring")
        }
        both = sorted(of["gather"].keys() & of["ring"].keys())
        less_memory = [p for p in both if p > 1 and of["ring"][p].memory < of["gather"][p].memory]
        seconds = {e: {p: sum(step_time(of[e][p], rates).values()) for p in both} for e in of}
        faster = [p for p in both if p > 1 and seconds["ring"][p] < seconds["gather"][p]]
        parts = [
            f"a ring takes less memory {_from(less_memory, both)}",
            f"less time {_from(faster, both)}",
            *(
                f"{e} fits {_fits([p for p in sorted(of[e]) if of[e][p].memory <= memory], of[e])}"
                for e in of
            ),
        ]
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def _from(counts: list[int], of: list[int]) -> str:
    """Say "from 8 ranks on" if `found` are all numbers in `of` from 8 on, otherwise list them."""
    if not counts:
        return "nowhere"
    whole = counts == [p for p in of if p >= counts[0]]
    return f"from {counts[0]:,} ranks on" if whole else "at " + ", ".join(f"{p:,}" for p in counts)


def _fits(counts: list[int], of: Mapping[int, Any]) -> str:
    if len(counts) == len(of):
        return f"up to {max(of):,} ranks at least" if of else "nowhere"
    return "at " + ", ".join(f"{p:,}" for p in counts) if counts else "nowhere"
