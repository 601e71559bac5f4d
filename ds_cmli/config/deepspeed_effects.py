"""Lines about keys of a DeepSpeed JSON without effect, and settings that it overrules.

A key that never has an effect here is refused (`deepspeed_keys.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ds_cmli.common.json_text import Section
from ds_cmli.config import deepspeed_keys as keys

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Parameters of the optimizer that are filled from `OptimConfig`.
FILLED = ("lr", "betas", "eps", "weight_decay")


class Idle(NamedTuple):
    """The `names` of a section have no effect where its content is so; `why` says it in words."""

    names: tuple[str, ...]
    where: Callable[[Section], bool]
    why: str


def _no_cycle(params: Section) -> bool:
    return params.get("cycle_momentum", True) is False


_DYNAMIC = (
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)
IDLE = {
    "fp16": Idle(_DYNAMIC, lambda fp16: bool(fp16.get("loss_scale")), "loss_scale is fixed"),
    "comms_logger": Idle(
        ("prof_ops",), lambda logger: logger.get("prof_all", True), "prof_all logs every operation"
    ),
}
_ENDS = Idle(("base_momentum", "max_momentum"), _no_cycle, "cycle_momentum is false")
_CYCLE = ("cycle_min_mom", "cycle_max_mom", "decay_mom_rate")
# Parameters, by the type of the optimizer or scheduler.
PARAMETERS = {
    "SGD": (
        Idle(("dampening",), lambda params: not params.get("momentum"), "there is no momentum"),
    ),
    "CyclicLR": (
        _ENDS,
        Idle(
            ("gamma",),
            lambda params: params.get("mode", "triangular") != "exp_range",
            "the mode is not exp_range",
        ),
        Idle(("scale_mode",), lambda params: True, "the mode decides it"),
    ),
    "OneCycle": (
        Idle(_CYCLE, _no_cycle, "cycle_momentum is false"),
        Idle(
            ("decay_lr_rate", "decay_mom_rate"),
            lambda params: not params.get("decay_step_size"),
            "there is no decay_step_size",
        ),
    ),
    "OneCycleLR": (
        _ENDS,
        Idle(
            ("epochs", "steps_per_epoch"),
            lambda params: "total_steps" in params,
            "total_steps says it",
        ),
    ),
}
CYCLES = ("OneCycle", "CyclicLR", "OneCycleLR")  # schedulers that change the momentum too
# Schedulers that set every rate themselves; the second ones only where the full rate is given.
OWN_RATES = ("LRRangeTest", *CYCLES)
OWN_RATES_IF_GIVEN = ("WarmupLR", "WarmupDecayLR")
# Parameters of schedulers that set the rate; the first that is given overrules `optim.lr`.
RATES = (
    "warmup_max_lr",
    "cycle_max_lr",
    "max_lr",
    "lr_range_test_min_lr",
    "cycle_min_lr",
    "base_lr",
)


def without_effect(content: Section) -> tuple[str, ...]:
    """A line for each section with keys that have no effect with the others."""
    return (
        *_stage(content.get("zero_optimization", {})),
        *_switched_off(content),
        *_beside_others(content),
        *_rates(content),
        *_least_warmup(content),
    )


def _stage(zero: Section) -> Iterator[str]:
    stage = zero.get("stage", 0)
    idle = sorted(key for key in zero if stage < 3 and key.startswith("stage3_"))
    for stages, names in keys.STAGES.items():
        if stage not in stages:
            idle = sorted({*idle, *zero.keys() & names.split()})
    if idle:
        yield f"zero_optimization: no effect at stage {stage}: {', '.join(idle)}"
    for what in ("offload_optimizer", "offload_param"):
        given = zero.get(what) or {}
        if given.get("device", "none") == "none" and given.get("pin_memory"):
            yield (
                f"zero_optimization.{what}: no effect: pin_memory, as nothing is offloaded (device)"
            )


def _switched_off(content: Section) -> Iterator[str]:
    for name, section in content.items():
        if isinstance(section, dict) and section.get("enabled") is False and len(section) > 1:
            idle = ", ".join(sorted(section.keys() - {"enabled"}))
            yield f"{name}: no effect: {idle}, as enabled is false"


def _beside_others(content: Section) -> Iterator[str]:
    for name, idle in IDLE.items():
        section = content.get(name, {})
        if section.get("enabled") is not False:
            yield from _line(name, idle, section)
    for name in ("optimizer", "scheduler"):
        typed = content.get(name, {})
        for idle in PARAMETERS.get(typed.get("type"), ()):
            yield from _line(f"{name}.params", idle, typed.get("params", {}))


def _line(where: str, idle: Idle, section: Section) -> Iterator[str]:
    given = [key for key in idle.names if key in section]
    if given and idle.where(section):
        yield f"{where}: no effect: {', '.join(given)}, as {idle.why}"


def _rates(content: Section) -> Iterator[str]:
    optimizer = content.get("optimizer", {}).get("params", {})
    scheduler = content.get("scheduler", {})
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    sets = kind in OWN_RATES
    if kind in OWN_RATES_IF_GIVEN:
        sets = params.get("warmup_max_lr", "auto") not in ("auto", optimizer.get("lr"))
    if sets and optimizer.get("lr", "auto") != "auto":
        yield f"optimizer.params: no effect: lr, as the scheduler {kind} sets the rates"
    given = [key for key in ("betas", "momentum") if optimizer.get(key, "auto") != "auto"]
    if given and kind in CYCLES and not _no_cycle(params):
        yield (
            f"optimizer.params: {', '.join(given)}: the scheduler {kind} cycles the momentum "
            "(cycle_momentum)"
        )


def _least_warmup(content: Section) -> Iterator[str]:
    if content.get("scheduler", {}).get("params", {}).get("warmup_num_steps") == 1:
        yield "scheduler.params.warmup_num_steps is 1: DeepSpeed takes 2 for it, its least"


def beyond_the_run(scheduler: Section, total_steps: int) -> Iterator[str]:
    """A line for a length of the filled scheduler that does not suit the run's number of steps."""
    kind, params = scheduler["type"], scheduler.get("params", {})
    warmup = params.get("warmup_num_steps", 0)
    if warmup >= max(2, total_steps):
        yield (
            f"scheduler.params.warmup_num_steps is {warmup}: the {total_steps} steps of the run "
            "are all warmup"
        )
    if kind == "CosineAnnealingLR" and params["T_max"] < total_steps:
        yield (
            f"scheduler.params.T_max is {params['T_max']}: the rate rises again after it; the run "
            f"has {total_steps} steps"
        )


