"""Which settings have no effect with others: and the lines about those given.

What only the models or the data decide is printed where they are built, in
`engine/parameter_groups.py` and `data/opening.py`.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import LOSSES, over_pairs
from ds_cmli.config.schema import Config, TeacherConfig

Reason = tuple[str, str]  # a setting that has no effect, and why


def _of_data_and_models(config: Config) -> Iterator[Reason]:
    data, student, teacher = config.data, config.student, config.teacher
    if data.source == "demo":
        for name in ("held_out", "max_bad_share", "max_pixels", "val_split"):
            yield f"data.{name}", "the demo makes its own pictures"
    else:
        yield "data.scenes", "only the demo's pictures make scenes"
    if not data.workers:
        yield "data.prefetch", "there is no loading process (--workers)"
    if student.text_weights not in ("hub", "random"):
        yield "student.text_model", f"student.text_weights {student.text_weights!r} says it"
    if student.image_weights == student.text_weights == "random":
        yield "student.weights_partial", "both encoders' weights are random"
    if not student.lora:
        for name in ("lora_rank", "lora_alpha"):
            yield f"student.{name}", "student.lora names no layers"
    if teacher.weights == "random":
        yield "teacher.weights_partial", "teacher.weights is 'random'"


def _of_run(config: Config) -> Iterator[Reason]:
    run, steps = config.run, config.optim.steps
    if steps is None:
        return
    for name in ("log_every", "eval_every", "save_every"):
        every = getattr(run, name)
        if every > steps:
            yield f"run.{name}", f"it is {every}, and the run has {steps} steps"
    if run.patience:
        evaluations = -(-steps // run.eval_every)
        if run.patience >= evaluations:
            why = f"it is {run.patience}, and the run has {evaluations} evaluations"
            yield "run.patience", why


def _of_optimizer(ds_config: DeepSpeedConfig) -> Iterator[Reason]:
    for name in ("betas", "eps", "weight_decay"):
        if name not in ds_config.optimizer_entry.takes:
            yield f"optim.{name}", f"the optimizer {ds_config.optimizer_type} has none"


def _of_accumulation(config: Config, stage: int, accumulation: int) -> Iterator[Reason]:
    one = "a step is one micro-batch (gradient_accumulation_steps 1)"
    cached, why = accumulation > 1, one
    if cached and not over_pairs(config.loss.weights):
        cached = False
        why = f"the losses are {', '.join(config.loss.weights)}, which compare no pairs"
    if not cached:
        yield "optim.negatives", why
    if accumulation == 1:
        yield "optim.reduce_once", one
    elif stage < 2:
        yield "optim.reduce_once", f"ZeRO stage {stage} reduces once a step anyway"


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
    idle = reasons(config, ds_config, ranks)
    for name in sorted(given.keys() & idle.keys()):
        yield f"{given[name]} has no effect: {idle[name]}"


def reasons(config: Config, ds_config: DeepSpeedConfig, ranks: int) -> dict[str, str]:
    """The settings that have no effect, given or not, each with the reason."""
    out: dict[str, str] = {}
    out.update(_of_data_and_models(config))
    out.update(_of_run(config))
    out.update(_of_optimizer(ds_config))
    with suppress(UserError):  # a batch that is none for so many ranks, raised where it is needed
        accumulation = ds_config.batch(config.optim.micro_batch, ranks).accumulation
        out.update(_of_accumulation(config, ds_config.stage, accumulation))
    weights = config.loss.weights
    for setting, losses in read_by_losses().items():
        if not weights.keys() & {*losses}:
            out[setting] = f"the losses are {', '.join(weights)}, without {losses[0]}"
    return out
