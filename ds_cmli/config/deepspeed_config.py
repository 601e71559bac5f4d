"""The DeepSpeed JSON: read, checked by DeepSpeed, suited to the device, its "auto" values filled.

"auto" means the same as in Hugging Face's integration. What is read here, and the names at the top,
which DeepSpeed ignores where it does not know them, are checked here; the rest is its own check.
"""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, Required, TypedDict

from ds_cmli.common import (
    JsonObject,
    Section,
    UserError,
    blame,
    nearest,
    read_json,
    without_trackers,
)
from ds_cmli.config.schema import (
    Count,
    NotNegative,
    OptimConfig,
    check,
    choice,
    refusal,
    shown,
    words,
)

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LOGS = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level")
KEYS = {*BATCH_KEYS, *LOGS} | words("""
    activation_checkpointing bf16 checkpoint comet comms_logger communication_data_type csv_monitor
    data_types disable_python_gc flops_profiler fp16 gradient_allreduce_op gradient_clipping
    gradient_predivide_factor optimizer prescale_gradients scheduler tensorboard timers
    torch_autocast wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
""")
# Keys of DeepSpeed that training does not use: left out where they ask for nothing.
UNUSED = words("""
    aio autotuning compile compression_training curriculum_learning data_efficiency
    dataloader_drop_last disable_allgather elasticity hybrid_engine nebula pipeline
    progressive_layer_drop sparse_attention sparse_gradients tensor_parallel weight_quantization
""")
NOTHING: tuple[object, ...] = (None, False, {}, {"enabled": False})
# The sizes of ZeRO's buffers by the model's hidden size, as factor and power.
WIDTHS = {
    "reduce_bucket_size": (1, 2),
    "stage3_prefetch_bucket_size": (0.9, 2),
    "stage3_param_persistence_threshold": (10, 1),
}
ADAMS = ("adam", "adamw")
OF_DEEPSPEED = {"torch_adam", "adam_w_mode"}  # of the parameters of Adam in a DeepSpeed JSON

Auto = Literal["auto"]


class Enabled(TypedDict):
    enabled: bool | Auto


class Offload(TypedDict, total=False):
    device: Literal["none", "cpu"]  # what is swapped to NVMe is in no checkpoint


class Zero(TypedDict):
    stage: Annotated[int, Field(ge=1, le=3)]
    offload_optimizer: NotRequired[Offload | None]
    offload_param: NotRequired[Offload | None]


class Kind(TypedDict):
    type: str
    params: NotRequired[JsonObject]


class Content(TypedDict, total=False):
    """What is read here of the JSON, where DeepSpeed alone would go on, or end in a traceback."""

    zero_optimization: Required[Zero]
    train_batch_size: Count | Auto
    train_micro_batch_size_per_gpu: Count | Auto
    gradient_accumulation_steps: Count | Auto
    gradient_clipping: NotNegative | Auto
    fp16: Enabled
    bf16: Enabled
    optimizer: Kind
    scheduler: Kind
    activation_checkpointing: JsonObject
    comms_logger: JsonObject
    torch_autocast: JsonObject


