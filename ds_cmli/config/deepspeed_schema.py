"""The sections of a DeepSpeed JSON as pydantic models: DeepSpeed's own where it has one.

All are strict: a key that DeepSpeed does not read is refused, and no value is converted. This
module imports DeepSpeed, which takes seconds.
"""

import inspect
import json
import math
from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.activation_checkpointing import config as activation
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero import config as zero
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, create_model
from pydantic_core import PydanticCustomError, ValidationError

from ds_cmli.config.messages import choice, setting_of_error, words
from ds_cmli.errors import UserError, blame, nearest
from ds_cmli.files import JsonObject, Section

SCHEMA = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
NOTHING: tuple[object, ...] = (None, False, {}, {"enabled": False})
ADAMS = ("adam", "adamw")
# DeepSpeed's universal checkpoint holds this state of an optimizer: that of Adam, AdamW, RAdam.
RESUMABLE_STATE = {"step", "exp_avg", "exp_avg_sq"}
BOOLEAN_KEYS = words("""
    disable_python_gc dump_state memory_breakdown prescale_gradients wall_clock_breakdown
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
""")
CHECKED_STEPS = 10  # of a schedule, whose learning rate must have left 0 by then


def one_of(values: Collection[object], remedy: str) -> AfterValidator:
    """Refuse all other values, and say in the message what to give."""

    def refuse_others(value: object) -> object:
        if value not in values:
            raise PydanticCustomError("one_of", "{remedy}", {"remedy": remedy})
        return value

    return AfterValidator(refuse_others)


Unused = Annotated[Any, one_of(NOTHING, "it has no effect here: remove it")]
NoSuchBlocks = Annotated[Any, one_of(NOTHING, "PyTorch recomputes blocks without it: remove it")]
NVME = "what is swapped to NVMe is in no checkpoint: give 'cpu' or 'none'"
OffloadDevice = Annotated[str, one_of(("none", "cpu"), NVME)]
Checked = Annotated[bool, one_of((True,), "a NaN would reach the weights: remove it")]
Dtype = Literal["fp32", "fp16", "bf16"]
Auto = WrapValidator(lambda value, validate: value if value == "auto" else validate(value))
AutoFlag = Annotated[bool, Auto]
AutoSize = Annotated[Annotated[int, Field(ge=0, le=2**63 - 1)], Auto]
AutoPairs = Annotated[Annotated[int, Field(ge=1, le=10**9)], Auto]
AutoAccumulation = Annotated[Annotated[int, Field(ge=1, le=10**6)], Auto]
AutoNorm = Annotated[Annotated[float, Field(ge=0)], Auto]


class JsonSection(BaseModel):
    model_config = SCHEMA
    # DeepSpeed's own models leave out "auto" and convert values when they are built.
    __init__ = BaseModel.__init__  # type: ignore[assignment]


class OffloadOptimizer(JsonSection, zero.DeepSpeedZeroOffloadOptimizerConfig):
    device: OffloadDevice = "none"  # type: ignore[assignment]


class OffloadParam(JsonSection, zero.DeepSpeedZeroOffloadParamConfig):
    device: OffloadDevice = "none"  # type: ignore[assignment]


class ZeroOptimization(JsonSection, zero.DeepSpeedZeroConfig):
    stage: Annotated[int, one_of((1, 2, 3), "known: 1, 2, 3")]  # type: ignore[assignment]
    offload_optimizer: OffloadOptimizer | None = None
    offload_param: OffloadParam | None = None
    reduce_bucket_size: AutoSize = 0
    prefetch_bucket_size: AutoSize = Field(0, alias="stage3_prefetch_bucket_size")
    param_persistence_threshold: AutoSize = Field(0, alias="stage3_param_persistence_threshold")


class FP16(JsonSection, DeepSpeedFP16Config):
    enabled: AutoFlag
    initial_scale_power: int = Field(16, ge=0, le=127)  # 2**128 is infinite in fp32
    hysteresis: int = Field(2, ge=1)


class BF16(JsonSection, DeepSpeedBF16Config):
    enabled: AutoFlag
    check_grad_overflow: Checked = True


