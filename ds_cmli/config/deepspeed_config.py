"""The DeepSpeed JSON as an immutable object: loaded, checked, and with its "auto" values filled.

Every setting of the JSON takes effect, or one line refuses it or says that it does not. "auto"
means the same as in Hugging Face's integration. Derived values are read here; only `raw` gives the
JSON itself, for `deepspeed.initialize`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject, Section, read
from ds_cmli.config import deepspeed_checks as checks
from ds_cmli.config import deepspeed_keys as keys
from ds_cmli.config.deepspeed_effects import beyond_the_run, without_effect
from ds_cmli.config.deepspeed_keys import BATCH_KEYS, FILLED
from ds_cmli.config.optimizers import OPTIMIZERS, SCHEDULERS, OptimizerEntry, optimizer_name
from ds_cmli.config.schema import OptimConfig
from ds_cmli.config.validation import check

LOGS = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level")


class BatchSizes(NamedTuple):
    train: int  # pairs per step, of all ranks
    micro: int  # pairs per micro-batch of a rank
    accumulation: int  # micro-batches per step


@dataclass(frozen=True)
class DeepSpeedConfig(Mapping):
    """A read-only mapping of the JSON's top level, with derived values as properties.

    `load` or `of` checks the JSON, `on` decides what depends on the device, and `filled` replaces
    all remaining "auto" values. Each returns a new object.
    """

    content: Section
    # Lines to print about settings that act unexpectedly.
    notices: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", copy.deepcopy(dict(self.content)))

    def __getitem__(self, key: str) -> Any:
        return copy.deepcopy(self.content[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def raw(self) -> JsonObject:
        """A copy of the JSON, which the caller may change."""
        return copy.deepcopy(dict(self.content))

    @classmethod
    def load(cls, path: str | Path) -> "DeepSpeedConfig":
        """Read and check a file; raises `UserError` with one line for the first mistake in it."""
        try:
            return cls.of(_read(Path(path)))
        except UserError as error:
            raise UserError(f"--deepspeed_config {path}: {error}") from None

    @classmethod
    def of(cls, content: Section) -> "DeepSpeedConfig":
        """Check the content of such a file. Raises `UserError`."""
        if isinstance(content, cls):
            return content
        return cls(checks.checked(content), tuple(without_effect(content)))

    def replaced(
        self, zero_optimization: JsonObject | None = None, **settings: Any
    ) -> "DeepSpeedConfig":
        """Copy it with these keys set; None removes one.

        The keys of `zero_optimization` are set one by one.
        """
        changed = self.raw()
        for key, value in settings.items():
            changed[key] = value
            if value is None:
                del changed[key]
        if zero_optimization is not None:
            changed.setdefault("zero_optimization", {}).update(zero_optimization)
        new = DeepSpeedConfig.of(changed)
        still_true = [line for line in self.notices if line not in new.notices]
        return DeepSpeedConfig(new, (*still_true, *new.notices))

    # --- derived values

    @property
    def stage(self) -> int:
        return self.zero["stage"]

    @property
    def zero(self) -> JsonObject:
        return self.get("zero_optimization", {})

    @property
    def precision(self) -> str:
        """The model's precision: "fp16", "bf16" or "fp32"."""
        for name in ("fp16", "bf16"):
            if self.content.get(name, {}).get("enabled") is True:
                return name
        return "fp32"

    @property
    def micro_batch(self) -> int:
        return self.content["train_micro_batch_size_per_gpu"]

    @property
    def accumulation(self) -> int:
        return self.content["gradient_accumulation_steps"]

    @property
    def train_batch(self) -> int:
        return self.content["train_batch_size"]

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return "activation_checkpointing" in self.content

    @property
    def optimizer_type(self) -> str:
        """The type of the optimizer, spelled as in PyTorch's or DeepSpeed's documentation."""
        return optimizer_name(self.content.get("optimizer", {}).get("type", "AdamW"))

    @property
    def optimizer_entry(self) -> OptimizerEntry:
        return OPTIMIZERS[self.optimizer_type]

    @property
    def optimizer_params(self) -> JsonObject:
        return self.get("optimizer", {}).get("params", {})

    def offload(self, part: str) -> str:
        """The device to which "optimizer" or "param" is offloaded; "none" if it is not."""
        return (self.zero.get(f"offload_{part}") or {}).get("device", "none")

    @property
    def prints(self) -> bool:
        """Whether the JSON asks for output of DeepSpeed's own log."""
        return (
            any(self.content.get(name) for name in LOGS)
            or self.content.get("comms_logger", {}).get("enabled", False)
            or self.content.get("activation_checkpointing", {}).get("profile", False)
        )

    @property
    def compiles(self) -> bool:
        """Whether the optimizer is DeepSpeed's own, which is compiled at its first use."""
        return self.optimizer_entry.compiled or self.optimizer_params.get("torch_adam") is False

    # --- decisions

    def on(self, device: str, fp16: bool, bf16: bool) -> "DeepSpeedConfig":
        """Copy it with the precision decided for a device, if "auto" or a missing fp16 is given.

        Args:
            device: the device type, such as "cuda" or "cpu".
            fp16, bf16: whether the device supports them at no loss of speed.
        """
        out, notices = self.raw(), list(self.notices)
        enabled = {name: out.get(name, {}).get("enabled") for name in ("fp16", "bf16")}
        if "auto" in enabled.values():
            notices.append(_choose_precision(out, enabled, device, {"bf16": bf16, "fp16": fp16}))
        elif enabled["fp16"] is True and not fp16:
            notices.append(_replace_fp16(out, device, bf16))
        elif enabled["bf16"] is True and not bf16:
            notices.append(
                f"bf16.enabled is true: this device ({device}) has no instructions for bf16 and is "
                'several times slower in it than in fp32: "auto" takes what is fast'
            )
        kind = self.optimizer_type
        if self.optimizer_entry.compiled and device == "cpu":
            raise UserError(
                f"optimizer.type is {kind!r}: DeepSpeed has it for GPUs only: take AdamW"
            )
        for key, value in self.zero.items():
            if key.startswith("zero_quantized") and value and device == "cpu":
                raise UserError(
                    f"zero_optimization.{key} is true: DeepSpeed has it for GPUs only: remove it"
                )
        if self.compiles:
            notices.append(
                f"{kind} is DeepSpeed's own: compiled at its first use, which takes minutes"
            )
        return DeepSpeedConfig(out, tuple(notices))

    def batch(self, micro_batch: int, world_size: int) -> BatchSizes:
        """Compute the sizes of a batch, any of which may be "auto" in the JSON.

        Raises `UserError` if the first is not the product of the other two and the number of ranks.
        """
        total, micro, steps = (self._size(key) for key in BATCH_KEYS)
        if micro is None:
            micro = micro_batch
            if total is not None and steps is not None:
                micro = max(1, total // (steps * world_size))
        if steps is None:
            steps = 1 if total is None else max(1, total // (micro * world_size))
        product = micro * steps * world_size
        if total not in (None, product):
            raise UserError(
                f"train_batch_size is {total}, but train_micro_batch_size_per_gpu {micro} x "
                f"gradient_accumulation_steps {steps} x world size {world_size} = {product}: "
                "change one of the three"
            )
        return BatchSizes(product, micro, steps)

    def _size(self, key: str) -> int | None:
        value = self.content.get(key, "auto")
        return None if value == "auto" else int(value)

    def filled(
        self,
        optim: OptimConfig,
        world_size: int,
        total_steps: int,
        width: Callable[[], int] | None = None,
    ) -> "DeepSpeedConfig":
        """Copy it with all "auto" values filled; explicit values of the JSON overrule `optim`.

        `width` returns the model's hidden size; it is called only if ZeRO's "auto" sizes need it.
        """
        out, notices = self.raw(), list(self.notices)
        out.update(zip(BATCH_KEYS, self.batch(optim.micro_batch, world_size), strict=True))
        if out.get("gradient_clipping", "auto") == "auto":
            out["gradient_clipping"] = optim.grad_clip
        params = self._fill_optimizer(out, optim, notices)
        self._check_for_the_run(world_size, total_steps)
        for key, size in keys.WIDTHS.items():
            if self.zero.get(key) == "auto":
                if width is None:
                    raise UserError(f'zero_optimization.{key} is "auto": give a number')
                out["zero_optimization"][key] = size(width())
        if "scheduler" in out:
            _fill_scheduler(out["scheduler"], params["lr"], optim, total_steps)
            notices += beyond_the_run(out["scheduler"], total_steps)
        return DeepSpeedConfig(out, tuple(notices))

    def _fill_optimizer(
        self, out: JsonObject, optim: OptimConfig, notices: list[str]
    ) -> JsonObject:
        """Fill the optimizer of `out` and return its parameters; may add a line to `notices`."""
        optimizer = out.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
        params = optimizer.setdefault("params", {})
        entry = self.optimizer_entry
        if entry.chosen and "torch_adam" not in params:
            params["torch_adam"] = True
            notices.append(
                f"optimizer {optimizer['type']}: PyTorch's own; DeepSpeed's would be compiled "
                'first: "torch_adam": false in its params asks for it'
            )
        for key in FILLED:
            taken = key in entry.takes and key not in entry.kinds
            if taken and params.get(key, "auto") == "auto":
                value = getattr(optim, key)
                params[key] = list(value) if key == "betas" else value
        return params

    def _check_for_the_run(self, world_size: int, total_steps: int) -> None:
        partitions = self.zero.get("zero_hpz_partition_size", 1)
        setting = "zero_optimization.zero_hpz_partition_size"
        fits = world_size % partitions == 0
        check(fits, setting, partitions, f"{world_size} ranks do not divide")
        profiler = self.content.get("flops_profiler", {})
        step = profiler.get("profile_step", 1)
        fits = not profiler.get("enabled") or step <= total_steps
        check(fits, "flops_profiler.profile_step", step, f"the run has {total_steps} steps")


def _choose_precision(
    out: JsonObject, enabled: Section, device: str, has: Mapping[str, bool]
) -> str:
    """Replace the "auto" of fp16 and bf16 in `out`, and return a line about it.

    The order of `has` is the order of preference.
    """
    wanted = [name for name in has if enabled[name] == "auto"]
    wanted += [name for name in has if enabled[name] is None]
    chosen = next((name for name in wanted if has[name]), "fp32")
    chosen = next((name for name in has if enabled[name] is True), chosen)
    if out.get("torch_autocast", {}).get("enabled"):
        chosen = "fp32"
    automatic = [name for name in enabled if enabled[name] == "auto"]
    for name in enabled:
        if name in automatic or chosen == name:
            out.setdefault(name, {})["enabled"] = chosen == name
    named = " and ".join(f"{name}.enabled" for name in automatic)
    return f'{named} "auto": training in {chosen} on this device ({device})'


def _replace_fp16(out: JsonObject, device: str, bf16: bool) -> str:
    """Replace fp16 in `out` on a device that lacks it, and return a line about it."""
    idle = []
    for key, value in out.pop("fp16").items():
        if key != "enabled" and value != keys.models()["fp16"].model_fields[key].default:
            idle.append(f"fp16.{key} {value}")
    line = f"fp16 is slow or missing on this device ({device}): training in "
    if bf16:
        out["bf16"] = {"enabled": True}
        line += "bf16 instead"
    else:
        line += "fp32 instead, as bf16 is too"
    return f"{line}, without {', '.join(idle)}" if idle else line


def _fill_scheduler(scheduler: JsonObject, lr: float, optim: OptimConfig, total_steps: int) -> None:
    kind, params = scheduler["type"], scheduler.setdefault("params", {})
    fill = {
        "warmup_num_steps": optim.warmup_steps(total_steps),
        "total_num_steps": total_steps,
        "warmup_min_lr": 0,
        "warmup_max_lr": lr,
        "total_iters": total_steps,
    }
    for key in SCHEDULERS[kind].filled:
        if params.get(key, "auto") == "auto":
            params[key] = fill[key]
    if kind == "OneCycleLR" and "total_steps" not in params:
        params["total_steps"] = total_steps
        if "epochs" in params:
            params["total_steps"] = params["epochs"] * params.get("steps_per_epoch", 0)
    end = SCHEDULERS[kind].end
    if end and params[end] < total_steps:
        raise UserError(
            f"scheduler.params.{end} is {params[end]}: {kind} ends there; the run has "
            f"{total_steps} steps: leave it out, and it is filled"
        )


def _read(path: Path) -> JsonObject:
    try:
        if not path.is_file():
            files = sorted(file.name for file in path.parent.glob("*.json"))
            raise UserError(f"no such file; the folder has: {', '.join(files) or 'nothing'}")
        return read(path, dict, finite=True)
    except OSError as error:
        raise UserError(f"cannot read it: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}") from None
