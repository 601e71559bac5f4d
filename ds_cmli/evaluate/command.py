"""The command `python -m ds_cmli.evaluate`: a trained student on a held-out split.

It also runs on several ranks: `torchrun --nproc_per_node 2 -m ds_cmli.evaluate ...`.
"""

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--checkpoint", required=True, help="A run's output folder.")
@click.option("--data", "source", default=None, help="As of training: its validation part.  [default: the run's own]")
@click.option(
    "--fold-size",
    type=int,
    default=None,
    metavar="PICTURES",
    help="Retrieval within folds of so many pictures too, averaged over them: 1000 for COCO 1k.",
)
@click.option("--batch-size", default=50, show_default=True, help="Pairs a step.")
@click.option("--workers", default=0, show_default=True, help="Data loading processes per rank.")
@click.option("--json", "json_file", default=None, help="Write the metrics to this file too.")
def command(checkpoint: str, source: str | None, fold_size: int | None, batch_size: int, workers: int,
            json_file: str | None) -> None:  # fmt: skip
    """Evaluate a trained student: retrieval on held-out pairs, and pointing-game accuracy on scenes."""
    import dataclasses

    from ds_cmli.common.cli import check_writable
    from ds_cmli.common.errors import UserError
    from ds_cmli.config.schema import load_config

    if json_file:
        check_writable(json_file)
    for name, value, least in (
        ("--batch-size", batch_size, 1),
        ("--workers", workers, 0),
        ("--fold-size", fold_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}: give at least {least}")
    config = load_config(Path(checkpoint) / "config.json", "--checkpoint")
    if source:
        of_the_run: dict[str, Any] = dict.fromkeys(
            ("val_source", "image_root", "image_key", "caption_key", "separator"), ""
        )
        config.data = dataclasses.replace(config.data, source=source, **of_the_run)

    from ds_cmli.data import build_data
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate.report import summary
    from ds_cmli.evaluate.split import evaluate_split

    data = build_data(config.data, config.run.seed)
    if not data.evals:
        raise UserError(f"--data is {config.data.source!r}: it has no held-out split")
    device = distributed.init()  # collective
    objective = load_objective(config, Path(checkpoint), data, device)
    metrics: dict[str, Any] = {}
    for line in data.notices:
        tell(line)
    for split, dataset in data.evals.items():
        found = evaluate_split(objective, dataset, data, batch_size, device, workers, fold_size=fold_size)  # collective
        metrics |= {f"eval/{split}/{name}": value for name, value in found.items()}
        tell(summary(split, found))
    if json_file and distributed.is_main():
        Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")
    distributed.shutdown()


def tell(line: str) -> None:
    """On rank 0 alone."""
    from ds_cmli.distributed import process_group as distributed

    if distributed.is_main():
        click.echo(line)


def load_objective(config: Any, folder: Path, data: Any, device: Any) -> Any:
    """The trained student with the temperatures of its scores; no teacher is built, as nothing here needs one."""
    import dataclasses

    from ds_cmli.checkpoint.weights import load_weights
    from ds_cmli.engine import build_models
    from ds_cmli.losses import LOSSES

    weights = {name: weight for name, weight in config.loss.weights.items() if not LOSSES[name].teacher}
    config.loss = dataclasses.replace(config.loss, weights=weights or {"global": 1.0})
    objective, _ = build_models(config, data.vocab_size, pretrained=False, special=data.special)
    load_weights(folder, objective)
    return objective.to(device)


def main() -> None:
    from ds_cmli.common.cli import run_command

    run_command(command)
