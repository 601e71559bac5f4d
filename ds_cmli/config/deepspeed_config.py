"""The DeepSpeed JSON: read, checked by DeepSpeed, suited to the device, its "auto" values filled.

"auto" means the same as in Hugging Face's integration. DeepSpeed ignores keys at the top that it
does not know, so their names are checked here; the rest is its own check, made before a run begins.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ds_cmli.common import quiet
from ds_cmli.common.errors import UserError, blame, nearest
from ds_cmli.common.json_text import JsonObject, Section, read
from ds_cmli.config.schema import OptimConfig
from ds_cmli.config.validation import check

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LOGS = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level")
KEYS = {
    *BATCH_KEYS,
    *LOGS,
    "activation_checkpointing",
    "bf16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "disable_python_gc",
    "flops_profiler",
    "fp16",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "optimizer",
    "prescale_gradients",
    "scheduler",
    "tensorboard",
    "timers",
    "torch_autocast",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
# Keys of DeepSpeed that training does not use: left out where they ask for nothing.
UNUSED = {
    "aio",
    "autotuning",
    "compile",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "dataloader_drop_last",
    "disable_allgather",
    "elasticity",
    "hybrid_engine",
    "nebula",
    "pipeline",
    "progressive_layer_drop",
    "sparse_attention",
    "sparse_gradients",
    "tensor_parallel",
    "weight_quantization",
}
NOTHING: tuple[object, ...] = (None, False, {}, {"enabled": False})
# The sizes of ZeRO's buffers by the model's hidden size.
WIDTHS: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}
FILLED = ("lr", "betas", "eps", "weight_decay")  # parameters of the optimizer
# Parameters of Adam in a DeepSpeed JSON that are DeepSpeed's, not PyTorch's.
OF_DEEPSPEED = ("torch_adam", "adam_w_mode")


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
    notices: tuple[str, ...] = field(default=(), compare=False)  # lines to print

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
        with blame(f"--deepspeed_config {path}"):
            try:
                return cls.of(read(Path(path), dict, finite=True))
            except UserError as error:
                raise UserError(f"--deepspeed_config {path}: {error}") from None

    @classmethod
    def of(cls, content: Section) -> "DeepSpeedConfig":
        """Check the content of such a file. Raises `UserError`. Imports DeepSpeed."""
        if isinstance(content, cls):
            return content
        used: JsonObject = {}
        for key, value in content.items():
            check(key in KEYS | UNUSED, "key", key, nearest(key, KEYS))
            if key in KEYS:
                used[key] = value
            else:
                check(value in NOTHING, key, value, "it has no effect here: remove it")
        _check(used)
        for key, value in used.get("activation_checkpointing", {}).items():
            need = "blocks are recomputed by PyTorch, which has no such setting: remove it"
            check(value in NOTHING, f"activation_checkpointing.{key}", value, need)
        return cls(used)

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
        return DeepSpeedConfig(DeepSpeedConfig.of(changed), self.notices)

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
    def optimizer_params(self) -> JsonObject:
        return self.get("optimizer", {}).get("params", {})

    def offload(self, part: str) -> str:
        """The device to which "optimizer" or "param" is offloaded; "none" if it is not."""
        return (self.zero.get(f"offload_{part}") or {}).get("device", "none")

    @property
    def prints(self) -> bool:
        """Whether the JSON asks for output of DeepSpeed's own log."""
        return any(self.content.get(name) for name in LOGS) or self.content.get(
            "comms_logger", {}
        ).get("enabled", False)

    # --- decisions

    def on(self, device: str, fp16: bool, bf16: bool) -> "DeepSpeedConfig":
        """Copy it with the precision decided for a device, if "auto" or a missing fp16 is given.

        Args:
            device: the device type, such as "cuda" or "cpu".
            fp16, bf16: whether the device supports them at no loss of speed.
        """
        out, has = self.raw(), {"bf16": bf16, "fp16": fp16}  # in the order of preference
        asked = {name: out.get(name, {}).get("enabled") for name in has}
        if "auto" not in asked.values() and (asked["fp16"] is not True or fp16):
            return self
        # What is asked for, then what is left open. A device without fp16 trains in bf16 instead.
        order = sorted(has, key=lambda name: (asked[name] is not True, asked[name] != "auto"))
        usable = [name for name in order if has[name] and asked[name] is not False]
        chosen = usable[0] if usable else "fp32"
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
        return DeepSpeedConfig(out, (*self.notices, line))

    def batch(self, micro_batch: int, world_size: int) -> BatchSizes:
        """Compute the sizes of a batch, any of which may be "auto" in the JSON.

        Raises `UserError` if the first is not the product of the other two and the number of ranks.
        """
        given = [self.content.get(key, "auto") for key in BATCH_KEYS]
        total, micro, steps = (None if value == "auto" else int(value) for value in given)
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
        out = self.raw()
        out.update(zip(BATCH_KEYS, self.batch(optim.micro_batch, world_size), strict=True))
        if out.get("gradient_clipping", "auto") == "auto":
            out["gradient_clipping"] = optim.grad_clip
        optimizer = out.setdefault("optimizer", {"type": "AdamW"})
        params = optimizer.setdefault("params", {})
        if optimizer["type"].lower() in ("adam", "adamw"):
            params.setdefault("torch_adam", True)  # DeepSpeed's own would be compiled first
        takes = inspect.signature(_optimizer(optimizer["type"])).parameters
        for key in FILLED:
            if key in takes and params.get(key, "auto") == "auto":
                value = getattr(optim, key)
                params[key] = list(value) if key == "betas" else value
        for key, size in WIDTHS.items():
            if self.zero.get(key) == "auto":
                if width is None:
                    raise UserError(f'zero_optimization.{key} is "auto": give a number')
                out["zero_optimization"][key] = size(width())
        if "scheduler" in out:
            fill = {
                "warmup_num_steps": optim.warmup_steps(total_steps),
                "total_num_steps": total_steps,
                "warmup_min_lr": 0,
                "warmup_max_lr": params["lr"],
            }
            schedule = out["scheduler"].setdefault("params", {})
            takes = inspect.signature(_schedule(out["scheduler"]["type"])).parameters
            for key, value in fill.items():
                if key in takes and schedule.get(key, "auto") == "auto":
                    schedule[key] = value
        return DeepSpeedConfig(out, self.notices)


