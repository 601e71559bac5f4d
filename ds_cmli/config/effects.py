"""Which settings have no effect with others: a table, and the lines about those given.

What only the models or the data decide is printed where they are built, in
`engine/parameter_groups.py` and `data/opening.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
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
    accumulation: int  # 0: not known, as the JSON's batch is none for so many ranks


# Returns why a setting has no effect with the others and the JSON, or None if it has.
Why = Callable[[Config, Step], str | None]


def _where(idle: Callable[[Config], bool], why: str) -> Why:
    """Idle where the configuration is so; `why` is formatted with it."""
    return lambda config, step: why.format(config=config) if idle(config) else None


def _beyond(setting: str) -> Why:
    def idle(config: Config) -> bool:
        return config.optim.steps is not None and getattr(config.run, setting) > config.optim.steps

    return _where(
        idle, f"it is {{config.run.{setting}}}, and the run has {{config.optim.steps}} steps"
    )


def _patience(config: Config, step: Step) -> str | None:
    steps, every, patience = config.optim.steps, config.run.eval_every, config.run.patience
    if steps is None or not patience:
        return None
    evaluations = -(-steps // every)
    if patience < evaluations:
        return None
    return f"it is {patience}, and the run has {evaluations} evaluations"


def _one_rank(config: Config, step: Step) -> str | None:
    if step.ranks == 1:
        return "there is one rank, which exchanges nothing"
    return None


def _fixed_exchange(config: Config, step: Step) -> str | None:
    if config.loss.cmli_exchange != "auto":
        return f"loss.cmli_exchange is {config.loss.cmli_exchange!r}"
    return _one_rank(config, step)


def _one_micro_batch(config: Config, step: Step) -> str | None:
    if step.accumulation != 1:
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
    if not step.accumulation or _no_cache(config, step) is not None:
        return None
    return "gradient caching keeps no argmax indices that it could compute again"


def _reduced_anyway(config: Config, step: Step) -> str | None:
    stage = step.ds_config.stage
    if step.accumulation > 1 and stage < 2:
        return f"ZeRO stage {stage} reduces once a step anyway"
    return _one_micro_batch(config, step)


def _not_taken(name: str) -> Why:
    def why(config: Config, step: Step) -> str | None:
        if name in step.ds_config.optimizer_entry.takes:
            return None
        return f"the optimizer {step.ds_config.optimizer_type} has none"

    return why


_DEMO = _where(lambda config: config.data.source == "demo", "the demo makes its own pictures")
_NO_LORA = _where(lambda config: not config.student.lora, "student.lora names no layers")
IDLE: dict[str, Why] = {
    "data.scenes": _where(
        lambda config: config.data.source != "demo", "only the demo's pictures make scenes"
    ),
    "data.held_out": _DEMO,
    "data.max_bad_share": _DEMO,
    "data.max_pixels": _DEMO,
    "data.follow_symlinks": _DEMO,
    "data.val_split": _DEMO,
    "data.prefetch": _where(
        lambda config: not config.data.workers, "there is no loading process (--workers)"
    ),
    "student.text_model": _where(
        lambda config: config.student.text_weights not in ("hub", "random"),
        "student.text_weights {config.student.text_weights!r} says it",
    ),
    "student.weights_partial": _where(
        lambda c: c.student.image_weights == c.student.text_weights == "random",
        "both encoders' weights are random",
    ),
    "student.lora_rank": _NO_LORA,
    "student.lora_alpha": _NO_LORA,
    "teacher.weights_partial": _where(
        lambda config: config.teacher.weights == "random", "teacher.weights is 'random'"
    ),
    "loss.target_top": _where(
        lambda config: config.loss.target != "top", "loss.target is {config.loss.target!r}"
    ),
    "loss.cmli_init_temperature": _where(
        lambda c: c.loss.target != "attention" and "cmli" not in c.loss.weights,
        "loss.target is {config.loss.target!r}, and no loss is 'cmli'",
    ),
    "loss.cmli_recompute": _no_graph,
    "loss.cmli_exchange": _one_rank,
    "loss.cmli_gather_bytes": _fixed_exchange,
    "optim.negatives": _no_more_negatives,
    "optim.cache_on_host": _no_cache,
    "optim.reduce_once": _reduced_anyway,
    "optim.betas": _not_taken("betas"),
    "optim.eps": _not_taken("eps"),
    "optim.weight_decay": _not_taken("weight_decay"),
    "run.match_maps": _where(
        lambda config: not config.run.report_to,
        "run.report_to names no tracker, which would show them",
    ),
    "run.log_every": _beyond("log_every"),
    "run.eval_every": _beyond("eval_every"),
    "run.save_every": _beyond("save_every"),
    "run.patience": _patience,
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


def without_effect(
    config: Config, ds_config: DeepSpeedConfig, ranks: int, given: Mapping[str, str]
) -> Iterator[str]:
    """A line for each setting without effect with the others, the JSON and so many ranks.

    Args:
        given: the settings that were given, and how: `{"run.keep": "--keep"}`.
    """
    accumulation = 0
    with suppress(UserError):  # raised where the run needs it
        accumulation = ds_config.batch(config.optim.micro_batch, ranks).accumulation
    step = Step(ds_config, ranks, accumulation)
    losses, readers = config.loss.weights, read_by_losses()
    for name in sorted(given):
        why = IDLE[name](config, step) if name in IDLE else None
        if name in readers and not losses.keys() & {*readers[name]}:
            why = f"the losses are {', '.join(losses)}, without {readers[name][0]}"
        if why is not None:
            yield f"{given[name]} has no effect: {why}"
