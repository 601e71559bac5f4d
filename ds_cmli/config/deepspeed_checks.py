"""Checks of a DeepSpeed JSON: `light` needs neither DeepSpeed nor PyTorch, `deep` uses DeepSpeed's config models."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.config import deepspeed_keys as keys
from ds_cmli.config import json_values, optimizers
from ds_cmli.config.validation import shown


def light(content: dict[str, Any]) -> None:
    """Raise `UserError` for the first key or value that is unknown, has no effect, or contradicts others."""
    for name, value in content.items():
        if (
            name in keys.SECTIONS and name and "." not in name
        ):  # a nested section has its place in the outer one
            _section(name, value)
        else:
            _value("", name, value, keys.SECTIONS[""])
    for name in ("optimizer", "scheduler"):
        if name in content:
            _typed(name, content[name])
    _precisions(content)
    _zero(content)
    _outputs(content)


def whole_numbers(section: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The checked content with whole numbers written as 5e7 converted to integers, which schedulers require."""

    def whole(kind: json_values.Kind | None, value: Any) -> Any:
        counts = (
            isinstance(value, float)
            and value.is_integer()
            and kind is not None
            and kind(value + 0.5) is not None
        )
        return int(value) if counts else value

    out = {}
    for key, value in content.items():
        nested = f"{section}.{key}" if section else key
        if isinstance(value, dict):
            out[key] = whole_numbers(nested, value)
        else:
            parameters = section in ("optimizer.params", "scheduler.params")
            known = optimizers.PARAMETERS if parameters else keys.SECTIONS.get(section, {})
            out[key] = whole(known.get(key), value)
    return out


def _section(name: str, value: Any) -> None:
    mapping(name, value)
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
            f'{name} has no "enabled", which DeepSpeed takes for false: add "enabled": true or remove it'
        )


def _value(section: str, key: str, value: Any, known: dict[str, json_values.Kind]) -> None:
    where = f"{section}.{key}" if section else key
    if key not in known:
        names = {
            *known,
            *(n.rpartition(".")[2] for n in keys.SECTIONS if n and n.rpartition(".")[0] == section),
        }
        names |= {"params"} if section in ("optimizer", "scheduler") else set()
        place = f"key of {section} is {shown(key)}" if section else f"key is {shown(key)}"
        if not key.strip():
            raise UserError(f"{place}: a key without a name: remove it")
        if key.partition(".")[0] in names and "." in key:
            raise UserError(f"{place}: a JSON has no dotted keys: write {_nested(key)}")
        raise UserError(f"{place}: {nearest(key, names)}")
    if isinstance(value, str) and value == "auto" and known[key](value) is not None:
        if where not in keys.AUTO:
            raise UserError(
                f'{where} is "auto", which is not filled for this key: {known[key](value)}'
            )
        return
    need = known[key](value)
    if need is not None:
        raise UserError(f"{where} is {shown(value)}: {need}")


def _nested(path: str) -> str:
    """`_nested("a.b")` -> '"a": {"b": ...}'."""
    outer, dot, inner = path.partition(".")
    return f'"{outer}": ' + (f"{{{_nested(inner)}}}" if dot else "...")


