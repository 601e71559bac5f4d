"""`python -m ds_cmli.evaluate`: a trained student on held-out data, on one rank or on several."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ds_cmli.commands import print_line, run_command
from ds_cmli.config.registry import plugin_option
from ds_cmli.config.schema import Config
from ds_cmli.config.source import ModelSource
from ds_cmli.distributed import map_launcher_environment
from ds_cmli.errors import UserError
from ds_cmli.files import check_writable

option = partial(click.option, show_default=True)
PRECISIONS = click.Choice(("fp32", "bf16", "fp16"))
PARTS = click.Choice(("val", "test", "all"))
TASKS = ("zero_shot", "boxes", "choices")  # options that replace retrieval


@click.command()
@click.argument("model", required=False, metavar="[MODEL]")
@plugin_option
@option("--checkpoint", help="A run's output folder, as MODEL.")
@option("--ema", is_flag=True, help="Use the averaged weights (optim.ema_decay).")
@option("--precision", type=PRECISIONS, help="Of the model.  [a run's: of its training; else fp32]")
@option("--batch-size", type=click.IntRange(1), default=50, help="Pictures or captions per batch.")
@option("--workers", type=click.IntRange(0), default=0, help="Data loading processes per rank.")
@option("--json", "json_file", help="Write the metrics to this file too.")
@option("--data", help="Retrieval on data as in training: 'demo', a folder, ...  [the run's own]")
@option("--image-root", help="Folder of the images that a list, --boxes or --choices names.")
@option("--split", type=PARTS, help="Of --data or --boxes; val: what training holds out.")
@option("--zero-shot", metavar="FOLDER", help="Classify the pictures of a folder of class folders.")
@option("--class-names", metavar="FILE", help="A line for each class folder.  [the folders' names]")
@option("--templates", metavar="FILE", help="Prompts with {}, by line.  [seven of CLIP's]")
@option("--boxes", metavar="FOLDER", help="The pointing game on Flickr30k Entities.")
@option("--choices", help='Lines of {"image": FILE, "captions": [RIGHT, WRONG, ...]}.')
def command(
    model: str | None, checkpoint: str | None, json_file: str | None, **options: Any
) -> None:
    """Measure retrieval on held-out pairs, or what --zero-shot, --boxes or --choices ask for.

    MODEL is a run's output folder, one of its files of weights, or what training may start from: an
    export, a CLIP or SigLIP of transformers, or a model of open_clip, by folder or name on the hub.
    """
    name = model or checkpoint
    if not name or (model and checkpoint):
        raise UserError(f"MODEL or --checkpoint: {'2 are' if name else 'none is'} given: give one")
    task = next((task for task in TASKS if options[task]), "data")
    if json_file:
        check_writable(json_file)
    source = ModelSource(name)
    if not source.is_run and (options["ema"] or not options[task]):
        raise UserError(f"{name!r} is no run's folder: of another model, give --data and no --ema")
    map_launcher_environment()
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate.embed import load_evaluator

    loading = {name: options[name] for name in ("precision", "ema", "batch_size", "workers")}
    try:
        device = distributed.init()  # collective
        config, evaluator = load_evaluator(source, device, **loading)
        metrics = _measure(config, evaluator, task, options)  # collective
        if json_file and distributed.is_main():
            Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")
    finally:
        distributed.shutdown()


def _measure(config: Config, evaluator: Any, task: str, options: dict[str, Any]) -> dict[str, Any]:
    """Measure and print. Collective."""
    from ds_cmli.evaluate import choices, pointing_game, zero_shot
    from ds_cmli.evaluate.embed import embed
    from ds_cmli.evaluate.summary import prefixed, summary

    if task == "data":
        return _measure_retrieval(config, evaluator, options)
    file = options[task]
    image_root = options["image_root"]
    prefix = task
    if task == "zero_shot":
        names_file = options["class_names"]
        pictures = zero_shot.ClassPictures(file, config.data, names_file, options["templates"])
        metrics = zero_shot.classify(evaluator, pictures)  # collective
    elif task == "choices":
        lines = choices.Choices(file, image_root, config.data)
        metrics = choices.choose(evaluator, lines)  # collective
    else:
        prefix = "entities"
        entities = pointing_game.Entities(
            file, image_root or file, options["split"] or "val", evaluator.tokenizer, config.data
        )
        embedded = embed(evaluator, entities)  # collective
        metrics = embedded.counts | pointing_game.pointing_game(  # collective
            embedded, pointing_game.entity_regions, evaluator.student.grid
        )
    print_line(summary(metrics, evaluator.precision))
    return prefixed(f"{prefix}/", metrics)


def _measure_retrieval(config: Config, evaluator: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Measure each split of the data and print its table. Collective."""
    from ds_cmli.data.build import build_eval_data
    from ds_cmli.data.held_out import evaluation_data
    from ds_cmli.evaluate.retrieval import evaluate_split
    from ds_cmli.evaluate.summary import prefixed, summary

    data = config.data
    part = options["split"]
    if options["data"]:
        data = evaluation_data(data, options["data"])
        if part:  # it names a part of the data, or the share that training would hold out
            data = replace(data, val_source="")
    data = replace(data, image_root=options["image_root"] or data.image_root)
    evals, lines = build_eval_data(data, config.run.seed, part)
    print_line(*lines)
    metrics: dict[str, Any] = {}
    for name, pairs in evals.items():
        split_metrics, _ = evaluate_split(evaluator, pairs)  # collective
        print_line(summary(split_metrics, evaluator.precision, name))
        metrics |= prefixed(f"eval/{name}/", split_metrics)
    return metrics


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
