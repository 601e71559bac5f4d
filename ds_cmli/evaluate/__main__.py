"""`python -m ds_cmli.evaluate`: a trained student on held-out data, on one rank or on several."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ds_cmli.common import UserError, check_writable, run_command, say
from ds_cmli.config.registry import plugin_option
from ds_cmli.config.schema import Config
from ds_cmli.config.source import Source
from ds_cmli.distributed import map_launcher_environment

option = partial(click.option, show_default=True)
# The options that each evaluation reads, by the option that selects it.
READS = {
    "zero_shot": {"zero_shot", "class_names", "templates"},
    "boxes": {"boxes", "image_root", "split"},
    "choices": {"choices", "image_root"},
    "data": {"data", "image_root", "split"},
}
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
    mode = next((mode for mode in READS if given[mode] is not None), "data")
    for name in {name for reads in READS.values() for name in reads} - READS[mode]:
        if given[name] is not None:
            raise UserError(f"--{name} has no effect with --{mode}: leave it out".replace("_", "-"))
    if json_file:
        check_writable(json_file)
    source = Source(place)
    is_run = checkpoint is not None or source.has_own_data
    if not is_run and (given["ema"] or not given[mode]):
        own = "which has averages and data of its own: give --data, and leave out --ema"
        raise UserError(f"{place!r} is no run, {own}")
    map_launcher_environment()
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate.embed import load

    try:
        device = distributed.init()  # collective
        how = {name: given[name] for name in ("ema", "precision", "batch_size", "workers")}
        metrics = _measure(*load(source, is_run, device, **how), mode, given)  # collective
        if json_file and distributed.is_main():
            Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")
    finally:
        distributed.shutdown()


def _measure(config: Config, model: Any, mode: str, given: dict[str, Any]) -> dict[str, Any]:
    """Measure and print. Collective."""
    from ds_cmli.data.build import build_eval_data, evaluation_data
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
        say(*lines)
        metrics: dict[str, Any] = {}
        for name, pairs in evals.items():
            figures, _ = evaluate_split(model, pairs)  # collective
            say(summary(figures, model.precision, name))
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
    say(summary(figures, model.precision))
    return prefixed({"boxes": "entities"}.get(mode, mode) + "/", figures)


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
