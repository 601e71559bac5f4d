"""The DeepSpeed JSON: read, checked by DeepSpeed, suited to the device, its "auto" values filled.

"auto" means the same as in Hugging Face's integration. DeepSpeed checks what is not read here.
"""

import copy
import inspect
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from typing_extensions import Self

from ds_cmli.config.schema import FREE_KEYS, OptimConfig, check, choice, words
from ds_cmli.errors import UserError, blame
from ds_cmli.files import JsonObject, Section, read_json
from ds_cmli.libraries import importing

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LEAST = {**dict.fromkeys(BATCH_KEYS, 1), "gradient_clipping": 0}  # of those that may be "auto"
LOGS = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level")
KEYS = {*LEAST, *FREE_KEYS} | words("""
    activation_checkpointing bf16 comet communication_data_type data_types disable_python_gc fp16
    gradient_allreduce_op gradient_predivide_factor optimizer prescale_gradients scheduler
    torch_autocast zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
""")
# Keys of DeepSpeed that training does not use: left out where they ask for nothing.
UNUSED = words("""
    aio autotuning compile compression_training curriculum_learning data_efficiency
    dataloader_drop_last disable_allgather elasticity hybrid_engine nebula pipeline
    progressive_layer_drop sparse_attention sparse_gradients tensor_parallel weight_quantization
""")
NOTHING: tuple[object, ...] = (None, False, {}, {"enabled": False})
# Sections that are read here.
READ = words("""
    activation_checkpointing bf16 fp16 optimizer scheduler torch_autocast zero_optimization
""")
ADAMS = ("adam", "adamw")
OF_DEEPSPEED = {"torch_adam", "adam_w_mode"}  # of the parameters of Adam in a DeepSpeed JSON
# Optimizers of PyTorch in whose place DeepSpeed would take its own of the same name.
REPLACED = ("Adagrad", "Muon")
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
        out = cls()
        for key, value in copy.deepcopy(dict(content)).items():
            if key in UNUSED:
                check(value in NOTHING, key, value, "it has no effect here: remove it")
                continue
            choice("key of the DeepSpeed JSON", key, KEYS)
            check(value != "auto" or key in LEAST, key, value, "give what it is to be")
            if value is not None:
                out[key] = value
        for key in READ:
            check(isinstance(out.get(key, {}), dict), key, out.get(key), "give a section of keys")
        # What is read here, where DeepSpeed alone would go on.
        zero = out.get("zero_optimization", {})
        choice("zero_optimization.stage", zero.get("stage"), (1, 2, 3))
        for key in ("offload_optimizer", "offload_param"):
            device = (zero.get(key) or {}).get("device", "none")
            need = "what is swapped to NVMe is in no checkpoint: give 'cpu' or 'none'"
            check(device in ("none", "cpu"), f"zero_optimization.{key}.device", device, need)
        for key in {"fp16", "bf16"} & out.keys():
            enabled, need = out[key].get("enabled"), 'give true, false or "auto"'
            check(enabled == "auto" or isinstance(enabled, bool), f"{key}.enabled", enabled, need)
        for key, least in LEAST.items():
            value = out.get(key, "auto")
            number = int | float if key == "gradient_clipping" else int
            fits = value == "auto" or (isinstance(value, number) and value >= least)
            check(fits, key, value, f'give "auto", or a number from {least}')
        steps = out.get("steps_per_print", 1)
        check(isinstance(steps, int), "steps_per_print", steps, "give a number of steps")
        for key, value in out.get("activation_checkpointing", {}).items():
            need = "blocks are recomputed by PyTorch, which has no such setting: remove it"
            check(value in NOTHING, f"activation_checkpointing.{key}", value, need)
        with importing():
            import torch
            from deepspeed.runtime.config import DeepSpeedConfig as Theirs
        for section in {"optimizer", "scheduler"} & out.keys():
            kind = kind_of(section, out[section].get("type"))
            params = out[section].get("params", {})
            for key in params.keys() - OF_DEEPSPEED:
                choice(f"{section}.params", key, inspect.signature(kind).parameters)
            if section == "optimizer":
                given = {k: v for k, v in params.items() if k not in OF_DEEPSPEED and v != "auto"}
                with blame(f"optimizer.params is {params}"):
                    kind([torch.zeros(1)], **given)
        text = json.dumps({**out, **dict.fromkeys(BATCH_KEYS, "auto")})
        plain = json.loads(text, object_pairs_hook=_without_auto)
        Theirs(plain | {"train_micro_batch_size_per_gpu": 1})
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
        out = type(self)({key: value for key, value in self.items() if key not in has})
        if chosen != "fp32" and not out.get("torch_autocast", {}).get("enabled"):
            out[chosen] = {**self.get(chosen, {}), "enabled": True}
        return out

    def batch(self, micro_batch: int, world_size: int) -> tuple[int, int, int]:
        """The values of `BATCH_KEYS`, any of which may be "auto" in the JSON.

        Raises `UserError` if the first is not the product of the other two and the number of ranks.
        """
        given = [self.get(key, "auto") for key in BATCH_KEYS]
        total, micro, steps = (0 if value == "auto" else value for value in given)
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

    def filled(self, optim: OptimConfig, world_size: int, total_steps: int, width: int = 0) -> Self:
        """Copy it with all "auto" values filled; `width` is the model's, for ZeRO's buffers."""
        out = copy.deepcopy(self)
        out.update(zip(BATCH_KEYS, self.batch(optim.micro_batch, world_size), strict=True))
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
                takes = inspect.signature(kind_of(section, out[section]["type"])).parameters
                fill(out[section].setdefault("params", {}), values, takes)
                values["warmup_max_lr"] = params["lr"]
        return out


def fill(section: JsonObject, values: JsonObject, takes: Container[str]) -> None:
    """Set those of the values that a section takes and that are "auto" or missing in it."""
    for key, value in values.items():
        if key in takes and section.get(key, "auto") == "auto":
            section[key] = value


def _without_auto(pairs: list[tuple[str, object]]) -> JsonObject:
    """What is left to check of a section before "auto" values are known."""
    return {key: value for key, value in pairs if value != "auto"}


def kind_of(section: str, name: object) -> Any:
    """PyTorch's optimizer or DeepSpeed's schedule of that name. Raises `UserError`."""
    import torch

    with importing():
        from deepspeed.runtime import lr_schedules

    kinds = vars(torch.optim if section == "optimizer" else lr_schedules)
    known = [key for key in kinds if isinstance(kinds[key], type) and key not in REPLACED]
    name = "AdamW" if str(name).lower() in ADAMS else str(name)
    choice(f"{section}.type", name, known)
    return kinds[name]
