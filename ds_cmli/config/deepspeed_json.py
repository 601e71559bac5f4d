"""The DeepSpeed JSON: read, checked key by key, and its "auto" values filled from the configuration.

What the JSON says always wins. DeepSpeed ignores unknown top-level keys without a word; here they are errors.
"""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.config.schema import OptimConfig, choice

# Top-level keys that DeepSpeed reads, after its configuration reference. It has no model of its own for these.
TOP_LEVEL = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("managed_gradient_accumulation", "optimizer", "scheduler", "gradient_clipping", "prescale_gradients"),
    *("gradient_predivide_factor", "gradient_allreduce_op", "communication_data_type", "disable_allgather"),
    *("seq_parallel_communication_data_type", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc", "log_level"),
    *("zero_optimization", "fp16", "bf16", "torch_autocast", "activation_checkpointing", "data_types"),
    *("checkpoint", "aio", "comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet"),
    *("compile", "timers", "autotuning", "data_efficiency", "dataloader_drop_last", "hybrid_engine", "vocabulary_size"),
    *("weight_quantization", "tensor_parallel", "expert_parallel", "use_data_before_expert_parallelism", "pipeline"),
}
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
CHECKPOINTING_KEYS = {
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "number_checkpoints",
    "synchronize_checkpoint_boundary",
    "profile",
}
# What DeepSpeed's own Adam takes beside PyTorch's parameters.
ADAM_KEYS = {"torch_adam", "adam_w_mode", "bias_correction", "set_grad_none", "fp32_optimizer_states"}


def load(path: str | Path) -> dict[str, Any]:
    """The file's content, checked; raises `UserError` with one line for whatever is wrong with it."""
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise UserError(
            f"--deepspeed_config is {str(path)!r}: no such file; beside it: {', '.join(beside) or 'nothing'}"
        )
    try:
        config = json.loads(path.read_text(), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"--deepspeed_config is {str(path)!r}: cannot read it: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed_config {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path}: holds a {type(config).__name__}, give a JSON object {{...}}")
    try:
        check(config)
    except UserError as error:
        raise UserError(f"--deepspeed_config {path}: {error}") from None
    return config


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise UserError(f"the DeepSpeed JSON has {key!r} twice: keep one")
        out[key] = value
    return out


def check(config: dict[str, Any]) -> None:
    """Raise `UserError` for unknown keys, naming the nearest known one, and for values DeepSpeed would refuse."""
    for key in config:
        choice("key", key, TOP_LEVEL)
    for section, model in _section_models().items():
        if section in config:
            _check_section(section, config[section], model)
    for section, known in (
        ("activation_checkpointing", CHECKPOINTING_KEYS),
        ("optimizer", {"type", "params", "legacy_fusion"}),
        ("scheduler", {"type", "params"}),
    ):
        for key in _mapping(section, config.get(section, {})):
            choice(f"key of {section}", key, known)
    for section, keys_of in (("optimizer", optimizer_keys), ("scheduler", scheduler_keys)):
        if section in config:
            takes = keys_of(config[section].get("type"))
            for key in _mapping(f"{section}.params", config[section].get("params", {})):
                if takes is not None:
                    choice(f"key of {section}.params", key, takes)
    for key in BATCH_KEYS:
        value = config.get(key, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f'{key} is {value!r}: give a positive whole number or "auto"')
    if config.get("fp16", {}).get("enabled") is True and config.get("bf16", {}).get("enabled") is True:
        raise UserError("fp16.enabled and bf16.enabled are both true: choose one")


def optimizer_keys(kind: Any) -> set[str] | None:
    """The keys that `optimizer.params` may have; None: not known, for optimizers of DeepSpeed's own.

    Raises:
        UserError: there is no optimizer `kind`, neither in DeepSpeed nor in torch.optim.
    """
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    name = {"adam": "AdamW", "adamw": "AdamW", "adagrad": "Adagrad"}.get(str(kind).lower())
    if name is None and str(kind).lower() in DEEPSPEED_OPTIMIZERS:
        return None
    here = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n != "Optimizer"}
    choice("optimizer.type", name or kind, here | {*DEEPSPEED_OPTIMIZERS})
    known = {*inspect.signature(getattr(torch.optim, name or kind)).parameters} - {"params"}
    return known | ADAM_KEYS if name == "AdamW" else known


def scheduler_keys(kind: Any) -> set[str]:
    """The keys that `scheduler.params` may have; raises `UserError` where DeepSpeed and PyTorch know no such `kind`."""
    import torch
    from deepspeed.runtime import lr_schedules

    theirs = torch.optim.lr_scheduler
    here = {n for n, c in vars(theirs).items() if inspect.isclass(c) and issubclass(c, theirs.LRScheduler)}
    choice("scheduler.type", kind, here | {*lr_schedules.VALID_LR_SCHEDULES})
    found = getattr(lr_schedules if kind in lr_schedules.VALID_LR_SCHEDULES else theirs, kind)
    return {*inspect.signature(found).parameters} - {"optimizer"}


