"""Checks of a DeepSpeed JSON: by DeepSpeed's own models, strictly, and for what they let pass."""

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import pydantic

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.common.json_text import JsonObject, Section
from ds_cmli.config import deepspeed_keys as keys
from ds_cmli.config import optimizers
from ds_cmli.config.optimizers import OptimizerEntry, SchedulerEntry, optimizer_name
from ds_cmli.config.validation import PydanticType, shown

_IDLE = (None, False, 1)  # values of the keys of stage 3 that ask nothing


def checked(content: Section) -> JsonObject:
    """The content with whole numbers, such as 5e7, as integers, which schedulers need.

    Raises `UserError` for the first key that is unknown or idle, or value that is wrong. Imports
    DeepSpeed.
    """
    out = _section("", content)
    if "optimizer" in content:
        name = optimizer_name(content["optimizer"].get("type"))
        _typed("optimizer", out["optimizer"], name, optimizers.OPTIMIZERS)
    if "scheduler" in content:
        name = content["scheduler"].get("type")
        _typed("scheduler", out["scheduler"], name, optimizers.SCHEDULERS)
    _precisions(content)
    _zero(content)
    _optimizer_with_zero(content)
    _outputs(content)
    for section, model in keys.models().items():
        if section in content:
            _by_model(section, model, content[section])
    return out


def _section(name: str, content: Section) -> JsonObject:
    """The checked content of a section; "" is the top level."""
    known = keys.sections()[name]
    out = {}
    for key, value in content.items():
        where = f"{name}.{key}".lstrip(".")
        nullable = where.startswith("zero_optimization.offload")
        if key not in known:
            _unknown(name, key, known)
        if where in keys.sections() and not (value is None and nullable):
            out[key] = _section(where, _value(where, value, dict))
        else:
            out[key] = _value(where, value, known[key])
    if content and "enabled" in known and "enabled" not in content and name != "timers.throughput":
        raise UserError(
            f'{name} has no "enabled", which DeepSpeed takes for false: add "enabled": true or '
            "remove it"
        )
    return out


def _value(where: str, value: object, kind: PydanticType) -> Any:
    """The value, or the integer that it is; raises `UserError` if it is not of `kind`."""
    try:
        valid = pydantic.TypeAdapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        if value == "auto" and where in keys.AUTO:
            return value
        need = error.errors()[0]["msg"].removeprefix("Value error, ")
        if value == "auto":
            need = f"it is not filled for this key: {need}"
        raise UserError(f"{where} is {shown(value)}: {need}") from None
    if isinstance(value, float) and isinstance(valid, int):
        return valid
    return value


def _unknown(section: str, key: str, known: Collection[str]) -> NoReturn:
    place = f"key of {section} is {shown(key)}" if section else f"key is {shown(key)}"
    outer, _, inner = key.partition(".")
    if inner and outer in known:
        raise UserError(f'{place}: a JSON has no dotted keys: write "{outer}": {{"{inner}": ...}}')
    raise UserError(f"{place}: {nearest(key, known)}")


def _typed(
    section: str,
    value: JsonObject,
    name: object,
    table: Mapping[str, OptimizerEntry | SchedulerEntry],
) -> None:
    """Check the type of the optimizer or scheduler, and its parameters."""
    entry = table.get(name) if isinstance(name, str) else None
    if entry is None:
        kind = shown(value.get("type"))
        usable = [known for known, other in table.items() if not other.why_not]
        raise UserError(f"{section}.type is {kind}: {nearest(kind, usable)}")
    if entry.why_not:
        kind = value["type"]
        raise UserError(f"{section}.type is {kind!r}: it cannot train here, as {entry.why_not}")
    given = value.get("params", {})
    takes = entry.takes
    for key, item in given.items():
        if key == "max_grad_norm":
            raise UserError(
                f"optimizer.params.max_grad_norm is {shown(item)}: give gradient_clipping instead"
            )
        if key not in takes:
            _unknown(f"{section}.params", key, takes)
        kind = entry.kinds.get(key, optimizers.PARAMETERS.get(key, optimizers.PARAMETER))
        given[key] = _value(f"{section}.params.{key}", item, kind)
    missing = [name for name in entry.required if name not in given]
    if missing:
        raise UserError(f"{section}.params has no {' and no '.join(missing)}: {name} needs it")
    if isinstance(entry, OptimizerEntry) and entry.chosen:
        _implementation(str(name), entry, given)


def _implementation(name: str, entry: OptimizerEntry, given: Section) -> None:
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


def _offloads(zero: Section, part: str) -> bool:
    return (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"


def _zero(content: Section) -> None:
    zero = content.get("zero_optimization", {})
    if "stage" not in zero:
        raise UserError(
            "zero_optimization has no stage, which DeepSpeed takes for 0: give 1, 2 or 3"
        )
    stage = zero["stage"]
    for key in keys.STAGE3_ONLY if stage < 3 else ():
        asks = _offloads(zero, "param") if key == "offload_param" else zero.get(key) not in _IDLE
        if asks:
            raise UserError(
                f"zero_optimization.{key} is {shown(zero[key])}: no effect at stage {stage}: "
                "remove it, or take stage 3"
            )
    if content.get("gradient_allreduce_op") == "sum" and stage == 3:
        raise UserError(
            'gradient_allreduce_op is "sum": DeepSpeed cannot do it at stage 3: give "mean"'
        )


def _optimizer_with_zero(content: Section) -> None:
    zero = content.get("zero_optimization", {})
    optimizer = content.get("optimizer", {})
    kind = optimizer_name(optimizer.get("type", "AdamW"))
    tested = optimizers.OPTIMIZERS[kind].zero_tested or content.get("zero_allow_untested_optimizer")
    if not tested:
        raise UserError(
            f"optimizer.type is {kind!r}: DeepSpeed has not tested it with ZeRO: add "
            '"zero_allow_untested_optimizer": true, or take AdamW'
        )
    forced = content.get("zero_force_ds_cpu_optimizer") is True and _offloads(zero, "optimizer")
    if forced and optimizer.get("params", {}).get("torch_adam", True):
        raise UserError(
            'zero_force_ds_cpu_optimizer is true: add "torch_adam": false to optimizer.params for '
            "DeepSpeed's own optimizer, which is compiled at its first use, or remove it"
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


def _by_model(section: str, model: type[pydantic.BaseModel], content: JsonObject) -> None:
    """Raise `UserError` for values that DeepSpeed's own model refuses."""
    try:
        model(**content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join([section, *map(str, first["loc"])])
        if first["loc"]:  # without a location, the input is the whole section
            where += f" is {shown(first.get('input'))}"
        message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        raise UserError(f"{where}: DeepSpeed says: {message}") from None
    except (AssertionError, TypeError) as error:
        raise UserError(f"{section}: DeepSpeed says: {error}") from None
