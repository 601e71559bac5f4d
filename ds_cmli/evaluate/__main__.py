"""`python -m ds_cmli.evaluate`: a trained student on a held-out split.

It also runs on several ranks: `torchrun --nproc_per_node 2 -m ds_cmli.evaluate ...`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# When this file is run by its path, this folder is first on sys.path and would hide packages
# named like its modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import click

from ds_cmli.common.cli import GroupedCommand, check_writable, option, run_command, say
from ds_cmli.common.errors import UserError
from ds_cmli.config.plugins import plugin_option
from ds_cmli.config.sources import Source
from ds_cmli.distributed import launchers
from ds_cmli.evaluate.options import EvaluationOptions, check
from ds_cmli.evaluate.report import Metrics, classification, pointing, prefixed, summary

if TYPE_CHECKING:
    from ds_cmli.config.schema import Config
    from ds_cmli.data.build import EvalData
    from ds_cmli.evaluate.embed import EmbedSettings
    from ds_cmli.losses.objective import Objective

SPLITS = ("val", "test", "all")
what = partial(option, "What")
retrieval = partial(option, "Retrieval")
zero_shot = partial(option, "Zero-shot classification")


@click.command(cls=GroupedCommand)
@click.argument("model", required=False, metavar="[MODEL]")
@plugin_option
@what("--checkpoint", help="A run's output folder, as MODEL.")
@what(
    "--ema",
    is_flag=True,
    help="Use the averaged weights (optim.ema_decay), not the last ones.",
)
@what("--batch-size", default=50, show_default=True, help="Pictures or captions per batch.")
@what("--workers", default=0, show_default=True, help="Data loading processes per rank.")
@what("--json", "json_file", help="Write the metrics to this file too.")
@retrieval(
    "--data",
    "source",
    help="Data as in training: 'demo', a folder, tars, COCO's JSON, ...; without a validation part "
    "it is used whole.  [the run's own]",
)
@retrieval("--image-root", help="Folder of the images that a list names, and those of --boxes.")
@retrieval(
    "--split",
    type=click.Choice(SPLITS),
    help="Part of --data and --boxes: val: what training holds out; test: Karpathy's test part; "
    "all.  [the run's]",
)
@retrieval(
    "--fold-size",
    type=int,
    metavar="PICTURES",
    help="Also average retrieval over folds of so many pictures: 1000 for COCO 1k.",
)
@zero_shot(
    "--zero-shot",
    metavar="FOLDER",
    help="Classify the pictures of a folder of class folders instead, of a .tar of such, or of "
    "hfds/NAME.",
)
@zero_shot(
    "--class-names",
    metavar="FILE",
    help="One name per line in the order of the folders, or JSON {folder: name}.  [the folders' "
    "names]",
)
@zero_shot(
    "--templates", metavar="FILE", help="Prompts with {} for the name, by line.  [seven of CLIP's]"
)
@option(
    "Pointing game",
    "--boxes",
    metavar="FOLDER",
    help="Play the pointing game on Flickr30k Entities instead, a folder with Annotations/ and "
    "Sentences/.",
)
def command(
    model: str | None, checkpoint: str | None, json_file: str | None, **options: Any
) -> None:
    """Evaluate a model as papers report it: retrieval on held-out pairs, pointing-game accuracy on
    scenes.

    MODEL is a run's output folder, or what training may start from: an export, a CLIP or SigLIP
    model of transformers, or a model of open_clip, by its folder or its name on the hub.

    With --zero-shot it classifies pictures, with --boxes it plays the pointing game on photographs.
    """
    if (model is None) == (checkpoint is None):
        count = "none is" if model is None else "2 are"
        raise UserError(f"MODEL or --checkpoint: {count} given: give one")
    name = model if checkpoint is None else checkpoint
    assert name is not None
    is_run = checkpoint is not None or Source(name).has_own_data
    request = EvaluationOptions(name, is_run, **options)
    if json_file:
        check_writable(json_file)
    check(request)
    config = _configured(request)
    from ds_cmli.distributed import process_group as distributed

    launchers.map_launcher_environment()
    if not request.boxes and not request.zero_shot:
        _take_data(config, request)
    mode: Callable[[Config, EvaluationOptions], Metrics] = _retrieval
    if request.zero_shot:
        mode = _zero_shot
    elif request.boxes:
        mode = _boxes
    try:
        metrics = mode(config, request)  # collective
        if json_file and distributed.is_main():
            Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")
    finally:
        distributed.shutdown()


def _configured(request: EvaluationOptions) -> "Config":
    """The configuration of the run, or that by which another model is evaluated."""
    from ds_cmli.config.schema import load_config
    from ds_cmli.config.sources import to_evaluate

    if request.is_run:
        return load_config(Path(request.model) / "run.json", "--checkpoint")
    given = request.source or request.boxes or request.zero_shot
    if request.ema or not given:
        raise UserError(
            f"{request.model!r} is no run, which has averages and data of its own: give --data, "
            "and leave out --ema"
        )
    return to_evaluate(Source(request.model))


def _take_data(config: "Config", request: EvaluationOptions) -> None:
    """Put the requested data in the place of the run's own."""
    from ds_cmli.data.build import evaluation_data

    if request.source:
        config.data = evaluation_data(config.data, request.source)
        if request.split is not None:  # it names a part, or the share that training would hold out
            config.data = dataclasses.replace(config.data, val_source="")
    if request.image_root:
        config.data = dataclasses.replace(config.data, image_root=request.image_root)