class DeepSpeedConfig(dict[str, Any]):
    """The JSON's top level, with what is derived from it; methods that decide return a copy.

    `load` or `of` checks the JSON, `on` decides what depends on the device, and `filled` replaces
    all remaining "auto" values.
    """

    notices: tuple[str, ...] = ()  # lines to print

    @classmethod
    def load(cls, path: str | Path) -> "DeepSpeedConfig":
        """Read and check a file; raises `UserError` with one line for the first mistake in it."""
        with blame(f"--deepspeed_config {path}"):
            content = read_json(Path(path))
        try:
            return cls.of(content)
        except UserError as error:
            raise UserError(f"--deepspeed_config {path}: {error}") from None

    @classmethod
    def of(cls, content: Section) -> "DeepSpeedConfig":
        """Check the content of such a file. Raises `UserError`. Imports DeepSpeed."""
        if isinstance(content, cls):
            return content
        out = cls()
        for key, value in copy.deepcopy(dict(content)).items():
            check(key in KEYS or key in UNUSED, "key", key, nearest(key, KEYS))
            check(key in KEYS or value in NOTHING, key, value, "it has no effect here: remove it")
            if key in KEYS:
                out[key] = value
        try:
            TypeAdapter(Content).validate_python(out, strict=True)
        except ValidationError as error:
            raise refusal(error, "", out) from None
        for key, value in out.get("activation_checkpointing", {}).items():
            need = "blocks are recomputed by PyTorch, which has no such setting: remove it"
            check(value in NOTHING, f"activation_checkpointing.{key}", value, need)
        kind, allowed = out.optimizer, out.get("zero_allow_untested_optimizer")
        need = 'not tested with ZeRO: take AdamW, or give "zero_allow_untested_optimizer": true'
        for section in {"optimizer", "scheduler"} & out.keys():
            params = out[section].get("params", {})
            if section == "optimizer" and kind in ADAMS:
                params = {key: params[key] for key in params.keys() - OF_DEEPSPEED}
            takes = signature(section, out[section]["type"])
            with blame(f"{section}.params does not suit {out[section]['type']}"):
                takes.bind_partial(None, **params)
        check(kind in ADAMS or bool(allowed), "optimizer.type", kind, need)
        with without_trackers():
            from deepspeed.runtime.config import DeepSpeedConfig as Theirs
        with blame("DeepSpeed refuses it"):
            plain = _without_auto({**out, **dict.fromkeys(BATCH_KEYS, "auto")})
            Theirs(plain | {"train_micro_batch_size_per_gpu": 1})
        return out

    def raw(self) -> JsonObject:
        """A plain copy, which the caller may change."""
        return copy.deepcopy(dict(self))

    def replaced(self, **settings: Any) -> "DeepSpeedConfig":
        """Copy it with these keys set; None removes one."""
        changed = dict(self) | settings
        out = self.of({key: value for key, value in changed.items() if value is not None})
        out.notices = self.notices
        return out

    # --- derived values

    @property
    def stage(self) -> int:
        return self["zero_optimization"]["stage"]

    @property
    def precision(self) -> str:
        """The model's precision: "fp16", "bf16" or "fp32"."""
        on = [name for name in ("fp16", "bf16") if self.get(name, {}).get("enabled") is True]
        return on[0] if on else "fp32"

    @property
    def micro_batch(self) -> int:
        return self["train_micro_batch_size_per_gpu"]

    @property
    def accumulation(self) -> int:
        return self["gradient_accumulation_steps"]

    @property
    def train_batch(self) -> int:
        return self["train_batch_size"]

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return "activation_checkpointing" in self

    @property
    def optimizer(self) -> str:
        """The optimizer's name in lower case."""
        return self.get("optimizer", {"type": "AdamW"})["type"].lower()

    @property
    def optimizer_params(self) -> JsonObject:
        return dict(self.get("optimizer", {}).get("params", {}))

    def offload(self, part: str) -> str:
        """The device to which "optimizer" or "param" is offloaded; "none" if it is not."""
        return (self["zero_optimization"].get(f"offload_{part}") or {}).get("device", "none")

    @property
    def prints(self) -> bool:
        """Whether the JSON asks for output of DeepSpeed's own log."""
        logged = self.get("comms_logger", {}).get("enabled", False)
        return logged or any(self.get(name) for name in LOGS)

    # --- decisions

    def on(self, device: str, fp16: bool, bf16: bool) -> "DeepSpeedConfig":
        """Copy it with the precision decided for a device, if "auto" or a missing fp16 is given.

        Args:
            device: the device type, such as "cuda" or "cpu".
            fp16, bf16: whether the device supports them at no loss of speed.
        """
        out, has = copy.deepcopy(self), {"bf16": bf16, "fp16": fp16}  # in the order of preference
        asked = {name: out.get(name, {}).get("enabled") for name in has}
        if "auto" not in asked.values() and (asked["fp16"] is not True or fp16):
            return self
        # What is asked for, then what is left open. A device without fp16 trains in bf16 instead.
        order = sorted(has, key=lambda name: (asked[name] is not True, asked[name] != "auto"))
        chosen = next((name for name in order if has[name] and asked[name] is not False), "fp32")
        if out.get("torch_autocast", {}).get("enabled"):
            chosen = "fp32"
        for name in has:
            if name == chosen:
                out.setdefault(name, {})["enabled"] = True
            else:
                out.pop(name, None)
        line = f"training in {chosen} on this device ({device})"
        if asked["fp16"] is True and not fp16:
            line += ", where fp16 is slow or missing"
        out.notices = (*self.notices, line)
        return out

    def batch(self, micro_batch: int, world_size: int) -> tuple[int, int, int]:
        """The values of `BATCH_KEYS`, any of which may be "auto" in the JSON.

        Raises `UserError` if the first is not the product of the other two and the number of ranks.
        """
        given = [self.get(key, "auto") for key in BATCH_KEYS]
        total, micro, steps = (None if value == "auto" else value for value in given)
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
        return product, micro, steps

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
        out = copy.deepcopy(self)
        out.update(zip(BATCH_KEYS, self.batch(optim.micro_batch, world_size), strict=True))
        if out.get("gradient_clipping", "auto") == "auto":
            out["gradient_clipping"] = optim.grad_clip
        params = out.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})
        if out.optimizer in ADAMS:
            params.setdefault("torch_adam", True)  # DeepSpeed's own would be compiled first
        values: JsonObject = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps}
        _fill(out, "optimizer", **values, weight_decay=optim.weight_decay)
        for key, (factor, power) in WIDTHS.items():
            if out["zero_optimization"].get(key) == "auto":
                if width is None:
                    raise UserError(f'zero_optimization.{key} is "auto": give a number')
                out["zero_optimization"][key] = int(factor * width() ** power)
        if "scheduler" in out:
            warmup = {"warmup_min_lr": 0, "warmup_num_steps": optim.warmup_steps(total_steps)}
            end: JsonObject = {"warmup_max_lr": params["lr"], "total_num_steps": total_steps}
            _fill(out, "scheduler", **warmup, **end)
        return out


