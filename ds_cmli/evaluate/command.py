"""The command `python -m ds_cmli.evaluate`: a trained student on a held-out split.

It also runs on several ranks: `torchrun --nproc_per_node 2 -m ds_cmli.evaluate ...`.
"""

import json
from pathlib import Path
from typing import Any

import click

from ds_cmli.common.cli import GroupedCommand, check_writable, option, run_command, say
from ds_cmli.common.errors import UserError

SPLITS = ("val", "test", "all")
SHOWN = {"source": "data"}  # options whose name in the code is another


@click.command(cls=GroupedCommand)
@option("What", "--checkpoint", required=True, help="A run's output folder.")
@option(
    "What",
    "--ema",
    is_flag=True,
    help="Of the averaged weights (optim.ema_decay), in place of the last ones.",
)
@option("What", "--batch-size", default=50, show_default=True, help="Pictures or captions a step.")
@option("What", "--workers", default=0, show_default=True, help="Data loading processes per rank.")
@option("What", "--json", "json_file", help="Write the metrics to this file too.")
@option(
    "Retrieval",
    "--data",
    "source",
    help="As in training: 'demo', a folder, tars, COCO's JSON, ...  [the run's own]",
)
@option(
    "Retrieval",
    "--image-root",
    help="Folder of the images that a list names, and those of --boxes.",
)
@option(
    "Retrieval",
    "--split",
    type=click.Choice(SPLITS),
    help="Of --data and --boxes: what training holds out, the test part (Karpathy's), or all there is.  [the run's]",
)
@option(
    "Retrieval",
    "--fold-size",
    type=int,
    metavar="PICTURES",
    help="Retrieval within folds of so many pictures too, averaged over them: 1000 for COCO 1k.",
)
@option(
    "Zero-shot classification",
    "--zero-shot",
    metavar="FOLDER",
    help="Instead: classify the pictures in a folder of class folders, a .tar of such, or hfds/NAME.",
)
@option(
    "Zero-shot classification",
    "--class-names",
    metavar="FILE",
    help="A name a line in the order of the folders', or JSON {folder: name}.  [the folders' names]",
)
@option(
    "Zero-shot classification",
    "--templates",
    metavar="FILE",
    help="A prompt a line with {} for the name.  [seven of CLIP's]",
)
@option(
    "Pointing game",
    "--boxes",
    metavar="FOLDER",
    help="Instead: pointing-game accuracy on Flickr30k Entities, a folder with Annotations/ and Sentences/.",
)
def command(
    checkpoint: str, ema: bool, batch_size: int, workers: int, json_file: str | None, **options: Any
) -> None:  # fmt: skip
    """Evaluate a trained student as papers report it: retrieval on held-out pairs, pointing-game accuracy on scenes.

    With --zero-shot it classifies pictures, with --boxes it plays the pointing game on photographs.
    """
    import dataclasses

    from ds_cmli.config.schema import load_config

    if json_file:
        check_writable(json_file)
    fold_size = options["fold_size"]
    for name, value, least in (
        ("batch-size", batch_size, 1),
        ("workers", workers, 0),
        ("fold-size", fold_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: give at least {least}")
    for name in ("source", "image_root", "zero_shot", "class_names", "templates", "boxes"):
        if options[name] == "":
            raise UserError(
                f"--{SHOWN.get(name, name).replace('_', '-')} is empty: give a value, or leave it out"
            )
    _check_together(options)
    config = load_config(Path(checkpoint) / "config.json", "--checkpoint")
    given = {
        name: options[name]
        for name in ("source", "image_root")
        if options[name] and not options["boxes"]
    }
    if "source" in given and given["source"] != config.data.source:
        # The run's settings of its own data do not apply to other data.
        given = {
            "val_source": "",
            "image_root": "",
            "image_key": "",
            "caption_key": "",
            "separator": "",
        } | given
    if not options["boxes"] and not options["zero_shot"]:
        config.data = dataclasses.replace(config.data, **given)

    from ds_cmli.distributed import launchers
    from ds_cmli.distributed import process_group as distributed

    launchers.map_launcher_environment()
    mode = _zero_shot if options["zero_shot"] else _boxes if options["boxes"] else _retrieval
    try:
        metrics = mode(config, Path(checkpoint), ema, batch_size, workers, options)
        if json_file and distributed.is_main():
            Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")
    finally:
        distributed.shutdown()


def _check_together(options: dict[str, Any]) -> None:
    """Raise `UserError` for an option that the mode does not read, or for a missing option that it needs."""
    modes = {"zero_shot": {"class_names", "templates"}, "boxes": {"image_root", "split"}}
    mode = next((name for name in modes if options[name]), None)
    reads = modes[mode] if mode else {"source", "image_root", "split", "fold_size"}
    for name, value in options.items():
        if value is not None and name != mode and name not in reads:
            what = f"beside --{mode.replace('_', '-')}" if mode else "without --zero-shot"
            raise UserError(
                f"--{SHOWN.get(name, name).replace('_', '-')} has no effect {what}: leave it out"
            )
    if mode == "boxes" and not options["image_root"]:
        raise UserError("--boxes needs --image-root: give the folder of the pictures")


def _retrieval(
    config: Any, folder: Path, ema: bool, batch_size: int, workers: int, options: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    from ds_cmli.data.load import build_eval_data
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate.report import summary
    from ds_cmli.evaluate.split import evaluate_split

    data = build_eval_data(config.data, config.run.seed, options["split"])
    say(*data.summary, *data.notices)
    device = distributed.init()  # collective
    objective = load_objective(config, folder, ema, data, device)
    metrics: dict[str, Any] = {}
    for split, dataset in data.evals.items():
        found = evaluate_split(
            objective, dataset, data, batch_size, device, workers, fold_size=options["fold_size"]
        )  # collective
        metrics |= {f"eval/{split}/{name}": value for name, value in found.items()}
        say(summary(split, found))
    return metrics


def _zero_shot(
    config: Any, folder: Path, ema: bool, batch_size: int, workers: int, options: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    from ds_cmli.data.load import EvalData
    from ds_cmli.data.loaders import batches
    from ds_cmli.data.tokens import load_tokenizer
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate import zero_shot
    from ds_cmli.evaluate.held_out import FILLER, collate_pictures
    from ds_cmli.evaluate.report import classification
    from ds_cmli.evaluate.zero_shot import ClassPictures, class_names, prompt_templates

    templates = prompt_templates(options["templates"])
    pictures = ClassPictures(options["zero_shot"], config.data.image_size, config.data.max_pixels)
    names = class_names(pictures.folders, options["class_names"])
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    data = EvalData(tokenizer=tokenizer)
    device = distributed.init()  # collective
    objective = load_objective(config, folder, ema, data, device).eval()
    classifier = zero_shot.build_classifier(
        objective, data, names, templates, batch_size, device
    )  # collective
    rank, ranks = distributed.rank(), distributed.world_size()
    own = list(range(rank, len(pictures), ranks))
    own += [FILLER] * (-(-len(pictures) // ranks) - len(own))
    loader = batches(pictures.pictures(own), batch_size, workers, collate_pictures)
    found = zero_shot.classify(objective.student, loader, classifier, device)  # collective
    say(classification(found))
    return {f"zero_shot/{name}": value for name, value in found.items()}


def _boxes(
    config: Any, folder: Path, ema: bool, batch_size: int, workers: int, options: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    from ds_cmli.data.load import EvalData
    from ds_cmli.data.tokens import load_tokenizer
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate.entities import Entities, pointing_game
    from ds_cmli.evaluate.report import pointing

    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    entities = Entities(
        options["boxes"], options["image_root"], options["split"] or "val", tokenizer,
        config.data.image_size, config.data.max_pixels,
    )  # fmt: skip
    data = EvalData(tokenizer=tokenizer)
    device = distributed.init()  # collective
    objective = load_objective(config, folder, ema, data, device).eval()
    found = pointing_game(
        objective.student, entities, data, batch_size, device, workers
    )  # collective
    say(pointing(found))
    return {f"entities/{name}": value for name, value in found.items()}


def load_objective(config: Any, folder: Path, ema: bool, data: Any, device: Any) -> Any:
    """Load the trained student with the temperatures of its scores, or with `ema` its averaged weights.

    No teacher is built, because evaluation does not need it. Raises `UserError`.
    """
    from ds_cmli.checkpoint.weights import AVERAGE, WEIGHTS, load_student

    objective = load_student(folder, config, data, AVERAGE if ema else WEIGHTS)
    config.loss = objective.config
    return objective.to(device)


def main() -> None:
    run_command(command)