def mapping(section: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{section} is {shown(value)}: give a JSON object {{...}}")
    return value


def _typed(section: str, value: dict[str, Any]) -> None:
    """Check the type of the optimizer or scheduler, and its parameters."""
    kind = value.get("type")
    table, without = optimizers.SCHEDULERS, optimizers.NO_SCHEDULERS
    if section == "optimizer":
        table, without = optimizers.OPTIMIZERS, optimizers.NO_OPTIMIZERS
    name = (
        optimizers.DEEPSPEED_OPTIMIZERS.get(str(kind).lower(), kind)
        if section == "optimizer"
        else kind
    )
    if name in without:
        raise UserError(f"{section}.type is {kind!r}: it cannot train here, as {without[name]}")
    if name not in table:
        raise UserError(f"{section}.type is {shown(kind)}: {nearest(shown(kind), table)}")
    parameters = table[name].split()
    kinds = {
        p.rstrip("!+"): optimizers.PARAMETERS.get(p.rstrip("!+"), optimizers.PARAMETER)
        for p in parameters
    }
    if name == "Adafactor":
        kinds["eps"] = json_values.either(json_values.numbers(2, json_values.number(0)))
    given = mapping(f"{section}.params", value.get("params", {}))
    for key, item in given.items():
        if key == "max_grad_norm":
            raise UserError(
                f"optimizer.params.max_grad_norm is {shown(item)}: give gradient_clipping instead"
            )
        _value(f"{section}.params", key, item, kinds)
    missing = [p.rstrip("!") for p in parameters if p.endswith("!") and p.rstrip("!") not in given]
    if missing:
        raise UserError(f"{section}.params has no {' and no '.join(missing)}: {name} needs it")
    if "torch_adam" in kinds:
        _adam(name, given)


def _adam(name: str, given: dict[str, Any]) -> None:
    """Refuse parameters of Adam and AdamW that contradict the type, or that the one asked for does not take."""
    if name == "AdamW" and given.get("adam_w_mode") is False:
        raise UserError(
            "optimizer.params.adam_w_mode is False: AdamW decays the weights whatever it says: remove it, or give the "
            "type Adam, which then adds the decay to the gradients"
        )
    pytorch = given.get("torch_adam", True)
    for key in sorted(
        given.keys() & (optimizers.OURS_ALONE if pytorch else optimizers.PYTORCHS_ALONE)
    ):
        if pytorch:
            raise UserError(
                f"optimizer.params.{key} is {given[key]!r}: PyTorch's {name} does not take it: remove it, or add "
                '"torch_adam": false for DeepSpeed\'s own, which is compiled at its first use'
            )
        if given[key]:
            raise UserError(
                f"optimizer.params.{key} is {given[key]!r}: DeepSpeed's own {name} does not take it: remove it, or "
                "torch_adam, for PyTorch's"
            )


def _precisions(content: dict[str, Any]) -> None:
    on = [
        name
        for name in ("fp16", "bf16", "torch_autocast")
        if content.get(name, {}).get("enabled") is True
    ]
    if len(on) > 1:
        raise UserError(f"{on[0]}.enabled and {on[1]}.enabled are both true: choose one")


def _zero(content: dict[str, Any]) -> None:
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if zero and "stage" not in zero:
        raise UserError(
            "zero_optimization has no stage, which DeepSpeed takes for 0: give 0, 1, 2 or 3"
        )
    for key in keys.STAGE3_ONLY if stage < 3 else ():
        value = zero.get(key)
        if value not in (None, False, 1) and not (
            isinstance(value, dict) and value.get("device", "none") == "none"
        ):
            raise UserError(
                f"zero_optimization.{key} is {shown(value)}: no effect at stage {stage}: remove it, or take stage 3"
            )
    kind = str(content.get("optimizer", {}).get("type", "AdamW"))
    kind = optimizers.DEEPSPEED_OPTIMIZERS.get(kind.lower(), kind)
    if stage and kind == "Adagrad":
        raise UserError(
            f"optimizer.type is 'Adagrad': at stage {stage} DeepSpeed makes one group of all parameters, those without "
            "weight decay too: take stage 0, or AdamW"
        )
    if (
        stage
        and kind not in optimizers.ZERO_TESTED
        and not content.get("zero_allow_untested_optimizer")
    ):
        raise UserError(
            f"optimizer.type is {kind!r}: DeepSpeed has not tested it at stage {stage}: add "
            '"zero_allow_untested_optimizer": true, or take stage 0'
        )
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if offload and stage == 0:
        raise UserError(
            "zero_optimization.offload_optimizer needs a stage of 1 to 3, and the stage is 0"
        )
    params = content.get("optimizer", {}).get("params", {})
    if (
        content.get("zero_force_ds_cpu_optimizer") is True
        and offload
        and params.get("torch_adam", True)
    ):
        raise UserError(
            'zero_force_ds_cpu_optimizer is true: add "torch_adam": false to optimizer.params for DeepSpeed\'s own '
            "optimizer, which is compiled at its first use, or remove it"
        )
    if content.get("gradient_allreduce_op") == "sum" and stage == 3:
        raise UserError(
            'gradient_allreduce_op is "sum": DeepSpeed cannot do it at stage 3: give "mean"'
        )


def _outputs(content: dict[str, Any]) -> None:
    for name, package in keys.PACKAGES.items():
        if content.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{name}.enabled is true: it needs {package}: pip install {package}, or give false"
            )
    checkpointing = content.get("activation_checkpointing", {})
    if checkpointing.get("cpu_checkpointing") and not checkpointing.get("partition_activations"):
        raise UserError(
            "activation_checkpointing.cpu_checkpointing is true: DeepSpeed can do it only with partition_activations: "
            "add that"
        )
    comms = content.get("comms_logger", {})
    if comms.get("enabled") and not comms.get("verbose"):
        raise UserError(
            "comms_logger.enabled is true, but verbose is not: nothing would be printed: add it"
        )


def deep(content: Mapping[str, Any]) -> None:
    """Raise `UserError` for a value that DeepSpeed's own config models refuse; imports DeepSpeed."""
    import pydantic
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        **{
            "zero_optimization": DeepSpeedZeroConfig,
            "fp16": DeepSpeedFP16Config,
            "bf16": DeepSpeedBF16Config,
        },
        **{
            "tensorboard": TensorBoardConfig,
            "wandb": WandbConfig,
            "csv_monitor": CSVConfig,
            "comet": CometConfig,
        },
        "comms_logger": CommsLoggerConfig,
    }
    for section, model in models.items():
        try:
            model(**content.get(section, {}))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            value = (
                f" is {shown(first.get('input'))}" if first["loc"] else ""
            )  # no location: the input is the section
            where = ".".join([section, *map(str, first["loc"])])
            message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            raise UserError(f"{where}{value}: DeepSpeed says: {message}") from None
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"{section}: DeepSpeed says: {error}") from None