def _fill(json: JsonObject, section: str, **values: object) -> None:
    """Set what is "auto" or missing of what the section's optimizer or schedule takes."""
    params, takes = (
        json[section].setdefault("params", {}),
        signature(section, json[section]["type"]),
    )
    for key, value in values.items():
        if params.get(key, "auto") == "auto" and key in takes.parameters:
            params[key] = value


def _without_auto(section: Section) -> JsonObject:
    """What is left to check before "auto" values are known."""
    out: JsonObject = {}
    for key, value in section.items():
        if value != "auto":
            out[key] = _without_auto(value) if isinstance(value, dict) else value
    return out


def signature(section: str, name: str) -> inspect.Signature:
    """What PyTorch's optimizer, in any case of its letters, or DeepSpeed's schedule takes."""
    import torch

    with without_trackers():
        from deepspeed.runtime import lr_schedules
        from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    if section == "scheduler":
        choice("scheduler.type", name, lr_schedules.VALID_LR_SCHEDULES)
        return inspect.signature(getattr(lr_schedules, name))
    # DeepSpeed would take its own in their place, or a step of theirs needs more than gradients.
    refused = {*DEEPSPEED_OPTIMIZERS, "optimizer", "lbfgs", "sparseadam"} - {*ADAMS}
    kinds = {}
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and kind.__name__.lower() not in refused:
            kinds[kind.__name__.lower()] = kind
    if name.lower() not in kinds:
        known = [kind.__name__ for kind in kinds.values()]
        raise UserError(f"optimizer.type is {shown(name)}: {nearest(name, known)}")
    return inspect.signature(kinds[name.lower()])