def _section_models() -> dict[str, Any]:
    """Section name -> DeepSpeed's own pydantic model of it."""
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models: dict[str, Any] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
    }
    if hasattr(DeepSpeedFlopsProfilerConfig, "model_fields"):
        models["flops_profiler"] = DeepSpeedFlopsProfilerConfig
    return models


def _mapping(section: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{section} is {value!r}: give a JSON object {{...}}")
    return value


def _check_section(section: str, value: Any, model: Any) -> None:
    import pydantic

    try:
        model(**_mapping(section, value))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        *parents, key = [str(part) for part in first["loc"]] or [section]
        where = ".".join([section, *parents])
        if first["type"] == "extra_forbidden":
            raise UserError(f"key of {where} is {key!r}: {nearest(key, _fields(model, parents))}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}.{key} is {first.get('input')!r}: {message}") from None
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{section}: {error}") from None


def _fields(model: Any, parents: list[str]) -> set[str]:
    """Known keys of a section model, or of the model nested in it under `parents`."""
    import typing

    for parent in parents:
        field = next((f for n, f in model.model_fields.items() if parent in (n, f.alias)), None)
        candidates = typing.get_args(field.annotation) or (field.annotation,) if field else ()
        model = next((c for c in candidates if hasattr(c, "model_fields")), model)
    return {field.alias or name for name, field in model.model_fields.items()}


def resolve_batch(config: dict[str, Any], micro_batch: int, world_size: int) -> tuple[int, int, int]:
    """(train_batch_size, micro batch per rank, accumulation steps), any of which the JSON may leave to "auto".

    Raises `UserError` with the three numbers where they do not multiply out.
    """
    total, micro, steps = (None if config.get(key, "auto") == "auto" else config[key] for key in BATCH_KEYS)
    if micro is None:
        micro = micro_batch if total is None or steps is None else max(1, total // (steps * world_size))
    if steps is None:
        steps = 1 if total is None else max(1, total // (micro * world_size))
    product = micro * steps * world_size
    if total is not None and total != product:
        raise UserError(
            f"train_batch_size is {total}, but train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{steps} x world size {world_size} = {product}: change one of the three"
        )
    return product, micro, steps


def resolve(config: dict[str, Any], optim: OptimConfig, world_size: int, total_steps: int) -> dict[str, Any]:
    """A copy with every "auto" filled in, ready for `deepspeed.initialize`."""
    out = copy.deepcopy(config)
    out.update(zip(BATCH_KEYS, resolve_batch(config, optim.micro_batch, world_size), strict=True))
    if out.get("gradient_clipping", "auto") == "auto":
        out["gradient_clipping"] = optim.grad_clip
    # AdamW in PyTorch's own implementation: DeepSpeed's fused one is compiled at first use.
    optimizer = out.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    params = optimizer.setdefault("params", {})
    ours = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}
    known = optimizer_keys(optimizer["type"])
    for key, value in ours.items():
        if params.get(key, "auto") == "auto" and (known is None or key in known):
            params[key] = value
    warmup = optim.warmup_steps(total_steps)
    fill = {
        **{"warmup_num_steps": warmup, "total_num_steps": total_steps},
        **{"warmup_min_lr": 0, "warmup_max_lr": params["lr"]},
    }
    for key, value in out.get("scheduler", {}).get("params", {}).items():
        if value == "auto" and key in fill:
            out["scheduler"]["params"][key] = fill[key]
    _refuse_auto(out, "")
    return out


def _refuse_auto(value: Any, path: str) -> None:
    """Sections checked by DeepSpeed's models drop "auto" themselves; elsewhere it would be taken for a value."""
    for key, item in value.items():
        where = f"{path}{key}"
        if isinstance(item, dict):
            _refuse_auto(item, f"{where}.")
        elif item == "auto" and not path.startswith(("zero_optimization.", "fp16.", "bf16.")):
            raise UserError(f'{where} is "auto", which is not filled for this key: give a value')


def precision(config: dict[str, Any]) -> str:
    """ "fp16", "bf16" or "fp32"."""
    for name in ("fp16", "bf16"):
        if config.get(name, {}).get("enabled") is True:
            return name
    return "fp32"


def fall_back_to_bf16(config: dict[str, Any]) -> dict[str, Any]:
    """The same JSON in bf16, for a device without fp16."""
    out = copy.deepcopy(config)
    out.pop("fp16")
    out["bf16"] = {"enabled": True}
    return out
