"""Checks of a DeepSpeed JSON: `light` needs no library, `deep` asks DeepSpeed's own models."""

import importlib.util
from collections.abc import Mapping
from typing import NoReturn

import pydantic

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.config import deepspeed_keys as keys
from ds_cmli.config import optimizers
from ds_cmli.config.json_values import JsonObject, Kind, Section
from ds_cmli.config.optimizers import Optimizer, Scheduler, optimizer_name
from ds_cmli.config.validation import shown

_IDLE = (None, False, 1)  # values of the keys of stage 3 that ask nothing


def light(content: Section) -> None:
    """Raise `UserError` for the first key that is unknown or idle, or value that is wrong."""
    for name, value in content.items():
        # A nested section has its place in the outer one.
        if name in keys.SECTIONS and name and "." not in name:
            _section(name, value)
        else:
            _value("", name, value, keys.SECTIONS[""])
    if "optimizer" in content:
        name = optimizer_name(content["optimizer"].get("type"))
        _typed("optimizer", content["optimizer"], name, optimizers.OPTIMIZERS)
    if "scheduler" in content:
        name = content["scheduler"].get("type")
        _typed("scheduler", content["scheduler"], name, optimizers.SCHEDULERS)
    _precisions(content)
    _zero(content)
    _optimizer_with_zero(content)
    _orthogonalizing(content)
    _outputs(content)


def whole_numbers(content: Section, section: str = "") -> JsonObject:
    """The checked content with whole numbers, such as 5e7, as integers, which schedulers need."""
    known = keys.SECTIONS.get(section, {})
    if section in ("optimizer.params", "scheduler.params"):
        known = optimizers.PARAMETERS
    out = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = whole_numbers(value, _dotted(section, key))
        elif isinstance(value, float) and value.is_integer() and _counts(known.get(key)):
            value = int(value)
        out[key] = value
    return out


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _counts(kind: Kind | None) -> bool:
    """Whether values of a kind are whole numbers."""
    return kind is not None and kind(2.0) is None and kind(2.5) is not None


def _section(name: str, value: object) -> None:
    value = _mapping(name, value)
    known = keys.SECTIONS[name]
    for key, item in value.items():
        nested = f"{name}.{key}"
        if nested in keys.SECTIONS:
            if item is not None or not nested.startswith("zero_optimization.offload"):
                _section(nested, item)
        elif not (name in ("optimizer", "scheduler") and key == "params"):
            _value(name, key, item, known)
    if value and "enabled" in known and "enabled" not in value and name != "timers.throughput":
        raise UserError(
            f'{name} has no "enabled", which DeepSpeed takes for false: add "enabled": true or '
            "remove it"
        )


def _value(section: str, key: str, value: object, known: Mapping[str, Kind]) -> None:
    where = _dotted(section, key)
    if key not in known:
        _unknown(section, key, known)
    need = known[key](value)
    if value == "auto" and need is not None:
        if where in keys.AUTO:
            return
        raise UserError(f'{where} is "auto", which is not filled for this key: {need}')
    if need is not None:
        raise UserError(f"{where} is {shown(value)}: {need}")


def _unknown(section: str, key: str, known: Mapping[str, Kind]) -> NoReturn:
    """Say what may be meant by a key that a section does not have."""
    names = set(known)
    for name in keys.SECTIONS:
        outer, _, inner = name.rpartition(".")
        if outer == section and inner:
            names.add(inner)
    if section in ("optimizer", "scheduler"):
        names.add("params")
    place = f"key of {section} is {shown(key)}" if section else f"key is {shown(key)}"
    if not key.strip():
        raise UserError(f"{place}: a key without a name: remove it")
    if key.partition(".")[0] in names and "." in key:
        raise UserError(f"{place}: a JSON has no dotted keys: write {_nested(key)}")
    raise UserError(f"{place}: {nearest(key, names)}")


