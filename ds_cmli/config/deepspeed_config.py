"""The DeepSpeed JSON as an immutable object: loaded, checked, and with its "auto" values filled.

Every setting of the JSON takes effect, or one line refuses it or says that it does not. "auto" means the same as in
Hugging Face's integration. Derived values are asked here; only `raw` gives the JSON itself, for `deepspeed.initialize`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.config import deepspeed_checks as checks
from ds_cmli.config import deepspeed_keys as keys
from ds_cmli.config import optimizers
from ds_cmli.config.deepspeed_effects import beyond_the_run, without_effect
from ds_cmli.config.schema import OptimConfig
from ds_cmli.config.validation import check, parse_json

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
FILLED = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
)  # optimizer parameters that are filled from `OptimConfig`


@dataclass(frozen=True)
class DeepSpeedConfig(Mapping):
    """A read-only mapping of the JSON's top level, with derived values as properties.

    `load` or `of` checks the JSON without importing DeepSpeed or PyTorch, `on` decides what depends on the device, and
    `filled` replaces all remaining "auto" values. Each returns a new object.
    """

    content: Mapping[str, Any]
    notices: tuple[str, ...] = field(
        default=(), compare=False
    )  # lines to print about settings that act unexpectedly

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", copy.deepcopy(dict(self.content)))

    def __getitem__(self, key: str) -> Any:
        return copy.deepcopy(self.content[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def raw(self) -> dict[str, Any]:
        """A copy of the JSON, which the caller may change."""
        return copy.deepcopy(dict(self.content))

    @classmethod
    def load(cls, path: str | Path) -> "DeepSpeedConfig":
        """Read and check a file. Raises `UserError` with one line for the first thing that is wrong with it."""
        try:
            return cls.of(_read(Path(path)))
        except UserError as error:
            raise UserError(f"--deepspeed_config {path}: {error}") from None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "DeepSpeedConfig":
        """Check the content of such a file. Raises `UserError`."""
        if isinstance(content, cls):
            return content
        checks.light(dict(content))
        return cls(checks.whole_numbers("", content), without_effect(content))

    def replaced(
        self, zero_optimization: dict[str, Any] | None = None, **settings: Any
    ) -> "DeepSpeedConfig":
        """A copy with these keys set; keys of `zero_optimization` are set one by one, and None removes a key."""
        changed = {**self.raw(), **settings}
        changed = {
            key: value for key, value in changed.items() if value is not None or key not in settings
        }
        if zero_optimization is not None:
            changed["zero_optimization"] = {
                **changed.get("zero_optimization", {}),
                **zero_optimization,
            }
        told = DeepSpeedConfig.of(changed)
        return DeepSpeedConfig(
            told, (*(n for n in self.notices if n not in told.notices), *told.notices)
        )

    # --- derived values

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    @property
    def zero(self) -> dict[str, Any]:
        return self.get("zero_optimization", {})

    @property
    def precision(self) -> str:
        """ "fp16", "bf16" or "fp32"."""
        return next(
            (n for n in ("fp16", "bf16") if self.content.get(n, {}).get("enabled") is True), "fp32"
        )

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
        kind = self.content.get("optimizer", {}).get("type", "AdamW")
        return optimizers.DEEPSPEED_OPTIMIZERS.get(kind.lower(), kind)

    @property
    def optimizer_params(self) -> dict[str, Any]:
        return self.get("optimizer", {}).get("params", {})

    def offload(self, what: str) -> str:
        """The device to which "optimizer" or "param" is offloaded; "none" if it is not."""
        return (self.zero.get(f"offload_{what}") or {}).get("device", "none")

    @property
    def prints(self) -> bool:
        """Whether the JSON asks for output of DeepSpeed's own log."""
        flags = (
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "steps_per_print",
            "log_level",
        )
        return (
            any(self.content.get(n) for n in flags)
            or self.content.get("comms_logger", {}).get("enabled", False)
            or self.content.get("activation_checkpointing", {}).get("profile", False)
        )

    @property
    def compiles(self) -> bool:
        """Whether the optimizer is DeepSpeed's own, which is compiled at its first use."""
        return (
            self.optimizer_type in ("Lamb", "Lion")
            or self.optimizer_params.get("torch_adam") is False
        )

    # --- decisions

    def on(self, device: str, fp16: bool, bf16: bool) -> "DeepSpeedConfig":
        """A copy with the precision decided for this device, if the JSON says "auto" or names fp16 that it lacks.

        Args:
            device: the device type, such as "cuda" or "cpu".
            fp16, bf16: whether the device supports them at no loss of speed.
        """
        out, notices = self.raw(), list(self.notices)
        asked = {name: out.get(name, {}).get("enabled") for name in ("fp16", "bf16")}
        has = {"bf16": bf16, "fp16": fp16}
        if "auto" in asked.values():
            wanted = [n for n in has if asked[n] == "auto"] + [n for n in has if asked[n] is None]
            fixed = next((n for n in has if asked[n] is True), None)
            if out.get("torch_autocast", {}).get("enabled"):
                chosen = "fp32"
            else:
                chosen = fixed or next((n for n in wanted if has[n]), "fp32")
            named = " and ".join(f"{n}.enabled" for n in ("fp16", "bf16") if asked[n] == "auto")
            notices.append(f'{named} "auto": training in {chosen} on this device ({device})')
            for name in ("fp16", "bf16"):
                if asked[name] == "auto" or chosen == name:
                    out.setdefault(name, {})["enabled"] = chosen == name
        elif asked["fp16"] is True and not fp16:
            chosen = "bf16" if bf16 else "fp32"
            line = (
                f"fp16 is slow or missing on this device ({device}): training in {chosen} instead"
            )
            line += ", as bf16 is too" * (not bf16)
            asked_for = out.pop("fp16").items()
            idle = [
                f"fp16.{k} {v}"
                for k, v in asked_for
                if k != "enabled" and v != keys.FP16_DEFAULTS[k]
            ]
            notices.append(line + f", without {', '.join(idle)}" * bool(idle))
            if bf16:
                out["bf16"] = {"enabled": True}
        elif asked["bf16"] is True and not bf16:
            notices.append(
                f"bf16.enabled is true: this device ({device}) has no instructions for bf16 and is several times "
                'slower in it than in fp32: "auto" takes what is fast'
            )
        if self.optimizer_type in ("Lamb", "Lion") and device == "cpu":
            raise UserError(
                f"optimizer.type is {self.optimizer_type!r}: DeepSpeed has it for GPUs only: take AdamW"
            )
        quantized = next(
            (key for key in self.zero if key.startswith("zero_quantized") and self.zero[key]), None
        )
        if quantized and device == "cpu":
            raise UserError(
                f"zero_optimization.{quantized} is true: DeepSpeed has it for GPUs only: remove it"
            )
        if self.compiles:
            notices.append(
                f"{self.optimizer_type} is DeepSpeed's own: compiled at its first use, which takes minutes"
            )
        return DeepSpeedConfig(out, tuple(notices))

    def batch(self, micro_batch: int, world_size: int) -> tuple[int, int, int]:
        """(train_batch_size, micro-batch per rank, accumulation steps), any of which may be "auto" in the JSON.

        Raises `UserError` if the first is not the product of the other two and the number of ranks.
        """
        given = (self.content.get(key, "auto") for key in BATCH_KEYS)
        total, micro, steps = (None if value == "auto" else int(value) for value in given)
        if micro is None:
            micro = (
                micro_batch
                if total is None or steps is None
                else max(1, total // (steps * world_size))
            )
        if steps is None:
            steps = 1 if total is None else max(1, total // (micro * world_size))
        product = micro * steps * world_size
        if total is not None and total != product:
            raise UserError(
                f"train_batch_size is {total}, but train_micro_batch_size_per_gpu {micro} x "
                f"gradient_accumulation_steps {steps} x world size {world_size} = {product}: change one of the three"
            )
        return product, micro, steps

    def filled(
        self,
        optim: OptimConfig,
        world_size: int,
        total_steps: int,
        width: Callable[[], int] | None = None,
    ) -> "DeepSpeedConfig":
        """A copy with all "auto" values filled; explicit values of the JSON take precedence over `optim`.

        `width` returns the model's hidden size; it is called only if ZeRO's "auto" sizes depend on it.
        """
        out, notices = self.raw(), list(self.notices)
        out.update(zip(BATCH_KEYS, self.batch(optim.micro_batch, world_size), strict=True))
        if out.get("gradient_clipping", "auto") == "auto":
            out["gradient_clipping"] = optim.grad_clip
        optimizer = out.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
        params = optimizer.setdefault("params", {})
        takes = optimizers.OPTIMIZERS[self.optimizer_type].split()
        if "torch_adam" in takes and "torch_adam" not in params:
            params["torch_adam"] = True
            notices.append(
                f"optimizer {optimizer['type']}: PyTorch's own; DeepSpeed's would be compiled first: \"torch_adam\": "
                "false in its params asks for it"
            )
        for key in FILLED:
            fitting = key in takes and (self.optimizer_type, key) != ("Adafactor", "eps")
            if fitting and params.get(key, "auto") == "auto":
                value = getattr(optim, key)
                params[key] = list(value) if key == "betas" else value
        partitions = self.zero.get("zero_hpz_partition_size", 1)
        what = "zero_optimization.zero_hpz_partition_size"
        check(world_size % partitions == 0, what, partitions, f"{world_size} ranks do not divide")
        profiler = {"profile_step": 1, **self.content.get("flops_profiler", {})}
        check(
            not profiler.get("enabled") or profiler["profile_step"] <= total_steps,
            "flops_profiler.profile_step", profiler["profile_step"], f"the run has {total_steps} steps",
        )  # fmt: skip
        for key, size in keys.WIDTHS.items():
            if self.zero.get(key) == "auto":
                if width is None:
                    raise UserError(f'zero_optimization.{key} is "auto": give a number')
                out["zero_optimization"][key] = size(width())
        if "scheduler" in out:
            self._fill_scheduler(out["scheduler"], params["lr"], optim, total_steps)
            notices += beyond_the_run(out["scheduler"], total_steps)
        return DeepSpeedConfig(out, tuple(notices))

    @staticmethod
    def _fill_scheduler(
        scheduler: dict[str, Any], lr: float, optim: OptimConfig, total_steps: int
    ) -> None:
        params = scheduler.setdefault("params", {})
        fill = {
            **{"warmup_num_steps": optim.warmup_steps(total_steps), "total_num_steps": total_steps},
            **{"warmup_min_lr": 0, "warmup_max_lr": lr, "total_iters": total_steps},
        }
        for key in (
            p.rstrip("+")
            for p in optimizers.SCHEDULERS[scheduler["type"]].split()
            if p.endswith("+")
        ):
            if params.get(key, "auto") == "auto":
                params[key] = fill[key]
        if scheduler["type"] == "OneCycleLR":
            if not params.keys() & {"total_steps", "epochs"}:
                params["total_steps"] = total_steps
            params.setdefault(
                "total_steps", params.get("epochs", 0) * params.get("steps_per_epoch", 0)
            )
        name = optimizers.ENDS.get(scheduler["type"])
        if name is not None and params[name] < total_steps:
            raise UserError(
                f"scheduler.params.{name} is {params[name]}: {scheduler['type']} ends there; the run has {total_steps} "
                "steps: leave it out, and it is filled"
            )

    def overruled(self, given: Mapping[str, Any]) -> list[str]:
        """A line for each setting of `optim` that this JSON overrules; `given` as `{"lr": ("--lr", 0.1)}`."""
        lines = []
        scheduler = self.content.get("scheduler", {}).get("params", {})
        says = {
            "micro_batch": {BATCH_KEYS[1]: self.content.get(BATCH_KEYS[1], "auto")},
            "grad_clip": {"gradient_clipping": self.content.get("gradient_clipping", "auto")},
            **{
                key: {f"optimizer.params.{key}": self.optimizer_params.get(key, "auto")}
                for key in FILLED
            },
        }
        if "auto" not in (
            self.content.get(BATCH_KEYS[0], "auto"),
            self.content.get(BATCH_KEYS[2], "auto"),
        ):
            says["micro_batch"] = {
                f"{BATCH_KEYS[0]} and {BATCH_KEYS[2]}": [self.content[k] for k in BATCH_KEYS[::2]]
            }
        for name in (
            "warmup_max_lr",
            "cycle_max_lr",
            "max_lr",
            "lr_range_test_min_lr",
            "cycle_min_lr",
            "base_lr",
        ):
            if scheduler.get(name, "auto") != "auto":
                says["lr"] = {f"scheduler.params.{name}": scheduler[name]}
                break
        if "scheduler" in self.content and scheduler.get("warmup_num_steps", None) != "auto":
            says["warmup_share"] = {"scheduler": self.content["scheduler"].get("type")}
        for setting, (option, value) in given.items():
            for where, said in says.get(setting, {}).items():
                if said != "auto" and said != value:
                    lines.append(
                        f"{option} {value} does not count: the DeepSpeed JSON says {where} {said}"
                    )
        return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            beside = (
                sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
            )
            raise UserError(f"no such file; beside it: {', '.join(beside) or 'nothing'}")
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read it: {error.strerror}") from None
    except ValueError as error:  # invalid JSON, invalid UTF-8, or a number with too many digits
        raise UserError(f"not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"holds a {type(content).__name__}, give a JSON object {{...}}")
    return content
