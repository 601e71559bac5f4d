"""The DeepSpeed JSON on its way to DeepSpeed: `load`, or `of`, then `on` a device, then `filled`.

"auto" means the same as in Hugging Face's integration.
"""

import copy
import inspect
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from typing_extensions import Self

from ds_cmli.config.messages import check, words
from ds_cmli.config.schema import Config, OptimConfig, StudentConfig
from ds_cmli.errors import UserError, blame
from ds_cmli.files import JsonObject, Section
from ds_cmli.libraries import importing

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Keys of DeepSpeed that training does not use: left out where they ask for nothing.
UNUSED_KEYS = words("""
    aio autotuning compile compression_training curriculum_learning data_efficiency
    dataloader_drop_last disable_allgather elasticity hybrid_engine nebula pipeline
    progressive_layer_drop sparse_attention sparse_gradients tensor_parallel weight_quantization
""")
# Schedules of DeepSpeed that set one learning rate for all groups of parameters.
ONE_RATE = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR")
BETAS = (0.9, 0.98)  # "auto" of Adam, as the next
EPS = 1e-6
TRIAL_STEPS = 1000  # run length and model width, with which "auto" is filled to check a JSON
TRIAL_WIDTH = 64


class DeepSpeedConfig(dict[str, Any]):
    """The JSON, checked by `load` or `of`. `on` and `filled` return a copy."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file; raises `UserError` with one line for the first mistake in it."""
        with blame(f"--deepspeed_config {path}"):
            text = Path(path).read_bytes()
            with importing():
                from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
            content = json.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
            return cls.of(content)

    @classmethod
    @blame("the DeepSpeed JSON")
    def of(cls, content: Section) -> Self:
        """Check the content of such a file; null is as not given. Raises `UserError`."""
        with importing():
            from deepspeed.runtime.config import DeepSpeedConfig as CheckedByDeepSpeed

            from ds_cmli.config import deepspeed_schema as schema

        # 5e8 is a whole number to DeepSpeed, and no integer to pydantic.
        as_json = json.loads(json.dumps(dict(content)), parse_float=_whole_or_float)
        out = cls()
        for key, value in as_json.items():
            if key in UNUSED_KEYS:
                check(value in schema.NOTHING, key, value, "it has no effect here: remove it")
            elif value is not None:
                out[key] = value
        schema.check_section(schema.DeepSpeedJson, out)
        trial = out._with_automatic_values(OptimConfig(), TRIAL_STEPS, TRIAL_WIDTH)
        schema.check_parameters(trial["optimizer"], trial.get("scheduler"))
        for name in ("fp16", "bf16"):
            if trial.get(name, {}).get("enabled") == "auto":
                del trial[name]
        CheckedByDeepSpeed({**trial, **dict.fromkeys(BATCH_KEYS), BATCH_KEYS[1]: 1})
        return out

    @property
    def stage(self) -> int:
        return self["zero_optimization"]["stage"]

    @property
    def precision(self) -> str:
        """The model's precision: "fp16", "bf16" or "fp32"."""
        for name in ("fp16", "bf16"):
            if self.get(name, {}).get("enabled") is True:
                return name
        return "fp32"

    def batch(self, micro_batch: int, world_size: int) -> tuple[int, int, int]:
        """Return the values of `BATCH_KEYS`, any of which may be "auto" in the JSON.

        Raises `UserError` if the first is not the product of the other two and the number of ranks.
        """
        values = [self.get(key, "auto") for key in BATCH_KEYS]
        total, micro, steps = (0 if value == "auto" else value for value in values)
        if not micro:
            micro = max(1, total // (steps * world_size)) if total and steps else micro_batch
        steps = steps or max(1, total // (micro * world_size))
        product = micro * steps * world_size
        if total not in (0, product):
            raise UserError(
                f"train_batch_size is {total}, but train_micro_batch_size_per_gpu {micro} x "
                f"gradient_accumulation_steps {steps} x world size {world_size} = {product}: "
                "change one of the three"
            )
        return product, micro, steps

    def on(self, fp16: bool, bf16: bool) -> Self:
        """Copy it with the precision decided for a device, if "auto" or a missing fp16 is given.

        fp16, bf16: whether the device supports them at no loss of speed.
        """
        supported = {"bf16": bf16, "fp16": fp16}  # in the order of preference
        enabled = {name: self.get(name, {}).get("enabled") for name in supported}
        fp16_is_missing = enabled["fp16"] is True and not fp16
        if "auto" not in enabled.values() and not fp16_is_missing:
            return self
        candidates = [name for name in supported if supported[name] and enabled[name] is not False]
        # A precision that the JSON enables comes first, then "auto", then one that it does not
        # name: a device without fp16 trains in bf16 instead.
        preference = (True, "auto", None)
        chosen = min(candidates, key=lambda x: preference.index(enabled[x]), default="fp32")
        out = type(self)({key: value for key, value in self.items() if key not in supported})
        if chosen != "fp32" and not out.get("torch_autocast", {}).get("enabled"):
            out[chosen] = {**self.get(chosen, {}), "enabled": True}
        return out

    def filled(self, config: Config, world_size: int, total_steps: int) -> Self:
        """Copy it with a value in the place of each "auto". Raises `UserError`."""
        _check_rates(config.optim, self)
        has_automatic_sizes = "auto" in self["zero_optimization"].values()
        width = hidden_size(config.student) if has_automatic_sizes else 0
        out = self._with_automatic_values(config.optim, total_steps, width)
        batch = self.batch(config.optim.micro_batch, world_size)
        return type(self)({**out, **dict(zip(BATCH_KEYS, batch, strict=True))})

    def _with_automatic_values(self, optim: OptimConfig, total_steps: int, width: int) -> Self:
        """Copy it with all "auto" values filled but those of batch and precision."""
        from ds_cmli.config.deepspeed_schema import ADAMS, named_class

        out = copy.deepcopy(self)
        optimizer = out.setdefault("optimizer", {"type": "AdamW"})
        params = optimizer.setdefault("params", {})
        if optimizer["type"].lower() in ADAMS:
            params.setdefault("torch_adam", True)  # DeepSpeed's own would be compiled first
        values: JsonObject = {
            "gradient_clipping": optim.grad_clip,
            "lr": optim.lr,
            "betas": list(BETAS),
            "eps": EPS,
            "weight_decay": optim.weight_decay,
            "reduce_bucket_size": width**2,
            "stage3_prefetch_bucket_size": int(0.9 * width**2),
            "stage3_param_persistence_threshold": 10 * width,
            "warmup_min_lr": 0,
            "warmup_num_steps": optim.warmup_steps(total_steps),
            "total_num_steps": total_steps,
        }
        fill(out, values, ("gradient_clipping",))
        fill(out["zero_optimization"], values, out["zero_optimization"])
        for section in ("optimizer", "scheduler"):
            if section in out:
                takes = inspect.signature(named_class(section, out[section]["type"])).parameters
                fill(out[section].setdefault("params", {}), values, takes)
                values["warmup_max_lr"] = params["lr"]
        return out


def fill(section: JsonObject, values: JsonObject, takes: Container[str]) -> None:
    """Set those of the values that a section takes and that are "auto" or missing in it."""
    for key, value in values.items():
        if key in takes and section.get(key, "auto") == "auto":
            section[key] = value


def hidden_size(student: StudentConfig) -> int:
    """Return the width by which Hugging Face's integration chooses ZeRO's buffers."""
    if student.source_config:
        return student.embed_dim
    import timm
    import torch

    with torch.device("meta"):
        model: Any = timm.create_model(student.image_model, **student.image_overrides)
    return model.num_features


def _check_rates(optim: OptimConfig, ds_config: DeepSpeedConfig) -> None:
    """Raise `UserError` if the JSON's scheduler would undo the learning rates of `optim`."""
    schedule = ds_config.get("scheduler", {}).get("type")
    for name, default in (("layer_decay", 1), ("lr_factors", {})):
        value = getattr(optim, name)
        if value != default and schedule in ONE_RATE:
            raise UserError(
                f"optim.{name} is {value!r} and scheduler.type is {schedule!r}, which "
                "sets one rate for all parameters: leave out the scheduler, or take WarmupCosineLR"
            )


def _whole_or_float(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**63 else number
