"""The command-line options that make up a run's configuration, for whatever command needs one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ds_cmli.common.cli import option
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.schema import LOSSES, Config, parse_losses, parse_settings

DEFAULT_JSON = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2.json"

WHAT = (
    option("What to train", "--preset", default="demo", show_default=True, help=f"One of: {', '.join(PRESETS)}."),
    option("What to train", "--losses", help=f"Of {', '.join(LOSSES)}; NAME or NAME=WEIGHT, by comma.  [preset]"),
    option("What to train", "--init", type=click.Choice(["preset", "random"]), default="preset", show_default=True,
           help="Start from the preset's weights, or from random ones (nothing is downloaded for them)."),
    option("What to train", "--set", "settings", multiple=True, metavar="SECTION.SETTING=VALUE",
           help="Any other setting, as --dry-run prints them; for instance student.layers=4. Repeatable."),
    option("Data", "--data", help="'demo', or a folder of images with metadata.jsonl or metadata.csv.  [preset]"),
    option("Data", "--workers", type=int, help="Data loading processes per rank.  [preset]"),
    option("Length and batch", "--steps", type=int, help="Optimizer steps.  [preset]"),
    option("Length and batch", "--epochs", type=float, help="Instead of --steps.  [preset]"),
    option("Length and batch", "--micro-batch", type=int, help='Pairs per rank, where the JSON says "auto".  [preset]'),
    option("Length and batch", "--lr", type=float, help='Learning rate, where the JSON says "auto".  [preset]'),
    option("Length and batch", "--seed", type=int, help="Of weights, data order and scenes.  [0]"),
    option("Length and batch", "--deterministic", is_flag=True, default=None,
           help="The same bits again on the same kind of device, for some of its speed."),
    option("DeepSpeed", "--deepspeed_config", default=str(DEFAULT_JSON), help="The JSON.  [ds_configs/zero2.json]"),
)  # fmt: skip
OUTPUT = (
    option("Output", "--output-dir", help="Where the run is written.  [runs/<preset>-<date and time>]"),
    option("Output", "--log-every", type=int, help="Steps between two logged ones.  [preset]"),
    option("Output", "--eval-every", type=int, help="Steps between evaluations; 0: only at the end.  [preset]"),
    option("Checkpoints", "--save-every", type=int, help="Steps between checkpoints; 0: by time alone.  [preset]"),
    option("Checkpoints", "--save-minutes", type=float, help="Minutes since the last one; 0: by steps alone.  [15]"),
    option("Checkpoints", "--keep", type=int, help="Checkpoints that stay.  [2]"),
)

PLACES = {
    **{"data": ("data", "source"), "workers": ("data", "workers")},
    **{name: ("optim", name) for name in ("steps", "epochs", "micro_batch", "lr")},
    **{name: ("run", name) for name in ("seed", "deterministic", "output_dir", "log_every", "eval_every")},
    **{name: ("run", name) for name in ("save_every", "save_minutes", "keep")},
}


def add(*options: Callable) -> Callable:
    """Decorate a command with `WHAT`, `OUTPUT` or both: `@add(*WHAT)`; `--help` keeps their order."""

    def decorate(function: Callable) -> Callable:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate


def resolve_config(preset: str, settings: tuple[str, ...], options: dict[str, Any]) -> Config:
    """The preset with the command line on top; only what was given overrides.

    `options`: the values of `WHAT`, and of `OUTPUT` where the command has it, but for `preset`, `settings` and
    `deepspeed_config`.
    """
    overrides = parse_settings(settings)
    for name, (section, key) in PLACES.items():
        if options.get(name) is not None:
            overrides.setdefault(section, {})[key] = options[name]
    # One of the two replaces whichever the preset names.
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if options[given] is not None and options[other] is None:
            overrides["optim"][other] = None
    if options["losses"] is not None:
        overrides.setdefault("loss", {})["weights"] = parse_losses(options["losses"])
    if options["init"] == "random":
        overrides.setdefault("student", {}).update(image_weights="random", text_weights="random")
        overrides.setdefault("teacher", {})["weights"] = "random"
        overrides.setdefault("data", {}).setdefault("tokenizer", "builtin")
    return load_preset(preset, overrides)