def overruled(content: Section, given: Mapping[str, tuple[str, Any]]) -> Iterator[str]:
    """A line for each setting of `optim` that the JSON overrules.

    Args:
        given: the settings with their options and values: `{"lr": ("--lr", 0.1)}`.
    """
    for setting, (option, value) in given.items():
        where, said = _overruling(content, setting)
        if said not in ("auto", value):
            yield f"{option} {value} does not count: the DeepSpeed JSON says {where} {said}"


def _overruling(content: Section, setting: str) -> tuple[str, Any]:
    """Where the JSON says a setting of `optim`, and what; "auto" if it does not."""
    scheduler = content.get("scheduler", {})
    params = scheduler.get("params", {})
    if setting == "micro_batch":
        total, micro, steps = (content.get(key, "auto") for key in BATCH_KEYS)
        if "auto" not in (total, steps):
            return f"{BATCH_KEYS[0]} and {BATCH_KEYS[2]}", [total, steps]
        return BATCH_KEYS[1], micro
    if setting == "grad_clip":
        return "gradient_clipping", content.get("gradient_clipping", "auto")
    if setting == "lr":
        for name in RATES:
            if params.get(name, "auto") != "auto":
                return f"scheduler.params.{name}", params[name]
    if setting == "warmup_share" and scheduler and params.get("warmup_num_steps") != "auto":
        return "scheduler", scheduler.get("type")
    if setting in FILLED:
        optimizer = content.get("optimizer", {}).get("params", {})
        return f"optimizer.params.{setting}", optimizer.get(setting, "auto")
    return "", "auto"
