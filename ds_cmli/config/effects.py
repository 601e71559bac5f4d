"""Which settings have no effect beside others: a table, and the lines about those that were given.

What only the models or the data decide is told where they are built, in
`engine/parameter_groups.py` and `data/opening.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import LOSSES
from ds_cmli.config.schema import Config, TeacherConfig

# Settings that only some losses read, with the names of these losses.
OF_LOSSES = {
    **{
        f"loss.{s}": [n for n, e in LOSSES.items() if s in e.settings]
        for e in LOSSES.values()
        for s in e.settings
    },
    **{
        f"teacher.{f.name}": [n for n, e in LOSSES.items() if e.teacher]
        for f in fields(TeacherConfig)
    },
}


@dataclass(frozen=True)
class Step:
    """What the JSON and the launcher decide: how many micro-batches, ranks and steps there are."""

    ds_config: DeepSpeedConfig
    ranks: int
    accumulation: int


@dataclass(frozen=True)
class Idle:
    """The `settings` have no effect if `why` returns a reason."""

    settings: tuple[str, ...]
    why: Callable[[Config], str | None]


@dataclass(frozen=True)
class IdleInStep:
    """The same for what depends on the JSON or the number of ranks too."""

    settings: tuple[str, ...]
    why: Callable[[Config, Step], str | None]


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


def _beyond(setting: str) -> Callable[[Config], str | None]:
    def why(config: Config) -> str | None:
        steps, every = config.optim.steps, getattr(config.run, setting)
        return (
            f"it is {every}, and the run has {steps} steps"
            if steps is not None and every > steps
            else None
        )

    return why


def _patience(config: Config) -> str | None:
    steps, every, patience = config.optim.steps, config.run.eval_every, config.run.patience
    if steps is None or not patience:
        return None
    evaluations = -(-steps // every)
    return (
        f"it is {patience}, and the run has {evaluations} evaluations"
        if patience >= evaluations
        else None
    )


IDLE = (
    Idle(
        ("data.max_bad_share", "data.max_pixels", "data.follow_symlinks", "data.val_split"), _demo
    ),
    Idle(("data.prefetch",), _no_workers),
    Idle(("student.text_model",), _text_model),
    Idle(("student.weights_partial",), _random_student),
    Idle(("teacher.weights_partial",), _random_teacher),
    Idle(("loss.cmli_gather_bytes",), _exchange),
    Idle(("run.match_maps",), _no_tracker),
    Idle(("run.patience",), _patience),
    *(
        Idle((f"run.{setting}",), _beyond(setting))
        for setting in ("log_every", "eval_every", "save_every")
    ),
)


def _one_rank(config: Config, step: Step) -> str | None:
    return "there is one rank, which exchanges nothing" if step.ranks == 1 else None


def _one_micro_batch(config: Config, step: Step) -> str | None:
    return (
        "a step is one micro-batch (gradient_accumulation_steps 1)"
        if step.accumulation == 1
        else None
    )


def _no_pairs(config: Config, step: Step) -> str | None:
    compared = any(LOSSES[name].scores for name in config.loss.weights)
    return (
        None
        if compared
        else f"the losses are {', '.join(config.loss.weights)}, which compare no pairs"
    )


def _no_cache(config: Config, step: Step) -> str | None:
    if config.optim.negatives == "micro_batch":
        return "optim.negatives is 'micro_batch', which caches no gradients"
    return _one_micro_batch(config, step) or _no_pairs(config, step)


def _no_graph(config: Config, step: Step) -> str | None:
    cached = _no_cache(config, step) is None
    return (
        "gradient caching keeps no argmax indices that it could compute again" if cached else None
    )


def _reduced_anyway(config: Config, step: Step) -> str | None:
    stage = step.ds_config.stage
    late = f"ZeRO stage {stage} reduces once a step anyway" if stage < 2 else None
    return _one_micro_batch(config, step) or late


def _not_taken(name: str) -> Callable[[Config, Step], str | None]:
    def why(config: Config, step: Step) -> str | None:
        kind = step.ds_config.optimizer_type
        return (
            None
            if name in step.ds_config.optimizer_entry.parameters
            else f"the optimizer {kind} has none"
        )

    return why


IN_STEP = (
    IdleInStep(
        ("optim.negatives",),
        lambda config, step: _one_micro_batch(config, step) or _no_pairs(config, step),
    ),
    IdleInStep(("optim.cache_on_host",), _no_cache),
    IdleInStep(("optim.reduce_once",), _reduced_anyway),
    IdleInStep(("loss.cmli_recompute",), _no_graph),
    IdleInStep(("loss.cmli_exchange", "loss.cmli_gather_bytes"), _one_rank),
    *(
        IdleInStep((f"optim.{name}",), _not_taken(name))
        for name in ("betas", "eps", "weight_decay")
    ),
)


def without_effect(config: Config, given: Mapping[str, str]) -> Iterator[str]:
    """A line for each setting that has no effect beside the other settings.

    Args:
        given: the settings that were given, and how: `{"run.keep": "--keep"}`.
    """
    for name in sorted(given):
        losses = OF_LOSSES.get(name)
        if losses and not set(losses) & set(config.loss.weights):
            chosen = ", ".join(config.loss.weights)
            yield f"{given[name]} has no effect: the losses are {chosen}, without {losses[0]}"
            continue
        for idle in IDLE:
            if name in idle.settings and (why := idle.why(config)):
                yield f"{given[name]} has no effect: {why}"


def without_effect_in_step(
    config: Config, ds_config: DeepSpeedConfig, ranks: int, given: Mapping[str, str]
) -> Iterator[str]:
    """The same beside the JSON and with this number of ranks."""
    try:
        step = Step(ds_config, ranks, ds_config.batch(config.optim.micro_batch, ranks).accumulation)
    except UserError:  # told where the run needs it
        return
    told = {
        name for name in given if any(name in idle.settings and idle.why(config) for idle in IDLE)
    }
    for name in sorted(set(given) - told):
        losses = OF_LOSSES.get(name)
        if losses and not set(losses) & set(config.loss.weights):
            continue
        for idle in IN_STEP:
            if name in idle.settings and (why := idle.why(config, step)):
                yield f"{given[name]} has no effect: {why}"