def _nested(path: str) -> str:
    """`_nested("a.b")` -> '"a": {"b": ...}'."""
    outer, dot, inner = path.partition(".")
    if dot:
        return f'"{outer}": {{{_nested(inner)}}}'
    return f'"{outer}": ...'


def _mapping(section: str, value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise UserError(f"{section} is {shown(value)}: give a JSON object {{...}}")
    return value


def _typed(
    section: str, value: Section, name: object, table: Mapping[str, Optimizer | Scheduler]
) -> None:
    """Check the type of the optimizer or scheduler, and its parameters."""
    entry = table.get(name) if isinstance(name, str) else None
    if entry is None:
        kind = shown(value.get("type"))
        here = [known for known, other in table.items() if not other.why_not]
        raise UserError(f"{section}.type is {kind}: {nearest(kind, here)}")
    if entry.why_not:
        kind = value["type"]
        raise UserError(f"{section}.type is {kind!r}: it cannot train here, as {entry.why_not}")
    given = _mapping(f"{section}.params", value.get("params", {}))
    known = {name: optimizers.PARAMETERS.get(name, optimizers.PARAMETER) for name in entry.takes}
    known |= entry.kinds
    for key, item in given.items():
        if key == "max_grad_norm":
            raise UserError(
                f"optimizer.params.max_grad_norm is {shown(item)}: give gradient_clipping instead"
            )
        _value(f"{section}.params", key, item, known)
    missing = [name for name in entry.required if name not in given]
    if missing:
        raise UserError(f"{section}.params has no {' and no '.join(missing)}: {name} needs it")
    if isinstance(entry, Optimizer) and entry.chosen:
        _implementation(str(name), entry, given)


def _implementation(name: str, entry: Optimizer, given: Section) -> None:
    """Refuse parameters that the chosen implementation of an optimizer does not take."""
    pytorch = given.get("torch_adam", True)
    for key in sorted(given.keys() & set(entry.deepspeeds if pytorch else entry.pytorchs)):
        place = f"optimizer.params.{key} is {given[key]!r}"
        if pytorch:
            raise UserError(
                f"{place}: PyTorch's {name} does not take it: remove it, or add "
                '"torch_adam": false for DeepSpeed\'s own, which is compiled at its first use'
            )
        if given[key]:
            raise UserError(
                f"{place}: DeepSpeed's own {name} does not take it: remove it, or torch_adam, for "
                "PyTorch's"
            )


def _precisions(content: Section) -> None:
    names = ("fp16", "bf16", "torch_autocast")
    on = [name for name in names if content.get(name, {}).get("enabled") is True]
    if len(on) > 1:
        raise UserError(f"{on[0]}.enabled and {on[1]}.enabled are both true: choose one")


def _offloads(zero: Section, what: str) -> bool:
    return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"


def _zero(content: Section) -> None:
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if zero and "stage" not in zero:
        raise UserError(
            "zero_optimization has no stage, which DeepSpeed takes for 0: give 0, 1, 2 or 3"
        )
    for key in keys.STAGE3_ONLY if stage < 3 else ():
        asks = _offloads(zero, "param") if key == "offload_param" else zero.get(key) not in _IDLE
        if asks:
            raise UserError(
                f"zero_optimization.{key} is {shown(zero[key])}: no effect at stage {stage}: "
                "remove it, or take stage 3"
            )
    if stage == 0 and _offloads(zero, "optimizer"):
        raise UserError(
            "zero_optimization.offload_optimizer needs a stage of 1 to 3, and the stage is 0"
        )
    if content.get("gradient_allreduce_op") == "sum" and stage == 3:
        raise UserError(
            'gradient_allreduce_op is "sum": DeepSpeed cannot do it at stage 3: give "mean"'
        )


def _optimizer_with_zero(content: Section) -> None:
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    optimizer = content.get("optimizer", {})
    kind = optimizer_name(optimizer.get("type", "AdamW"))
    if stage and optimizers.OPTIMIZERS[kind].one_group:
        raise UserError(
            f"optimizer.type is {kind!r}: at stage {stage} DeepSpeed makes one group of all "
            "parameters, those without weight decay too: take stage 0, or AdamW"
        )
    tested = optimizers.OPTIMIZERS[kind].zero_tested or content.get("zero_allow_untested_optimizer")
    if stage and not tested:
        raise UserError(
            f"optimizer.type is {kind!r}: DeepSpeed has not tested it at stage {stage}: add "
            '"zero_allow_untested_optimizer": true, or take stage 0'
        )
    forced = content.get("zero_force_ds_cpu_optimizer") is True and _offloads(zero, "optimizer")
    if forced and optimizer.get("params", {}).get("torch_adam", True):
        raise UserError(
            'zero_force_ds_cpu_optimizer is true: add "torch_adam": false to optimizer.params for '
            "DeepSpeed's own optimizer, which is compiled at its first use, or remove it"
        )


def _orthogonalizing(content: Section) -> None:
    """Refuse what DeepSpeed (0.19.8) cannot do, or does wrongly, with Muon."""
    kind = optimizer_name(content.get("optimizer", {}).get("type", "AdamW"))
    zero = content.get("zero_optimization", {})
    stage, clip = zero.get("stage", 0), content.get("gradient_clipping", "auto")
    if not optimizers.OPTIMIZERS[kind].orthogonalizes or not stage:
        return
    if clip not in ("auto", 0):
        raise UserError(
            f"gradient_clipping is {clip!r}: at stage {stage} DeepSpeed clips {kind}'s "
            "orthogonalized updates by it, not the gradients: give 0, or take stage 0"
        )
    if _offloads(zero, "optimizer"):
        raise UserError(
            f"optimizer.type is {kind!r}: its states cannot be offloaded here: leave out "
            "zero_optimization.offload_optimizer, or take AdamW"
        )
    if stage == 3 and zero.get("reduce_scatter"):
        raise UserError(
            f"zero_optimization.reduce_scatter is true: {kind} needs whole gradients at stage 3: "
            "give false, or leave it out"
        )
    in_fp32 = content.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    halves = [
        name for name in ("bf16", "fp16") if content.get(name, {}).get("enabled") in (True, "auto")
    ]
    if in_fp32 and ((stage == 1 and "bf16" in halves) or (stage == 2 and halves)):
        raise UserError(
            "data_types.grad_accum_dtype is 'fp32': with it DeepSpeed does not orthogonalize "
            f"{kind}'s updates in bf16 at stage 1, and ends some ranks at stage 2: leave it out"
        )


def _outputs(content: Section) -> None:
    for name, package in keys.PACKAGES.items():
        if content.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{name}.enabled is true: it needs {package}: pip install {package}, or give false"
            )
    checkpointing = content.get("activation_checkpointing", {})
    if checkpointing.get("cpu_checkpointing") and not checkpointing.get("partition_activations"):
        raise UserError(
            "activation_checkpointing.cpu_checkpointing is true: DeepSpeed can do it only with "
            "partition_activations: add that"
        )
    comms = content.get("comms_logger", {})
    if comms.get("enabled") and not comms.get("verbose"):
        raise UserError(
            "comms_logger.enabled is true, but verbose is not: nothing would be printed: add it"
        )


def deep(content: Section) -> None:
    """Raise `UserError` for a value that DeepSpeed's own models refuse; imports DeepSpeed."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
    }
    for section, model in models.items():
        try:
            model(**content.get(section, {}))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join([section, *map(str, first["loc"])])
            if first["loc"]:  # without a location, the input is the whole section
                where += f" is {shown(first.get('input'))}"
            message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            raise UserError(f"{where}: DeepSpeed says: {message}") from None
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"{section}: DeepSpeed says: {error}") from None
