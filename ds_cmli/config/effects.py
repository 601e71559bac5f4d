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


# Each function returns why the settings that it stands beside have no effect, or None if they have.
Why = Callable[[Config], str | None]
WhyInStep = Callable[[Config, Step], str | None]


def _demo(config: Config) -> str | None:
    return "the demo makes its own pictures" if config.data.source == "demo" else None


def _text_model(config: Config) -> str | None:
    weights = config.student.text_weights
    return None if weights in ("hub", "random") else f"student.text_weights {weights!r} says it"


def _no_workers(config: Config) -> str | None:
    return None if config.data.workers else "there is no loading process (--workers)"


def _exchange(config: Config) -> str | None:
    exchange = config.loss.cmli_exchange
    return None if exchange == "auto" else f"loss.cmli_exchange is {exchange!r}"


def _random_student(config: Config) -> str | None:
    random = config.student.image_weights == config.student.text_weights == "random"
    return "both encoders' weights are random" if random else None


def _random_teacher(config: Config) -> str | None:
    return "teacher.weights is 'random'" if config.teacher.weights == "random" else None


def _no_tracker(config: Config) -> str | None:
    return None if config.run.report_to else "run.report_to names no tracker, which would show them"


def _beyond(setting: str) -> Why:
    def why(config: Config) -> str | None:
        steps, every = config.optim.steps, getattr(config.run, setting)
        if steps is None or every <= steps:
            return None
        return f"it is {every}, and the run has {steps} steps"

    return why


def _patience(config: Config) -> str | None:
    steps, every, patience = config.optim.steps, config.run.eval_every, config.run.patience
    if steps is None or not patience:
        return None
    evaluations = -(-steps // every)
    if patience < evaluations:
        return None
    return f"it is {patience}, and the run has {evaluations} evaluations"


IDLE: dict[str, Why] = {
    "data.max_bad_share": _demo,
    "data.max_pixels": _demo,
    "data.follow_symlinks": _demo,
    "data.val_split": _demo,
    "data.prefetch": _no_workers,
    "student.text_model": _text_model,
    "student.weights_partial": _random_student,
    "teacher.weights_partial": _random_teacher,
    "loss.cmli_gather_bytes": _exchange,
    "run.match_maps": _no_tracker,
    "run.patience": _patience,
    "run.log_every": _beyond("log_every"),
    "run.eval_every": _beyond("eval_every"),
    "run.save_every": _beyond("save_every"),
}


def _one_rank(config: Config, step: Step) -> str | None:
    return "there is one rank, which exchanges nothing" if step.ranks == 1 else None


def _one_micro_batch(config: Config, step: Step) -> str | None:
    if step.accumulation > 1:
        return None
    return "a step is one micro-batch (gradient_accumulation_steps 1)"


def _compares_nothing(config: Config, step: Step) -> str | None:
    if step.accumulation == 1 or over_pairs(config.loss.weights):
        return _one_micro_batch(config, step)
    return f"the losses are {', '.join(config.loss.weights)}, which compare no pairs"


def _no_cache(config: Config, step: Step) -> str | None:
    if config.optim.negatives == "micro_batch":
        return "optim.negatives is 'micro_batch', which caches no gradients"
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
        if name in step.ds_config.optimizer_entry.parameters:
            return None
        return f"the optimizer {step.ds_config.optimizer_type} has none"

    return why


IN_STEP: dict[str, WhyInStep] = {
    "optim.negatives": _compares_nothing,
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
        why = IDLE[name](config) if name in IDLE else None
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
        if name in IDLE and IDLE[name](config) is not None:
            continue  # told by `without_effect`
        why = IN_STEP[name](config, step)
        if why is not None:
            yield f"{given[name]} has no effect: {why}"