def _retrieval(config: "Config", request: EvaluationOptions) -> Metrics:
    """Measure retrieval, and the pointing game on scenes. Collective."""
    from ds_cmli.data.build import build_eval_data
    from ds_cmli.evaluate.split import evaluate_split

    data = build_eval_data(config.data, config.run.seed, request.split)
    say(*data.summary)
    objective, how = _started(config, request, data)  # collective
    metrics: Metrics = {}
    for split, dataset in data.evals.items():
        figures = evaluate_split(objective, dataset, data, how, request.fold_size)  # collective
        metrics |= prefixed(f"eval/{split}/", figures)
        say(summary(split, figures))
    return metrics


def _zero_shot(config: "Config", request: EvaluationOptions) -> Metrics:
    """Classify pictures. Collective."""
    from ds_cmli.data.build import EvalData
    from ds_cmli.data.pairs import batches
    from ds_cmli.data.tokens import tokenizer_of
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate import zero_shot
    from ds_cmli.evaluate.embed import padded_share
    from ds_cmli.evaluate.held_out import collate_pictures

    assert request.zero_shot is not None
    templates = zero_shot.prompt_templates(request.templates)
    pictures = zero_shot.ClassPictures(request.zero_shot, config.data)
    names = zero_shot.class_names(pictures.folders, request.class_names)
    tokenizer = tokenizer_of(config.data)
    objective, how = _started(config, request, EvalData(tokenizer=tokenizer))  # collective
    classifier = zero_shot.build_classifier(
        objective.eval(), tokenizer, names, templates, how
    )  # collective
    own = padded_share(len(pictures), distributed.rank(), distributed.world_size())
    loader = batches(pictures.pictures(own), how.batch_size, how.workers, collate_pictures)
    figures = zero_shot.classify(objective.student, loader, classifier, how)  # collective
    say(classification(figures))
    return prefixed("zero_shot/", figures)


def _boxes(config: "Config", request: EvaluationOptions) -> Metrics:
    """Play the pointing game on photographs. Collective."""
    from ds_cmli.data.build import EvalData
    from ds_cmli.data.tokens import tokenizer_of
    from ds_cmli.evaluate.pointing_game import Entities, pointing_game

    assert request.boxes is not None and request.image_root is not None
    tokenizer = tokenizer_of(config.data)
    split = request.split or "val"
    entities = Entities(request.boxes, request.image_root, split, tokenizer, config.data)
    objective, how = _started(config, request, EvalData(tokenizer=tokenizer))  # collective
    figures = pointing_game(objective.eval().student, entities, how)  # collective
    say(pointing(figures))
    return prefixed("entities/", figures)


def _started(
    config: "Config", request: EvaluationOptions, data: "EvalData"
) -> tuple["Objective", "EmbedSettings"]:
    """Start the process group, and load the student and the settings to embed with. Collective."""
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate.embed import EmbedSettings
    from ds_cmli.evaluate.model import load_objective, source_objective

    device = distributed.init()  # collective
    if request.is_run:
        objective = load_objective(config, Path(request.model), request.ema, device)
    else:
        objective = source_objective(config, data, device)
    return objective, EmbedSettings(request.batch_size, device, request.workers)


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
