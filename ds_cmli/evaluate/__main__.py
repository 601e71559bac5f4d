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
PRECISIONS, SPLITS = click.Choice(("fp32", "bf16", "fp16")), click.Choice(("val", "test", "all"))


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
@option("--split", type=SPLITS, help="Of --data or --boxes; val: what training holds out.")
@option("--zero-shot", metavar="FOLDER", help="Classify the pictures of a folder of class folders.")
@option("--class-names", metavar="FILE", help="A line for each class folder.  [the folders' names]")
@option("--templates", metavar="FILE", help="Prompts with {}, by line.  [seven of CLIP's]")
@option("--boxes", metavar="FOLDER", help="The pointing game on Flickr30k Entities.")
@option("--choices", help='Lines of {"image": FILE, "captions": [RIGHT, WRONG, ...]}.')
def command(model: str | None, checkpoint: str | None, json_file: str | None, **given: Any) -> None:
    """Measure retrieval on held-out pairs, or what --zero-shot, --boxes or --choices ask for.

    MODEL is a run's output folder, one of its files of weights, or what training may start from: an
    export, a CLIP or SigLIP of transformers, or a model of open_clip, by folder or name on the hub.
    """
    place = model or checkpoint
    if not place or (model and checkpoint):
        raise UserError(f"MODEL or --checkpoint: {'2 are' if place else 'none is'} given: give one")
    mode = next((mode for mode in ("zero_shot", "boxes", "choices") if given[mode]), "data")
    if json_file:
        check_writable(json_file)
    source = ModelSource(place)
    if not source.has_own_data and (given["ema"] or not given[mode]):
        raise UserError(f"{place!r} is no run's folder: of another model, give --data and no --ema")
    map_launcher_environment()
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate.embed import load

    how = {name: given[name] for name in ("precision", "ema", "batch_size", "workers")}
    try:
        config, evaluator = load(source, distributed.init(), **how)  # collective
        metrics = _measure(config, evaluator, mode, given)  # collective
        if json_file and distributed.is_main():
            Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")
    finally:
        distributed.shutdown()


def _measure(config: Config, model: Any, mode: str, given: dict[str, Any]) -> dict[str, Any]:
    """Measure and print. Collective."""
    from ds_cmli.data.build import build_eval_data
    from ds_cmli.data.held_out import evaluation_data
    from ds_cmli.evaluate import pointing_game, zero_shot
    from ds_cmli.evaluate.embed import embed
    from ds_cmli.evaluate.metrics import prefixed, summary
    from ds_cmli.evaluate.retrieval import evaluate_split

    source, root, split, data = given[mode], given["image_root"], given["split"], config.data
    if mode == "data":
        if source:
            data = evaluation_data(data, source)
            # A split names a part, or the share that training would hold out.
            data = replace(data, val_source="") if split else data
        data = replace(data, image_root=root or data.image_root)
        evals, lines = build_eval_data(data, config.run.seed, split)
        print_line(*lines)
        metrics: dict[str, Any] = {}
        for name, pairs in evals.items():
            figures, _ = evaluate_split(model, pairs)  # collective
            print_line(summary(figures, model.precision, name))
            metrics |= prefixed(f"eval/{name}/", figures)
        return metrics
    if mode == "zero_shot":
        classes = zero_shot.ClassPictures(source, given["class_names"], given["templates"], data)
        figures = zero_shot.classify(model, classes)  # collective
    elif mode == "choices":
        figures = zero_shot.choose(model, zero_shot.Choices(source, root, data))  # collective
    else:
        place = root or source, split or "val"
        phrases = pointing_game.Entities(source, *place, model.tokenizer, data)
        own, boxes = embed(model, phrases), pointing_game.boxes  # collective
        figures = own.counts | pointing_game.pointing_game(own, boxes, model.student.grid)
    print_line(summary(figures, model.precision))
    return prefixed({"boxes": "entities"}.get(mode, mode) + "/", figures)


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
