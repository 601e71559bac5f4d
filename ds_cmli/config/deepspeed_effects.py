"""Which keys of a DeepSpeed JSON have no effect beside others: a table, and the lines about them.

A key that never has an effect here is refused (`deepspeed_keys.py`). This is about keys that
another one makes idle.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_cmli.config import deepspeed_keys as keys

Section = Mapping[str, Any]


@dataclass(frozen=True)
class Idle:
    """In `section`, the `names` have no effect where its content is so; `why` says it in words."""

    section: str
    names: tuple[str, ...]
    where: Callable[[Section], bool]
    why: str


def _fixed_scale(fp16: Section) -> bool:
    return bool(fp16.get("loss_scale"))


def _no_momentum(params: Section) -> bool:
    return params.get("cycle_momentum", True) is False


def _not_exponential(params: Section) -> bool:
    return params.get("mode", "triangular") != "exp_range"


DYNAMIC = (
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)
IDLE = (
    Idle("fp16", DYNAMIC, _fixed_scale, "loss_scale is fixed"),
    Idle(
        "comms_logger",
        ("prof_ops",),
        lambda logger: logger.get("prof_all", True),
        "prof_all logs every operation",
    ),
)
MOMENTUM = "cycle_momentum is false"
# Of parameters, by the type of the optimizer or scheduler.
PARAMETERS = {
    "SGD": (Idle("optimizer", ("dampening",), lambda params: not params.get("momentum"), "there is no momentum"),),
    "CyclicLR": (
        Idle("scheduler", ("base_momentum", "max_momentum"), _no_momentum, MOMENTUM),
        Idle("scheduler", ("gamma",), _not_exponential, "the mode is not exp_range"),
        Idle("scheduler", ("scale_mode",), lambda params: True, "the mode decides it"),
    ),
    "OneCycle": (
        Idle("scheduler", ("cycle_min_mom", "cycle_max_mom", "decay_mom_rate"), _no_momentum, MOMENTUM),
        Idle(
            "scheduler", ("decay_lr_rate", "decay_mom_rate"), lambda params: not params.get("decay_step_size"),
            "there is no decay_step_size",
        ),
    ),
    "OneCycleLR": (
        Idle("scheduler", ("base_momentum", "max_momentum"), _no_momentum, MOMENTUM),
        Idle("scheduler", ("epochs", "steps_per_epoch"), lambda params: "total_steps" in params, "total_steps says it"),
    ),
}  # fmt: skip
# Schedulers that set every rate themselves; the second ones only where the full rate is given.
OWN_RATES = ("LRRangeTest", "OneCycle", "CyclicLR", "OneCycleLR")
OWN_RATES_IF_GIVEN = ("WarmupLR", "WarmupDecayLR")


def without_effect(content: Section) -> tuple[str, ...]:
    """A line for each section with keys that have no effect beside the others."""
    return (
        *_stage(content),
        *_switched_off(content),
        *_beside_others(content),
        *_rates(content),
        *_least_warmup(content),
    )


def _stage(content: Section) -> Iterator[str]:
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    idle = sorted(
        key
        for stages, names in keys.STAGES.items()
        if stage not in stages
        for key in zero
        if key in names
    )
    if idle:
        yield f"zero_optimization: no effect at stage {stage}: {', '.join(idle)}"
    for what in ("offload_optimizer", "offload_param"):
        given = zero.get(what) or {}
        if given.get("device", "none") == "none" and given.get("pin_memory"):
            yield f"zero_optimization.{what}: no effect: pin_memory, as nothing is offloaded (device)"


def _switched_off(content: Section) -> Iterator[str]:
    for name, section in content.items():
        idle = sorted(set(section) - {"enabled"}) if isinstance(section, dict) else []
        if idle and section.get("enabled") is False:
            yield f"{name}: no effect: {', '.join(idle)}, as enabled is false"


def _beside_others(content: Section) -> Iterator[str]:
    for idle in IDLE:
        section = content.get(idle.section, {})
        if section.get("enabled") is not False:
            yield from _line(idle.section, idle, section)
    for name in ("optimizer", "scheduler"):
        typed = content.get(name, {})
        for idle in PARAMETERS.get(typed.get("type"), ()):
            yield from _line(f"{name}.params", idle, typed.get("params", {}))


def _least_warmup(content: Section) -> Iterator[str]:
    if content.get("scheduler", {}).get("params", {}).get("warmup_num_steps") == 1:
        yield "scheduler.params.warmup_num_steps is 1: DeepSpeed takes 2 for it, its least"


def _line(where: str, idle: Idle, section: Section) -> Iterator[str]:
    found = [key for key in idle.names if key in section]
    if found and idle.where(section):
        yield f"{where}: no effect: {', '.join(found)}, as {idle.why}"


def _rates(content: Section) -> Iterator[str]:
    optimizer = content.get("optimizer", {}).get("params", {})
    scheduler = content.get("scheduler", {})
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    full = params.get("warmup_max_lr", "auto")
    sets = kind in OWN_RATES or (
        kind in OWN_RATES_IF_GIVEN and full not in ("auto", optimizer.get("lr"))
    )
    if sets and optimizer.get("lr", "auto") != "auto":
        yield f"optimizer.params: no effect: lr, as the scheduler {kind} sets the rates"
    cycles = kind in ("OneCycle", "CyclicLR", "OneCycleLR") and not _no_momentum(params)
    given = [key for key in ("betas", "momentum") if optimizer.get(key, "auto") != "auto"]
    if cycles and given:
        yield f"optimizer.params: {', '.join(given)}: the scheduler {kind} cycles the momentum (cycle_momentum)"


def beyond_the_run(scheduler: Section, total_steps: int) -> Iterator[str]:
    """A line for a length of the filled scheduler that does not suit the run's number of steps."""
    kind, params = scheduler["type"], scheduler.get("params", {})
    warmup = params.get("warmup_num_steps", 0)
    if warmup >= max(2, total_steps):
        yield f"scheduler.params.warmup_num_steps is {warmup}: the {total_steps} steps of the run are all warmup"
    if kind == "CosineAnnealingLR" and params["T_max"] < total_steps:
        most = params["T_max"]
        yield f"scheduler.params.T_max is {most}: the rate rises again after it; the run has {total_steps} steps"
