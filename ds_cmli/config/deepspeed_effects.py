"""Lines about keys of a DeepSpeed JSON without effect, and settings that it overrules.

A key that never has an effect here is refused (`deepspeed_keys.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_cmli.common.json_text import Section
from ds_cmli.config import deepspeed_keys as keys
from ds_cmli.config.deepspeed_keys import BATCH_KEYS, FILLED

Idle = tuple[str, Sequence[str], str]  # a section, keys of it that have no effect, and why

# What only a dynamic loss scale reads.
DYNAMIC = (
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)
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


def without_effect(content: Section) -> Iterator[str]:
    """A line for each section with keys that have no effect with the others."""
    for place, names, why in (*_in_sections(content), *_in_parameters(content)):
        section = content
        for name in place.split("."):
            section = section.get(name) or {}
        given = [name for name in names if name in section]
        if given:
            yield f"{place}: no effect: {', '.join(given)}, as {why}"
    scheduler, optimizer = (content.get(name, {}) for name in ("scheduler", "optimizer"))
    params, kind = scheduler.get("params", {}), scheduler.get("type")
    momenta = optimizer.get("params", {}).keys() & {"betas", "momentum"}
    momenta = [name for name in sorted(momenta) if optimizer["params"][name] != "auto"]
    if momenta and kind in CYCLES and params.get("cycle_momentum", True):
        yield (
            f"optimizer.params: {', '.join(momenta)}: the scheduler {kind} cycles the momentum "
            "(cycle_momentum)"
        )
    if params.get("warmup_num_steps") == 1:
        yield "scheduler.params.warmup_num_steps is 1: DeepSpeed takes 2 for it, its least"


def _in_sections(content: Section) -> Iterator[Idle]:
    zero = content.get("zero_optimization", {})
    stage = zero["stage"]
    read_elsewhere = [key for key in zero if key.startswith("stage3_") and stage < 3]
    for stages, names in keys.STAGES.items():
        if stage not in stages:
            read_elsewhere += names.split()
    yield "zero_optimization", sorted(read_elsewhere), f"the stage is {stage}"
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part) or {}
        if offload.get("device", "none") == "none" and offload.get("pin_memory"):
            yield f"zero_optimization.{part}", ["pin_memory"], "nothing is offloaded (device)"
    for name, section in content.items():
        if isinstance(section, dict) and section.get("enabled") is False:
            yield name, sorted(section.keys() - {"enabled"}), "enabled is false"
    fp16, logger = content.get("fp16", {}), content.get("comms_logger", {})
    if fp16.get("enabled") is not False and fp16.get("loss_scale"):
        yield "fp16", DYNAMIC, "loss_scale is fixed"
    if logger.get("enabled") is not False and logger.get("prof_all", True):
        yield "comms_logger", ["prof_ops"], "prof_all logs every operation"


def _in_parameters(content: Section) -> Iterator[Idle]:
    optimizer, scheduler = content.get("optimizer", {}), content.get("scheduler", {})
    of_optimizer = optimizer.get("params", {})
    if optimizer.get("type") == "SGD" and not of_optimizer.get("momentum"):
        yield "optimizer.params", ["dampening"], "there is no momentum"
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    sets = kind in OWN_RATES
    if kind in OWN_RATES_IF_GIVEN:
        sets = params.get("warmup_max_lr", "auto") not in ("auto", of_optimizer.get("lr"))
    if sets and of_optimizer.get("lr") != "auto":
        yield "optimizer.params", ["lr"], f"the scheduler {kind} sets the rates"
    place = "scheduler.params"
    if kind in CYCLES and params.get("cycle_momentum", True) is False:
        names = ["cycle_min_mom", "cycle_max_mom", "decay_mom_rate", "base_momentum"]
        yield place, [*names, "max_momentum"], "cycle_momentum is false"
    if kind == "CyclicLR":
        if params.get("mode", "triangular") != "exp_range":
            yield place, ["gamma"], "the mode is not exp_range"
        yield place, ["scale_mode"], "the mode decides it"
    if kind == "OneCycle" and not params.get("decay_step_size"):
        yield place, ["decay_lr_rate", "decay_mom_rate"], "there is no decay_step_size"
    if kind == "OneCycleLR" and "total_steps" in params:
        yield place, ["epochs", "steps_per_epoch"], "total_steps says it"


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
