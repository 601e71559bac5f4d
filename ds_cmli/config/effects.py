"""Which settings have no effect beside others: two tables, and the lines about those given.

What only the models or the data decide is told where they are built, in
`engine/parameter_groups.py` and `data/opening.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import NamedTuple

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import LOSSES, over_pairs
from ds_cmli.config.schema import Config, TeacherConfig


class Step(NamedTuple):
    """What the JSON and the launcher decide: how many micro-batches, ranks and steps there are."""

    ds_config: DeepSpeedConfig
    ranks: int
    accumulation: int


class Idle(NamedTuple):
    """A setting has no effect `where` the configuration is so; `why` is formatted with it."""

    where: Callable[[Config], bool]
    why: str


def _beyond(setting: str) -> Idle:
    def where(config: Config) -> bool:
        return config.optim.steps is not None and getattr(config.run, setting) > config.optim.steps

    why = f"it is {{config.run.{setting}}}, and the run has {{config.optim.steps}} steps"
    return Idle(where, why)


_DEMO = Idle(lambda config: config.data.source == "demo", "the demo makes its own pictures")
_NO_LORA = Idle(lambda config: not config.student.lora, "student.lora names no layers")
IDLE = {
    "data.scenes": Idle(
        lambda config: config.data.source != "demo", "only the demo's pictures make scenes"
    ),
    "data.held_out": _DEMO,
    "data.max_bad_share": _DEMO,
    "data.max_pixels": _DEMO,
    "data.follow_symlinks": _DEMO,
    "data.val_split": _DEMO,
    "data.prefetch": Idle(
        lambda config: not config.data.workers, "there is no loading process (--workers)"
    ),
    "student.text_model": Idle(
        lambda config: config.student.text_weights not in ("hub", "random"),
        "student.text_weights {config.student.text_weights!r} says it",
    ),
    "student.weights_partial": Idle(
        lambda c: c.student.image_weights == c.student.text_weights == "random",
        "both encoders' weights are random",
    ),
    "student.lora_rank": _NO_LORA,
    "student.lora_alpha": _NO_LORA,
    "teacher.weights_partial": Idle(
        lambda config: config.teacher.weights == "random", "teacher.weights is 'random'"
    ),
    "loss.target_top": Idle(
        lambda config: config.loss.target != "top", "loss.target is {config.loss.target!r}"
    ),
    "loss.cmli_init_temperature": Idle(
        lambda c: c.loss.target != "attention" and "cmli" not in c.loss.weights,
        "loss.target is {config.loss.target!r}, and no loss is 'cmli'",
    ),
    "loss.cmli_gather_bytes": Idle(
        lambda config: config.loss.cmli_exchange != "auto",
        "loss.cmli_exchange is {config.loss.cmli_exchange!r}",
    ),
    "run.match_maps": Idle(
        lambda config: not config.run.report_to,
        "run.report_to names no tracker, which would show them",
    ),
    "run.log_every": _beyond("log_every"),
    "run.eval_every": _beyond("eval_every"),
    "run.save_every": _beyond("save_every"),
}


def _patience(config: Config) -> str | None:
    steps, every, patience = config.optim.steps, config.run.eval_every, config.run.patience
    if steps is None or not patience:
        return None
    evaluations = -(-steps // every)
    if patience < evaluations:
        return None
    return f"it is {patience}, and the run has {evaluations} evaluations"


def _idle(setting: str, config: Config) -> str | None:
    """Why a setting has no effect, or None if it may have."""
    if setting == "run.patience":
        return _patience(config)
    idle = IDLE.get(setting)
    if idle is None or not idle.where(config):
        return None
    return idle.why.format(config=config)


# Each function returns why a setting has no effect beside the JSON, or None if it has.
WhyInStep = Callable[[Config, Step], str | None]


def _one_rank(config: Config, step: Step) -> str | None:
    if step.ranks == 1:
        return "there is one rank, which exchanges nothing"
    return None


def _one_micro_batch(config: Config, step: Step) -> str | None:
    if step.accumulation > 1:
        return None
    return "a step is one micro-batch (gradient_accumulation_steps 1)"


def _compares_nothing(config: Config, step: Step) -> str | None:
    if step.accumulation == 1 or over_pairs(config.loss.weights):
        return _one_micro_batch(config, step)
    return f"the losses are {', '.join(config.loss.weights)}, which compare no pairs"


def _no_more_negatives(config: Config, step: Step) -> str | None:
    return None if config.optim.queue else _compares_nothing(config, step)


def _no_cache(config: Config, step: Step) -> str | None:
    if config.optim.negatives != "global_batch":
        return f"optim.negatives is {config.optim.negatives!r}, which caches no gradients"
    return _compares_nothing(config, step)


def _no_graph(config: Config, step: Step) -> str | None:
    if _no_cache(config, step) is not None:
        return None
    return "gradient caching keeps no argmax indices that it could compute again"


def _reduced_anyway(config: Config, step: Step) -> str | None:
    stage = step.ds_config.stage
    if step.accumulation > 1 and stage < 2:
        return f"ZeRO stage {stage} reduces once a step anyway"
    return _one_micro_batch(config, step)


def _not_taken(name: str) -> WhyInStep:
    def why(config: Config, step: Step) -> str | None:
        if name in step.ds_config.optimizer_entry.takes:
            return None
        return f"the optimizer {step.ds_config.optimizer_type} has none"

    return why


IN_STEP: dict[str, WhyInStep] = {
    "optim.negatives": _no_more_negatives,
    "optim.cache_on_host": _no_cache,
    "optim.reduce_once": _reduced_anyway,
    "loss.cmli_recompute": _no_graph,
    "loss.cmli_exchange": _one_rank,
    "loss.cmli_gather_bytes": _one_rank,
    "optim.betas": _not_taken("betas"),
    "optim.eps": _not_taken("eps"),
    "optim.weight_decay": _not_taken("weight_decay"),
}


def read_by_losses() -> dict[str, list[str]]:
    """The settings that only some losses read, with the names of these losses."""
    out: dict[str, list[str]] = {}
    for name, loss in LOSSES.items():
        read = [f"loss.{setting}" for setting in loss.settings]
        if loss.teacher:
            read += [f"teacher.{setting.name}" for setting in fields(TeacherConfig)]
        for setting in read:
            out.setdefault(setting, []).append(name)
    return out


def _unread(config: Config) -> dict[str, str]:
    """The settings that none of the chosen losses reads, each with the first loss that would."""
    out = {}
    for setting, losses in read_by_losses().items():
        if not config.loss.weights.keys() & set(losses):
            out[setting] = losses[0]
    return out


def without_effect(config: Config, given: Mapping[str, str]) -> Iterator[str]:
    """A line for each setting that has no effect beside the other settings.

    Args:
        given: the settings that were given, and how: `{"run.keep": "--keep"}`.
    """
    unread = _unread(config)
    for name in sorted(given):
        why = _idle(name, config)
        if name in unread:
            why = f"the losses are {', '.join(config.loss.weights)}, without {unread[name]}"
        if why is not None:
            yield f"{given[name]} has no effect: {why}"


def without_effect_in_step(
    config: Config, ds_config: DeepSpeedConfig, ranks: int, given: Mapping[str, str]
) -> Iterator[str]:
    """A line for each further setting without effect beside the JSON and with this many ranks."""
    try:
        step = Step(ds_config, ranks, ds_config.batch(config.optim.micro_batch, ranks).accumulation)
    except UserError:  # told where the run needs it
        return
    unread = _unread(config)
    for name in sorted(given.keys() & IN_STEP.keys() - unread.keys()):
        if _idle(name, config) is not None:
            continue  # told by `without_effect`
        why = IN_STEP[name](config, step)
        if why is not None:
            yield f"{given[name]} has no effect: {why}"