def strict_or_none(model: type[BaseModel]) -> tuple[Any, None]:
    """Return a section, for `create_model`, that is DeepSpeed's model made strict."""
    return create_model(model.__name__, __base__=(JsonSection, model)) | None, None


LogsAndFlags = create_model(  # type: ignore[call-overload]
    "LogsAndFlags",
    __base__=JsonSection,
    **dict.fromkeys(BOOLEAN_KEYS, (bool, False)),
    comms_logger=strict_or_none(CommsLoggerConfig),
    tensorboard=strict_or_none(TensorBoardConfig),
    wandb=strict_or_none(WandbConfig),
    csv_monitor=strict_or_none(CSVConfig),
    comet=strict_or_none(CometConfig),
)
THROUGHPUT = strict_or_none(DeepSpeedThroughputTimerConfig)
Timers = create_model("Timers", __base__=JsonSection, throughput=THROUGHPUT)


class OptimizerOrScheduler(JsonSection):
    type: str
    params: dict[str, Any] = Field(default_factory=dict)  # checked by `check_parameters`


class DataTypes(JsonSection):
    grad_accum_dtype: Dtype | None = None
    param_dtype: Dtype | None = None
    buffer_dtype: Dtype | None = None
    keep_in_fp32_modules: Literal["auto"] | list[str] = "auto"


class TorchAutocast(JsonSection):
    enabled: bool
    dtype: Literal["bf16", "fp16", "bfloat16", "float16"] | None = None
    lower_precision_safe_modules: list[str] | None = None


ActivationCheckpointing = create_model(
    "ActivationCheckpointing",
    __base__=JsonSection,
    **dict.fromkeys(activation.ACT_CHKPT_DEFAULT, (NoSuchBlocks, None)),  # type: ignore[call-overload]
)


class CheckpointSection(JsonSection):
    tag_validation: Literal["Ignore", "Warn", "Fail"] = "Warn"
    load_universal: Unused = None  # a start decides it
    use_node_local_storage: Unused = None
    parallel_write: Unused = None
    serialization: Unused = None
    writer: None = None


