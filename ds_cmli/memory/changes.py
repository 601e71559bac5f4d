"""Changes of settings with which a step needs less memory, and the fewest that make it fit."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config

MOST = 2  # number of proposed changes
MICRO_BATCH = "train_micro_batch_size_per_gpu"
# In elements: DeepSpeed's default, and a size whose messages are still large enough to be fast.
DEFAULT_BUCKET, SMALL_BUCKET = 500_000_000, 5_000_000


@dataclass(frozen=True)
class ChangedSetting:
    """One setting to change."""

    what: str  # as the user writes it
    loss: dict[str, object] = field(default_factory=dict)  # settings of the section "loss"
    student: dict[str, object] = field(default_factory=dict)
    zero: dict[str, object] = field(default_factory=dict)  # of the JSON's "zero_optimization"
    json: dict[str, object] = field(default_factory=dict)  # of the DeepSpeed JSON itself

    def includes(self, other: "ChangedSetting") -> bool:
        """Whether it does what `other` does: it is the same, or a smaller micro-batch."""
        if self == other:
            return True
        mine, others = self.json.get(MICRO_BATCH), other.json.get(MICRO_BATCH)
        return isinstance(mine, int) and isinstance(others, int) and mine < others


@dataclass(frozen=True)
class SettingsChange:
    parts: tuple[ChangedSetting, ...]
    config: Config  # with these changes
    ds_config: DeepSpeedConfig

    @property
    def what(self) -> str:
        return " and ".join(part.what for part in self.parts)

    def includes(self, other: "SettingsChange") -> bool:
        return all(map(self._has, other.parts))

    def _has(self, wanted: ChangedSetting) -> bool:
        return any(part.includes(wanted) for part in self.parts)


CHECKPOINTING = ChangedSetting(
    '"activation_checkpointing": {} in the DeepSpeed JSON', json={"activation_checkpointing": {}}
)
BUCKET = ChangedSetting(
    f'"zero_optimization": {{"reduce_bucket_size": {SMALL_BUCKET}}}',
    zero={"reduce_bucket_size": SMALL_BUCKET},
)
OFFLOAD = ChangedSetting(
    '"zero_optimization": {"offload_optimizer": {"device": "cpu"}} (slower)',
    zero={"offload_optimizer": {"device": "cpu"}},
)


def zero_stage(stage: int) -> ChangedSetting:
    return ChangedSetting(f'"zero_optimization": {{"stage": {stage}}}', zero={"stage": stage})


@dataclass(frozen=True)
class Step:
    """A training step as it is configured, and which changes would lower what it needs."""

    config: Config
    ds_config: DeepSpeedConfig  # after `filled`
    world_size: int
    gpu: bool  # whether it runs on a GPU

    def changed(self, parts: Sequence[ChangedSetting]) -> SettingsChange:
        """Apply `parts` in their order. Raises `UserError` if they cannot go together."""
        values, ds_config = self.config.to_dict(), self.ds_config
        for part in parts:
            values["loss"].update(part.loss)
            values["student"].update(part.student)
            ds_config = ds_config.replaced(part.zero, **part.json)
        return SettingsChange(tuple(parts), Config.from_dict(values), ds_config)

    def changes(self) -> list[SettingsChange]:
        """Changes to try: first those that train the same model, last smaller micro-batches."""
        zero, stage = self.ds_config.zero, self.ds_config.stage
        same: list[ChangedSetting] = []
        if not self.ds_config.checkpointing:
            same.append(CHECKPOINTING)
        tried = [[part] for part in same]
        if self._buckets_are_large():
            tried.append([BUCKET])
        if self.world_size > 1:
            tried += [[zero_stage(higher)] for higher in range(stage + 1, 4)]
        if self.gpu and "offload_optimizer" not in zero:
            tried.append([OFFLOAD])
        smaller = self._smaller_batches()
        for before in ([], same) if same else ([],):
            tried += [[*before, batch] for batch in smaller]
        out = []
        for parts in tried:
            with suppress(UserError):  # not every optimizer supports every stage, or offload
                out.append(self.changed(parts))
        return out

    def together(self) -> list[SettingsChange]:
        """Changes for a GPU that train the same model: the cheapest, and more and more with it."""
        highest = 3 if self.world_size > 1 else 1
        parts = []
        if not self.ds_config.checkpointing:
            parts.append(CHECKPOINTING)
        if self.ds_config.stage < highest:
            parts.append(zero_stage(highest))
        if self._buckets_are_large():
            parts.append(BUCKET)
        if "offload_optimizer" not in self.ds_config.zero:
            parts.append(OFFLOAD)
        return [self.changed(parts[: 1 + last]) for last in range(len(parts))]

    def _buckets_are_large(self) -> bool:
        return self.ds_config.zero.get("reduce_bucket_size", DEFAULT_BUCKET) > SMALL_BUCKET

    def _smaller_batches(self) -> list[ChangedSetting]:
        """Micro-batches halved again and again, with as many pairs per step.

        Gradient caching keeps the negatives.
        """
        out = []
        micro, steps = self.ds_config.micro_batch, self.ds_config.accumulation
        while micro % 2 == 0:
            micro, steps = micro // 2, steps * 2
            kept = f"the same pairs a step, but negatives from {micro * self.world_size}"
            if self.config.optim.negatives == "global_batch":
                kept = "same pairs and negatives, by gradient caching"
            written = f"--micro-batch {micro} with gradient_accumulation_steps {steps} ({kept})"
            json: dict[str, object] = {MICRO_BATCH: micro, "gradient_accumulation_steps": steps}
            out.append(ChangedSetting(written, json=json))
        return out


@dataclass(frozen=True)
class Shortage:
    """A step that does not fit in `room` bytes; `needs` predicts its bytes with a change."""

    step: Step
    room: int
    needs: Callable[[SettingsChange], int]

    def proposals(self) -> list[tuple[SettingsChange, int]]:
        """Find at most `MOST` changes that fit, with the bytes that they need.

        None of them adds anything to one before it, and each part of them helps: without it, the
        rest does not fit.
        """
        fitting: list[tuple[SettingsChange, int]] = []
        for change in self.step.changes():
            if any(change.includes(enough) for enough, _ in fitting):
                continue
            size = self.needs(change)
            if size <= self.room:
                fitting.append(self._fewest(change, size))
            if len(fitting) == MOST:
                break
        return fitting

    def combined(self) -> list[tuple[SettingsChange, int]]:
        """Find the fewest changes that train the same model and fit together, if there are any."""
        together = self.step.together()
        if not together or self.needs(together[-1]) > self.room:
            return []
        first = next(change for change in together if self.needs(change) <= self.room)
        return [self._fewest(first, self.needs(first))]

    def _fewest(self, change: SettingsChange, size: int) -> tuple[SettingsChange, int]:
        """Leave out those parts of `change`, which needs `size`, without which it fits as well."""
        for part in change.parts:
            rest = [part_left for part_left in change.parts if part_left != part]
            if rest:
                less = self.step.changed(rest)
                needed = self.needs(less)
                if needed <= self.room:
                    change, size = less, needed
        return change, size
