"""Advice for a run that is out of memory: the predicted memory by category, and one or two changes that would fit."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import compares_tokens
from ds_cmli.config.schema import Config
from ds_cmli.memory import predict_subprocess
from ds_cmli.memory.ranks import likeliest

MOST = 2  # number of proposed changes
MICRO_BATCH = "train_micro_batch_size_per_gpu"
# In elements: DeepSpeed's default, and a size whose messages are still large enough to be fast.
DEFAULT_BUCKET, SMALL_BUCKET = 500_000_000, 5_000_000
SECONDS = 120  # time limit of all predictions together; the other ranks wait meanwhile


@dataclass(frozen=True)
class Part:
    """One setting to change."""

    what: str  # as the user writes it
    loss: dict[str, Any] = field(default_factory=dict)  # settings of the section "loss"
    zero: dict[str, Any] = field(
        default_factory=dict
    )  # of the DeepSpeed JSON's "zero_optimization"
    json: dict[str, Any] = field(default_factory=dict)  # of the DeepSpeed JSON itself

    def includes(self, other: "Part") -> bool:
        """Whether it does what `other` does: it is the same, or a smaller micro-batch."""
        mine, others = (part.json.get(MICRO_BATCH) for part in (self, other))
        return self == other or bool(mine and others and mine < others)


@dataclass(frozen=True)
class Change:
    parts: tuple[Part, ...]
    config: Config  # with these changes
    ds_config: DeepSpeedConfig

    @property
    def what(self) -> str:
        return " and ".join(part.what for part in self.parts)

    def includes(self, other: "Change") -> bool:
        return all(any(part.includes(each) for part in self.parts) for each in other.parts)


RECOMPUTE = Part("--set loss.cmli_recompute=true", loss={"cmli_recompute": True})
CHECKPOINTING = Part(
    '"activation_checkpointing": {} in the DeepSpeed JSON', json={"activation_checkpointing": {}}
)
RING = Part("--set loss.cmli_exchange=ring", loss={"cmli_exchange": "ring"})
BUCKET = Part(
    f'"zero_optimization": {{"reduce_bucket_size": {SMALL_BUCKET}}}',
    zero={"reduce_bucket_size": SMALL_BUCKET},
)
OFFLOAD = Part(
    '"zero_optimization": {"offload_optimizer": {"device": "cpu"}} (slower)',
    zero={"offload_optimizer": {"device": "cpu"}},
)


def changed(config: Config, ds_config: DeepSpeedConfig, parts: Sequence[Part]) -> Change:
    """Apply `parts` in their order. Raises `UserError` if they cannot go together."""
    values = config.to_dict()
    for part in parts:
        values["loss"].update(part.loss)
        ds_config = ds_config.replaced(part.zero, **part.json)
    return Change(tuple(parts), Config.from_dict(values), ds_config)


def changes(config: Config, ds_config: DeepSpeedConfig, world_size: int, gpu: bool) -> list[Change]:
    """Changes to try: first those that train the same model, last smaller micro-batches.

    Args:
        ds_config: after `filled`.
    """
    compares = compares_tokens(config.loss.weights)
    recompute = [RECOMPUTE] if compares and not config.loss.cmli_recompute else []
    same = recompute + ([] if ds_config.checkpointing else [CHECKPOINTING])
    tried = [[part] for part in same] + ([same] if len(same) == 2 else [])
    if _can_go_round(config, world_size):
        tried.append([RING])
    stage = ds_config.stage
    if stage and ds_config.zero.get("reduce_bucket_size", DEFAULT_BUCKET) > SMALL_BUCKET:
        tried.append([BUCKET])
    if world_size > 1:
        tried += [[_stage(higher)] for higher in range(stage + 1, 4)]
    if gpu and stage and "offload_optimizer" not in ds_config.zero:
        tried.append([OFFLOAD])
    smaller = _smaller_batches(config, ds_config, world_size)
    tried += [[batch] for batch in smaller]
    if same:
        tried += [[*same, batch] for batch in smaller]
    out = []
    for parts in tried:
        with suppress(UserError):  # not every optimizer supports every stage, or offload
            out.append(changed(config, ds_config, parts))
    return out


def together(config: Config, ds_config: DeepSpeedConfig, world_size: int) -> list[Change]:
    """Changes for a GPU that train the same model, the cheapest first; each one includes those before it."""
    highest = 3 if world_size > 1 else 1
    parts = [] if ds_config.checkpointing else [CHECKPOINTING]
    if _can_go_round(config, world_size):
        parts.append(RING)
    if ds_config.stage < highest:
        parts.append(_stage(highest))
    if ds_config.zero.get("reduce_bucket_size", DEFAULT_BUCKET) > SMALL_BUCKET:
        parts.append(BUCKET)
    if "offload_optimizer" not in ds_config.zero:
        parts.append(OFFLOAD)
    return [changed(config, ds_config, parts[: 1 + last]) for last in range(len(parts))]


def proposals(
    config: Config,
    ds_config: DeepSpeedConfig,
    world_size: int,
    gpu: bool,
    room: int,
    needs: Callable[[Change], int],
) -> list[tuple[Change, int]]:
    """At most `MOST` changes that fit in `room` by `needs`, which predicts the bytes; arguments as in `changes`.

    None of them adds anything to one before it, and each part of them helps: without it, the rest does not fit.
    """
    found: list[tuple[Change, int]] = []
    for change in changes(config, ds_config, world_size, gpu):
        if any(change.includes(enough) for enough, _ in found):
            continue
        size = needs(change)
        if size <= room:
            found.append(fewest(change, size, room, config, ds_config, needs))
        if len(found) == MOST:
            break
    return found


def fewest(
    change: Change,
    size: int,
    room: int,
    config: Config,
    ds_config: DeepSpeedConfig,
    needs: Callable[[Change], int],
) -> tuple[Change, int]:
    """Leave out those parts of `change`, which needs `size`, without which it fits in `room` as well."""
    for part in change.parts:
        rest = [each for each in change.parts if each != part]
        if rest:
            less = changed(config, ds_config, rest)
            needed = needs(less)
            if needed <= room:
                change, size = less, needed
    return change, size


def _can_go_round(config: Config, world_size: int) -> bool:
    """Whether a ring would be another exchange of the texts than the configured one."""
    return (
        compares_tokens(config.loss.weights)
        and world_size > 1
        and config.loss.cmli_exchange != "ring"
    )


def _stage(stage: int) -> Part:
    return Part(f'"zero_optimization": {{"stage": {stage}}}', zero={"stage": stage})


def _smaller_batches(config: Config, ds_config: DeepSpeedConfig, world_size: int) -> list[Part]:
    """Micro-batches halved again and again, with as many pairs per step; gradient caching keeps the negatives."""
    out = []
    micro, steps = ds_config.micro_batch, ds_config.accumulation
    while micro % 2 == 0:
        micro, steps = micro // 2, steps * 2
        negatives = f"the same pairs a step, but negatives from {micro * world_size}"
        if config.optim.negatives == "global_batch":
            negatives = "same pairs and negatives, by gradient caching"
        what = f"--micro-batch {micro} with gradient_accumulation_steps {steps} ({negatives})"
        out.append(Part(what, json={MICRO_BATCH: micro, "gradient_accumulation_steps": steps}))
    return out


def _request(
    config: Config, ds_config: DeepSpeedConfig, world_size: int, target: str, snapshot: str = ""
) -> predict_subprocess.Request:
    rank = likeliest(ds_config.stage, world_size)
    return predict_subprocess.Request(
        config, ds_config, world_size, target, rank, snapshot=snapshot
    )


def table(report: dict[str, Any]) -> list[str]:
    """The lines of a prediction: bytes by category, largest first, and the predicted peak."""
    terms = sorted(((n, name) for name, n in report["categories"].items() if n), reverse=True)
    lines = [f"{name:<20} {n:>16,} B" for n, name in terms]
    lines.append(f"{'predicted peak':<20} {report['totals']['requested']:>16,} B")
    if terms:
        lines.append(f"the largest: {terms[0][1]}")
    return lines


def advise(
    config: Config,
    ds_config: DeepSpeedConfig,
    world_size: int,
    gpu: bool,
    room: int | None,
    snapshot: str,
) -> list[str]:
    """The lines of the message: the table, the largest term, and at most `MOST` settings that would fit.

    Args:
        ds_config: after `filled`.
        room: the bytes that tensors can have (on a GPU: that the allocator can reserve); None if not known.
        snapshot: the file for the predicted snapshot; "" for none.
    """
    target, total = ("cuda", "reserved") if gpu else ("cpu", "requested")
    with predict_subprocess.Predictor(SECONDS) as predictor:
        first = predictor.ask(_request(config, ds_config, world_size, target, snapshot))
        if first.report is None:
            return [f"no prediction of what would fit: {first.failed}"]
        lines = table(first.report)
        if room is None:
            return lines
        # Fragmentation keeps some memory unusable, and the run failed at or below the predicted peak: leave a tenth.
        room = min(room, first.report["totals"][total] * 9 // 10)
        too_much = room + 1

        def needs(change: Change) -> int:
            answer = predictor.ask(_request(change.config, change.ds_config, world_size, target))
            return answer.report["totals"][total] if answer.report is not None else too_much

        found = proposals(config, ds_config, world_size, gpu, room, needs)
    fits = [
        f"would fit in {room:,} B by prediction: {change.what}: {size:,} B"
        for change, size in found
    ]
    return lines + (
        fits
        or [f"no setting that was tried would fit in {room:,} B: a smaller model or more memory"]
    )