class FlopsProfiler(JsonSection):
    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: int = Field(1, ge=1)
    module_depth: int = Field(-1, ge=-1)
    top_modules: int = Field(1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class DeepSpeedJson(LogsAndFlags):  # type: ignore[misc,valid-type]
    """All keys of a DeepSpeed JSON that have an effect on training."""

    train_batch_size: AutoPairs = "auto"  # type: ignore[assignment]
    train_micro_batch_size_per_gpu: AutoPairs = "auto"  # type: ignore[assignment]
    gradient_accumulation_steps: AutoAccumulation = "auto"  # type: ignore[assignment]
    gradient_clipping: AutoNorm = "auto"  # type: ignore[assignment]
    optimizer: OptimizerOrScheduler | None = None
    scheduler: OptimizerOrScheduler | None = None
    zero_optimization: ZeroOptimization
    fp16: FP16 | None = None
    bf16: BF16 | None = None
    torch_autocast: TorchAutocast | None = None
    data_types: DataTypes | None = None
    communication_data_type: Dtype | None = None
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    gradient_predivide_factor: float = Field(1.0, gt=0)
    activation_checkpointing: ActivationCheckpointing | None = None  # type: ignore[valid-type]
    checkpoint: CheckpointSection | None = None
    steps_per_print: int | None = Field(None, ge=0)
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    timers: Timers | None = None  # type: ignore[valid-type]
    flops_profiler: FlopsProfiler | None = None


def check_section(model: type[BaseModel], content: Section, section: str = "") -> None:
    """Raise `UserError` with one line for the first value that the model does not take.

    section: the name of the content in the whole JSON; "": it is the whole.
    """
    try:
        # By JSON, because strict models take a list for a tuple and a text for a path there alone.
        model.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = first["loc"]
        setting = ".".join(filter(None, (section, setting_of_error(location, content))))
        if first["type"] == "extra_forbidden":
            *parents, key = location
            name = ".".join([section, *map(str, parents)]).strip(".") or "the DeepSpeed JSON"
            hint = nearest(str(key), _keys_of(model, parents))
            raise UserError(f"key of {name} is {key!r}: {hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{setting} is missing") from None
        raise UserError(f"{setting} is {first['input']!r}: {first['msg']}") from None


def _keys_of(model: type[BaseModel], parents: list[int | str]) -> list[str]:
    for name in parents:
        annotation = model.model_fields[str(name)].annotation
        model, *_ = get_args(annotation) or (annotation,)  # MODEL, or MODEL | None
    return [field.alias or name for name, field in model.model_fields.items()]


def named_class(section: str, name: str) -> Any:
    """Return PyTorch's optimizer, or DeepSpeed's schedule, of that name. Raises `UserError`."""
    classes = vars(torch.optim if section == "optimizer" else lr_schedules)
    names = [key for key, value in classes.items() if isinstance(value, type)]
    name = "AdamW" if name.lower() in ADAMS else name
    choice(f"{section}.type", name, names)
    return classes[name]


def check_signature(section: str, library_class: Any, params: JsonObject) -> None:
    """Raise `UserError` for the first parameter that an optimizer or a schedule does not take."""
    hints = get_type_hints(library_class.__init__)
    # The first one is what is optimized.
    _, *parameters = inspect.signature(library_class).parameters.values()
    fields: dict[str, Any] = {}
    for parameter in parameters:
        default = parameter.default
        has_default = default not in (None, inspect.Parameter.empty)
        hint = hints.get(parameter.name, type(default) if has_default else float)
        if section == "scheduler" and hint in (int, float):
            hint = Annotated[hint, Field(ge=0)]
        fields[parameter.name] = (hint | None if default is None else hint, None)
    if "lr" in fields:
        fields["lr"] = (Annotated[float, Field(gt=0)], None)
    if "total_num_steps" in fields:
        fields["total_num_steps"] = (Annotated[int, Field(ge=1)], None)
    if "warmup_type" in fields:  # of any other DeepSpeed takes "log"
        fields["warmup_type"] = (Literal["log", "linear"], None)
    if library_class is torch.optim.AdamW:  # DeepSpeed takes these out before it builds one
        fields |= {"torch_adam": (bool, None), "adam_w_mode": (bool, None)}
    model = create_model(library_class.__name__, __config__=SCHEMA, **fields)
    check_section(model, params, f"{section}.params")


def check_parameters(optimizer: JsonObject, scheduler: JsonObject | None) -> None:
    """Build the optimizer and the schedule of a JSON without "auto" values, and take steps.

    Raises `UserError` for what is unknown, of a wrong type, or refused by PyTorch or DeepSpeed.
    """
    optimizer_class = named_class("optimizer", optimizer["type"])
    _take_step(optimizer_class, {"lr": 1e-3}, f"optimizer.type is {optimizer['type']!r}")
    check_signature("optimizer", optimizer_class, optimizer["params"])
    taken = inspect.signature(optimizer_class).parameters
    values = {key: value for key, value in optimizer["params"].items() if key in taken}
    trial = _take_step(optimizer_class, values, f"optimizer.params is {optimizer['params']}")
    if scheduler is None:
        return
    schedule_class = named_class("scheduler", scheduler["type"])
    check_signature("scheduler", schedule_class, scheduler["params"])
    rates = []
    with blame(f"scheduler.params is {scheduler['params']}"):
        schedule = schedule_class(trial, **scheduler["params"])
        for _ in range(CHECKED_STEPS):
            schedule.step()
            rates += schedule.get_last_lr()
    if not (all(map(math.isfinite, rates)) and any(rate > 0 for rate in rates)):
        raise UserError(f"scheduler.params is {scheduler['params']}: the learning rate stays 0")


def _take_step(optimizer_class: Any, values: JsonObject, setting: str) -> torch.optim.Optimizer:
    """Take a step with a new optimizer, and return it.

    Raises `UserError`, which names `setting`, if it cannot, or if a run of it could not resume.
    """
    parameter = torch.nn.Parameter(torch.zeros(1, 1))
    parameter.grad = torch.zeros(1, 1)
    with blame(setting):
        optimizer = optimizer_class([parameter], **values)
        optimizer.step()
    if optimizer.state[parameter].keys() != RESUMABLE_STATE:
        raise UserError(
            f"{setting}: a run of it could not resume on other ranks or at another ZeRO stage: "
            "give Adam or AdamW without amsgrad, or RAdam"
        )
    return optimizer
