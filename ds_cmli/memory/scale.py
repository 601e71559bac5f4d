"""What a step takes on many ranks: its memory and what it moves are predicted, its time follows from given rates.

Counts are those of the trainer's own step on tensors without data (`predict`), equal to those of real ranks. The time
is a plain model, stated in `step_time`; rates are given or measured, and the result is as good as they are.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ds_cmli.cmli.token_keep import kept
from ds_cmli.config.schema import Config
from ds_cmli.distributed.traffic import TEXT, Count, Traffic
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.throughput import StepTimer
from ds_cmli.memory.predict import predict


@dataclass(frozen=True)
class Rates:
    flops: float  # FLOP/s that a rank reaches in its matrix products
    node_bandwidth: float  # bytes/s that a rank sends to ranks of its node
    bandwidth: float  # bytes/s that it sends where other nodes take part
    latency: float  # seconds until a message has begun to arrive
    ranks_per_node: int


@dataclass(frozen=True)
class StepCost:
    """Of one rank and one optimizer step."""

    ranks: int
    stage: int
    exchange: str  # "gather" or "ring"
    cached: bool  # negatives from all micro-batches
    accumulation: int
    memory: int  # bytes of the device
    model_flops: float  # student and teacher; nothing that is computed again
    product_flops: float  # similarities of this rank's images and all texts, once
    checkpointing: bool
    counts: dict[tuple[str, str], Count]


def step_cost(
    config: Config, ds_config: Mapping[str, Any], ranks: int, exchange: str, cached: bool, target: str, gpu: str
) -> StepCost:
    """Predict a step; arguments as `predict`'s."""
    loss = replace(config.loss, cmli_exchange=exchange)  # type: ignore[arg-type]
    optim = replace(config.optim, negatives="global_batch" if cached else "micro_batch")
    config = replace(config, loss=loss, optim=optim)
    traffic, engines = Traffic(), []

    def watch(train_engine: TrainEngine, step: int) -> AbstractContextManager:
        if step == 0:
            train_engine.timer = StepTimer()  # has the products counted
            engines.append(train_engine)
            return nullcontext()
        return traffic.counting()

    report = predict(config, ds_config, ranks, target=target, gpu=gpu, watch=watch).report
    train_engine = engines.pop()
    accumulation = train_engine.accumulation
    micro_batch = report.setting["micro_batch"]
    texts = micro_batch * ranks * (accumulation if train_engine.caching else 1)
    product = 0.0
    if any(name.startswith("cmli") for name in config.loss.weights):
        rows, columns = train_engine.objective.student.grid
        patches, tokens = (kept(config.loss.cmli_token_keep, n) for n in (rows * columns, config.data.context_length))
        product = 2.0 * micro_batch * texts * patches * tokens * config.student.embed_dim
    (counted,) = train_engine.flops.values()
    return StepCost(
        ranks, report.setting["zero_stage"], exchange, train_engine.caching, accumulation,
        report.totals.get("device", report.totals["requested"]), accumulation * (counted - 3 * product),
        accumulation * product, bool(report.setting["checkpointing"]), traffic.counts,
    )  # fmt: skip


def step_time(cost: StepCost, rates: Rates) -> dict[str, float]:
    """Seconds of each part of a step, one after the other.

    model: the products of student and teacher; a third of them more for each pass forward that is done again, by
        activation checkpointing and by gradient caching.
    scores: the all-pairs op, three products forward and backward; one more where a ring computes argmax indices again,
        and one more with gradient caching, whose scores are computed twice.
    text: what moves text features and their gradients. A ring's transfers run during `scores`, and only what takes
        longer counts; gathering is waited for.
    rest: gradients, parameters and softmax statistics, none of it hidden.

    A collective takes its bytes at the bandwidth, and log2(ranks) times the latency; a transfer to the next rank once.
    """
    again = cost.checkpointing + cost.cached
    ring = cost.exchange == "ring" and cost.ranks > 1
    out = {
        "model": cost.model_flops * (1 + again / 3) / rates.flops,
        "scores": cost.product_flops * (3 + ring + cost.cached) / rates.flops,
    }
    moved = {"text": 0.0, "rest": 0.0}
    bandwidth = rates.node_bandwidth if cost.ranks <= rates.ranks_per_node else rates.bandwidth
    for (part, kind), count in cost.counts.items():
        hops = 1 if kind == "send" else math.ceil(math.log2(cost.ranks)) if cost.ranks > 1 else 0
        moved[part] += count.sent(kind, cost.ranks) / bandwidth + count.calls * hops * rates.latency
    if ring:
        moved[TEXT] = max(0.0, moved[TEXT] - out["scores"])
    return out | moved


def crossovers(costs: list[StepCost], rates: Rates, memory: int) -> list[str]:
    """In words: from how many ranks on a ring takes less memory, or less time; where steps stop fitting in `memory`."""
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
            *(f"{e} fits {_fits([p for p in sorted(of[e]) if of[e][p].memory <= memory], of[e])}" for e in of),
        ]
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def _from(found: list[int], of: list[int]) -> str:
    """As "from 8 ranks on", of those that were looked at."""
    if not found:
        return "nowhere"
    whole = found == [p for p in of if p >= found[0]]
    return f"from {found[0]:,} ranks on" if whole else "at " + ", ".join(f"{p:,}" for p in found)


def _fits(found: list[int], of: Mapping[int, Any]) -> str:
    if len(found) == len(of):
        return f"up to {max(of):,} ranks at least" if of else "nowhere"
    return "at " + ", ".join(f"{p:,}" for p in found) if found else "nowhere"
