"""The DeepSpeed JSON: read, checked by DeepSpeed, suited to the device, its "auto" values filled.

"auto" means the same as in Hugging Face's integration. DeepSpeed checks what is not read here.
"""

import copy
import inspect
from pathlib import Path
from typing import Any

from typing_extensions import Self

from ds_cmli.common import JsonObject, Section, UserError, blame, importing, read_json
from ds_cmli.config.schema import FREE_KEYS, OptimConfig, check, choice, words

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LOGS = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level")
KEYS = {*BATCH_KEYS, *FREE_KEYS} | words("""
    activation_checkpointing bf16 comet communication_data_type data_types disable_python_gc fp16
    gradient_allreduce_op gradient_clipping gradient_predivide_factor optimizer prescale_gradients
    scheduler torch_autocast zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
""")
# Keys of DeepSpeed that training does not use: left out where they ask for nothing.
UNUSED = words("""
    aio autotuning compile compression_training curriculum_learning data_efficiency
    dataloader_drop_last disable_allgather elasticity hybrid_engine nebula pipeline
    progressive_layer_drop sparse_attention sparse_gradients tensor_parallel
    weight_quantization
""")
NOTHING: tuple[object, ...] = (None, False, {}, {"enabled": False})
ADAMS = ("adam", "adamw")
OF_DEEPSPEED = {"torch_adam", "adam_w_mode"}  # of the parameters of Adam in a DeepSpeed JSON
BETAS, EPS = (0.9, 0.98), 1e-6  # what "auto" means of Adam