def _check(content: JsonObject) -> None:
    """Raise `UserError` for the first mistake, most of them found by DeepSpeed itself."""
    with quiet.without_trackers():
        from deepspeed.runtime.config import DeepSpeedConfig as Theirs
    for name in ("zero_optimization", "optimizer", "scheduler", "fp16", "bf16"):
        value = content.get(name, {})
        check(isinstance(value, dict), name, value, "Input should be a valid dictionary")
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", "not set")
    one = type(stage) is int and 1 <= stage <= 3
    check(one, "zero_optimization.stage", stage, "give one of 1, 2, 3")
    for key in (*BATCH_KEYS, "gradient_clipping"):
        value = content.get(key, "auto")
        good = value == "auto" or (isinstance(value, int | float) and value >= (key in BATCH_KEYS))
        check(good, key, value, 'give a number, or "auto"')
    for name in {"fp16", "bf16"} & content.keys():
        on = content[name].get("enabled", "not set")
        given = isinstance(on, bool) or on == "auto"
        check(given, f"{name}.enabled", on, 'give true, false or "auto"')
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part)
        nvme = isinstance(offload, dict) and offload.get("device") == "nvme"
        need = "what is swapped to NVMe is in no checkpoint: give cpu"
        check(not nvme, f"zero_optimization.{part}.device", "nvme", need)
    if "optimizer" in content:
        _check_optimizer(content)
    if "scheduler" in content:
        kind, params = content["scheduler"].get("type"), content["scheduler"].get("params", {})
        _bind("scheduler", kind, _schedule(kind), params)
    with blame("DeepSpeed refuses it"):
        plain = _without_auto({**content, **dict.fromkeys(BATCH_KEYS, "auto")})
        Theirs(plain | {"train_micro_batch_size_per_gpu": 1})


def _without_auto(section: Section) -> JsonObject:
    """What is left to check before "auto" values are known."""
    out: JsonObject = {}
    for key, value in section.items():
        if value != "auto":
            out[key] = _without_auto(value) if isinstance(value, dict) else value
    return out


def _check_optimizer(content: Section) -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    kind, params = content["optimizer"].get("type"), content["optimizer"].get("params", {})
    need = "Input should be a valid dictionary"
    check(isinstance(params, dict), "optimizer.params", params, need)
    adam = str(kind).lower() in ("adam", "adamw")
    own = not adam and str(kind).lower() in DEEPSPEED_OPTIMIZERS
    check(not own, "optimizer.type", kind, "DeepSpeed's own is not used here: take AdamW")
    if adam:
        params = {name: value for name, value in params.items() if name not in OF_DEEPSPEED}
    _bind("optimizer", str(kind), _optimizer(kind), params)
    tested = adam or content.get("zero_allow_untested_optimizer")
    need = 'not tested with ZeRO: take AdamW, or give "zero_allow_untested_optimizer": true'
    check(bool(tested), "optimizer.type", kind, need)


def _bind(section: str, kind: str, maker: Callable[..., Any], params: Section) -> None:
    with blame(f"{section}.params does not suit {kind}"):
        inspect.signature(maker).bind_partial(None, **params)


def _optimizer(name: object) -> Callable[..., Any]:
    """PyTorch's optimizer of this name, in any case of its letters."""
    import torch

    kinds = {}
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            kinds[kind.__name__.lower()] = kind
    for refused in ("optimizer", "lbfgs", "sparseadam"):
        kinds.pop(refused, None)
    known = [kind.__name__ for kind in kinds.values()]
    check(str(name).lower() in kinds, "optimizer.type", name, nearest(str(name), known))
    return kinds[str(name).lower()]


def _schedule(name: object) -> Callable[..., Any]:
    """DeepSpeed's schedule of this name."""
    with quiet.without_trackers():
        from deepspeed.runtime import lr_schedules

    known = lr_schedules.VALID_LR_SCHEDULES
    check(name in known, "scheduler.type", name, nearest(str(name), known))
    return getattr(lr_schedules, str(name))
