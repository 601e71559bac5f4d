"""Advice for a run that is out of memory: the predicted memory by category, and one or two changes that would fit."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.losses import compares_tokens
from ds_cmli.memory import predict_subprocess

MOST = 2  # number of proposed changes
RING = "--set loss.cmli_exchange=ring"
# In elements: DeepSpeed's default, and a size whose messages are still large enough to be fast.
DEFAULT_BUCKET, SMALL_BUCKET = 500_000_000, 5_000_000
SECONDS = 120  # time limit of all predictions together; the other ranks wait meanwhile


@dataclass(frozen=True)
class Change:
    what: str  # the change as the user writes it
    config: Config
    ds_config: DeepSpeedConfig


def changes(config: Config, ds_config: DeepSpeedConfig, world_size: int, gpu: bool) -> list[Change]:
    """Changes to try: first those that train the same model, last smaller micro-batches.

    Args:
        ds_config: after `filled`.
    """
    out = []
    same: list[Change] = []
    if compares_tokens(config.loss.weights) and not config.loss.cmli_recompute:
        same.append(Change("--set loss.cmli_recompute=true", _with_loss(config, cmli_recompute=True), ds_config))
    if not ds_config.checkpointing:
        changed = ds_config.replaced(activation_checkpointing={})
        same.append(Change('"activation_checkpointing": {} in the DeepSpeed JSON', config, changed))
    out += same
    if len(same) == 2:
        out.append(Change(f"{same[0].what} and {same[1].what}", same[0].config, same[1].ds_config))
    if _can_go_round(config, world_size):
        out.append(Change(RING, _with_loss(config, cmli_exchange="ring"), ds_config))
    stage = ds_config.stage
    if stage and ds_config.zero.get("reduce_bucket_size", DEFAULT_BUCKET) > SMALL_BUCKET:
        smaller = ds_config.replaced({"reduce_bucket_size": SMALL_BUCKET})
        out.append(Change(f'"zero_optimization": {{"reduce_bucket_size": {SMALL_BUCKET}}}', config, smaller))
    if world_size > 1:
        for higher in range(stage + 1, 4):
            with suppress(UserError):  # not every optimizer supports it
                changed = ds_config.replaced({"stage": higher})
                out.append(Change(f'"zero_optimization": {{"stage": {higher}}}', config, changed))
    if gpu and stage and "offload_optimizer" not in ds_config.zero:
        with suppress(UserError):
            changed = ds_config.replaced({"offload_optimizer": {"device": "cpu"}})
            out.append(
                Change('"zero_optimization": {"offload_optimizer": {"device": "cpu"}} (slower)', config, changed)
            )
    thrifty = [c for c in out if c.what.startswith(same[0].what)][-1:] if same else []
    for base in (Change("", config, ds_config), *thrifty):
        out += _smaller_batches(base, world_size)
    return out


def together(config: Config, ds_config: DeepSpeedConfig, world_size: int) -> list[Change]:
    """Changes for a GPU that train the same model, the cheapest first; each one includes those before it."""
    out: list[Change] = []

    def add(what: str, **settings: Any) -> None:
        before = out[-1] if out else Change("", config, ds_config)
        zero, changed = settings.pop("zero", {}), _with_loss(before.config, **settings.pop("loss", {}))
        what = f"{before.what} and {what}" if out else what
        out.append(Change(what, changed, before.ds_config.replaced(zero, **settings)))

    if not ds_config.checkpointing:
        add('"activation_checkpointing": {}', activation_checkpointing={})
    highest = 3 if world_size > 1 else 1
    if _can_go_round(config, world_size):
        add(RING, loss={"cmli_exchange": "ring"})
    if ds_config.stage < highest:
        add(f'"zero_optimization": {{"stage": {highest}}}', zero={"stage": highest})
    if ds_config.zero.get("reduce_bucket_size", DEFAULT_BUCKET) > SMALL_BUCKET:
        add(f'"reduce_bucket_size": {SMALL_BUCKET} in it', zero={"reduce_bucket_size": SMALL_BUCKET})
    if "offload_optimizer" not in ds_config.zero:
        add('"offload_optimizer": {"device": "cpu"} in it (slower)', zero={"offload_optimizer": {"device": "cpu"}})
    return out


def _can_go_round(config: Config, world_size: int) -> bool:
    """Whether a ring would be another exchange of the texts than the configured one."""
    return compares_tokens(config.loss.weights) and world_size > 1 and config.loss.cmli_exchange != "ring"


def _with_loss(config: Config, **settings: Any) -> Config:
    values = config.to_dict()
    values["loss"].update(settings)
    return Config.from_dict(values)


def _smaller_batches(base: Change, world_size: int) -> list[Change]:
    """Micro-batches halved again and again, with as many pairs per step; gradient caching keeps the negatives."""
    out = []
    micro, steps = base.ds_config.micro_batch, base.ds_config.accumulation
    while micro % 2 == 0:
        micro, steps = micro // 2, steps * 2
        changed = base.ds_config.replaced(train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps)
        negatives = f"the same pairs a step, but negatives from {micro * world_size}"
        if base.config.optim.negatives == "global_batch":
            negatives = "same pairs and negatives, by gradient caching"
        what = f"--micro-batch {micro} with gradient_accumulation_steps {steps} ({negatives})"
        out.append(Change(f"{base.what} and {what}" if base.what else what, base.config, changed))
    return out


def table(report: dict[str, Any]) -> list[str]:
    """The lines of a prediction: bytes by category, largest first, and the predicted peak."""
    terms = sorted(((n, name) for name, n in report["categories"].items() if n), reverse=True)
    lines = [f"{name:<20} {n:>16,} B" for n, name in terms]
    lines.append(f"{'predicted peak':<20} {report['totals']['requested']:>16,} B")
    if terms:
        lines.append(f"the largest: {terms[0][1]}")
    return lines


def advise(
    config: Config, ds_config: DeepSpeedConfig, world_size: int, gpu: bool, room: int | None, snapshot: str
) -> list[str]:
    """The lines of the message: the table, the largest term, and at most `MOST` settings that would fit.

    Args:
        ds_config: after `filled`.
        room: the bytes that tensors can have (on a GPU: that the allocator can reserve); None if not known.
        snapshot: the file for the predicted snapshot; "" for none.
    """
    target, total = ("cuda", "reserved") if gpu else ("cpu", "requested")
    tried = changes(config, ds_config, world_size, gpu) if room is not None else []
    proposals: list[str] = []
    fits: list[str] = []
    with predict_subprocess.Predictor(SECONDS) as predictor:
        first = predictor.ask(predict_subprocess.Request(config, ds_config, world_size, target, snapshot=snapshot))
        if first.report is None:
            return [f"no prediction of what would fit: {first.failed}"]
        lines = table(first.report)
        if room is None:
            return lines
        # Fragmentation keeps some memory unusable, and the run failed at or below the predicted peak: leave a tenth.
        room = min(room, first.report["totals"][total] * 9 // 10)
        for change in tried:
            if any(enough in change.what for enough in fits):
                continue  # it includes a change that is enough by itself
            answer = predictor.ask(predict_subprocess.Request(change.config, change.ds_config, world_size, target))
            needed = answer.report["totals"][total] if answer.report is not None else room + 1
            if needed <= room:
                fits.append(change.what)
                proposals.append(f"would fit in {room:,} B by prediction: {change.what}: {needed:,} B")
            if len(fits) == MOST:
                break
    return lines + (proposals or [f"no setting that was tried would fit in {room:,} B: a smaller model or more memory"])