class DeepSpeedConfig(dict[str, Any]):
    """The JSON, checked by `load` or `of`; `on` a device, and `filled`, it is a copy."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file; raises `UserError` with one line for the first mistake in it."""
        with blame(f"--deepspeed_config {path}"):
            return cls.of(read_json(Path(path)))

    @classmethod
    @blame("the DeepSpeed JSON")
    def of(cls, content: Section) -> Self:
        """Check the content of such a file; null is as not given. Raises `UserError`."""
        if isinstance(content, cls):
            return content
        out = cls()
        for key, value in copy.deepcopy(dict(content)).items():
            if key in UNUSED:
                check(value in NOTHING, key, value, "it has no effect here: remove it")
                continue
            choice("key of the DeepSpeed JSON", key, KEYS)
            has_auto = key in (*BATCH_KEYS, "gradient_clipping")
            check(value != "auto" or has_auto, key, value, "give what it is to be")
            if value is not None:
                out[key] = value
        # What is read here, where DeepSpeed alone would go on.
        zero = out.get("zero_optimization", {})
        stage, need = zero.get("stage"), "give 1, 2 or 3"
        check(stage in (1, 2, 3), "zero_optimization.stage", stage, need)
        for key in ("offload_optimizer", "offload_param"):
            device = (zero.get(key) or {}).get("device", "none")
            need = "what is swapped to NVMe is in no checkpoint: give 'cpu' or 'none'"
            check(device in ("none", "cpu"), f"zero_optimization.{key}.device", device, need)
        for key in {"fp16", "bf16"} & out.keys():
            enabled, need = out[key].get("enabled"), 'give true, false or "auto"'
            check(enabled == "auto" or isinstance(enabled, bool), f"{key}.enabled", enabled, need)
        for key in BATCH_KEYS:
            value = out.get(key, "auto")
            fits = value == "auto" or (isinstance(value, int) and value > 0)
            check(fits, key, value, 'give "auto" or a positive number')
        clipping = out.get("gradient_clipping", "auto")
        fits = clipping == "auto" or (isinstance(clipping, int | float) and clipping >= 0)
        check(fits, "gradient_clipping", clipping, 'give "auto", or a number from 0')
        for key, value in out.get("activation_checkpointing", {}).items():
            need = "blocks are recomputed by PyTorch, which has no such setting: remove it"
            check(value in NOTHING, f"activation_checkpointing.{key}", value, need)
        for section in {"optimizer", "scheduler"} & out.keys():
            params = out[section].get("params", {})
            given = {key: params[key] for key in params.keys() - OF_DEEPSPEED}
            signature(section, out[section]["type"]).bind_partial(None, **given)
        with importing():
            from deepspeed.runtime import config as theirs
        if out.optimizer not in ADAMS:
            # Where DeepSpeed has one of the same name, it would not take PyTorch's.
            torchs = out.optimizer not in theirs.DEEPSPEED_OPTIMIZERS
            allowed = torchs and out.get("zero_allow_untested_optimizer", False)
            need = "take AdamW, or another of PyTorch's with zero_allow_untested_optimizer"
            check(allowed, "optimizer.type", out.optimizer, need)
        plain = _without_auto({**out, **dict.fromkeys(BATCH_KEYS, "auto")})
        theirs.DeepSpeedConfig(plain | {"train_micro_batch_size_per_gpu": 1})
        return out

    # --- derived values

    @property
    def stage(self) -> int:
        return self["zero_optimization"]["stage"]

    @property
    def precision(self) -> str:
        """The model's precision: "fp16", "bf16" or "fp32"."""
        on = (name for name in ("fp16", "bf16") if self.get(name, {}).get("enabled") is True)
        return next(on, "fp32")

    @property
    def micro_batch(self) -> int:
        return self["train_micro_batch_size_per_gpu"]

    @property
    def accumulation(self) -> int:
        return self["gradient_accumulation_steps"]

    @property
    def optimizer(self) -> str:
        """The optimizer's name in lower case."""
        return self.get("optimizer", {"type": "AdamW"})["type"].lower()

    # --- decisions

    def on(self, fp16: bool, bf16: bool) -> Self:
        """Copy it with the precision decided for a device, if "auto" or a missing fp16 is given.

        `fp16` and `bf16`: whether the device supports them at no loss of speed.
        """
        has = {"bf16": bf16, "fp16": fp16}  # in the order of preference
        asked = {name: self.get(name, {}).get("enabled") for name in has}
        if "auto" not in asked.values() and (asked["fp16"] is not True or fp16):
            return self
        # What is asked for, then what is left open. A device without fp16 trains in bf16 instead.
        order = sorted(has, key=lambda name: (asked[name] is not True, asked[name] != "auto"))
        chosen = next((name for name in order if has[name] and asked[name] is not False), "fp32")
        out = copy.deepcopy(self)
        if out.get("torch_autocast", {}).get("enabled"):
            chosen = "fp32"
        for name in has:
            given = out.pop(name, {})
            if name == chosen:
                out[name] = {**given, "enabled": True}
        return out

    def batch(self, micro_batch: int, world_size: int) -> tuple[int, int, int]:
        """The values of `BATCH_KEYS`, any of which may be "auto" in the JSON.

        Raises `UserError` if the first is not the product of the other two and the number of ranks.
        """
        given = [self.get(key, "auto") for key in BATCH_KEYS]
        total, micro, steps = (0 if value == "auto" else value for value in given)
        if not micro:
            both = total and steps
            micro = max(1, total // (steps * world_size)) if both else micro_batch
        if not steps:
            steps = max(1, total // (micro * world_size))
        product = micro * steps * world_size
        if total not in (0, product):
            raise UserError(
                f"train_batch_size is {total}, but train_micro_batch_size_per_gpu {micro} x "
                f"gradient_accumulation_steps {steps} x world size {world_size} = {product}: "
                "change one of the three"
            )
        return product, micro, steps

    def filled(self, optim: OptimConfig, world_size: int, total_steps: int, width: int = 0) -> Self:
        """Copy it with all "auto" values filled; `width` is the model's, for ZeRO's buffers."""
        out = copy.deepcopy(self)
        out.update(zip(BATCH_KEYS, self.batch(optim.micro_batch, world_size), strict=True))
        if out.get("gradient_clipping", "auto") == "auto":
            out["gradient_clipping"] = optim.grad_clip
        params = out.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})
        if out.optimizer in ADAMS:
            params.setdefault("torch_adam", True)  # DeepSpeed's own would be compiled first
        values: JsonObject = {"lr": optim.lr, "betas": list(BETAS), "eps": EPS}
        out._fill("optimizer", **values, weight_decay=optim.weight_decay)
        zero = out["zero_optimization"]
        sizes = {
            "reduce_bucket_size": width**2,
            "stage3_prefetch_bucket_size": int(0.9 * width**2),
            "stage3_param_persistence_threshold": 10 * width,
        }
        zero.update({key: size for key, size in sizes.items() if zero.get(key) == "auto"})
        if "scheduler" in out:
            warmup = {"warmup_min_lr": 0, "warmup_num_steps": optim.warmup_steps(total_steps)}
            end: JsonObject = {"warmup_max_lr": params["lr"], "total_num_steps": total_steps}
            out._fill("scheduler", **warmup, **end)
        return out

    def _fill(self, section: str, **values: object) -> None:
        """Set what is "auto" or missing of what the section's optimizer or schedule takes."""
        params = self[section].setdefault("params", {})
        takes = signature(section, self[section]["type"]).parameters
        for key, value in values.items():
            if params.get(key, "auto") == "auto" and key in takes:
                params[key] = value


def _without_auto(section: Section) -> JsonObject:
    """What is left to check before "auto" values are known."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def signature(section: str, name: str) -> inspect.Signature:
    """What PyTorch's optimizer or DeepSpeed's schedule takes. Raises `UserError`."""
    import torch

    with importing():
        from deepspeed.runtime import lr_schedules

    kinds = vars(torch.optim if section == "optimizer" else lr_schedules)
    name = "AdamW" if name.lower() in ADAMS else name
    choice(f"{section}.type", name, [key for key in kinds if isinstance(kinds[key], type)])
    return inspect.signature(kinds[name])
