"""The command-line options that make up a run's configuration, for all commands that need one."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ds_cmli.common.cli import option, say
from ds_cmli.common.errors import UserError
from ds_cmli.config import effects
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.deepspeed_effects import overruled
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.registry import AUTO, IMAGE, LOSSES, TEXT, TRACKERS, BackboneEntry, source_kinds
from ds_cmli.config.schema import Config, parse_losses, parse_settings, with_new_names
from ds_cmli.config.validation import shown


def _described(table: dict[str, BackboneEntry]) -> str:
    kinds = [f"{name}: {entry.models}" for name, entry in table.items()]
    return "; ".join([f"{AUTO}: by the model", *kinds])


# `config/ds_configs` is a folder in a wheel; in a checkout it is a link to the folder at the top.
DEFAULT_JSON = Path(__file__).with_name("ds_configs") / "zero2.json"

WHAT = (
    option("What to train", "--preset", default="demo", show_default=True, help=f"One of: {', '.join(PRESETS)}."),
    option("What to train", "--losses", help=f"Of {', '.join(LOSSES)}; NAME or NAME=WEIGHT, by comma.  [preset]"),
    option("What to train", "--image-backbone", help=f"{_described(IMAGE)}.  [preset]"),
    option("What to train", "--text-backbone", help=f"{_described(TEXT)}.  [preset]"),
    option("What to train", "--init", type=click.Choice(["preset", "random"]), default="preset", show_default=True,
           help="Start from the preset's weights, or from random ones (nothing is downloaded for them)."),
    option("What to train", "--set", "settings", multiple=True, metavar="SECTION.SETTING=VALUE",
           help="Any other setting, as --dry-run prints them; for instance student.layers=4. Repeatable."),
    option("Data", "--data", multiple=True, metavar="WHAT", help=f"'demo', or pairs as {source_kinds('or')} "
           "(see README). Repeat it, each with its share as WHAT::0.7, to mix.  [preset]"),
    option("Data", "--val-data", metavar="WHAT", help="What to evaluate on.  [a part of --data]"),
    option("Data", "--image-root", help=f"Folder of the images that a {source_kinds('or', 'image_root')} names.  "
           "[found beside it]"),
    option("Data", "--csv-separator", help="Between columns.  [found]"),
    option("Data", "--csv-img-key", help=f"Column of the image, in {source_kinds('and', 'image_key')}.  [found]"),
    option("Data", "--csv-caption-key", help=f"Column of the caption, in {source_kinds('and', 'caption_key')}.  [found]"),
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
    option(
        "Output", "--output-dir", help="Where the run is written.  [runs/<preset>-<date and time>]"
    ),
    option("Output", "--log-every", type=int, help="Steps between two logged ones.  [preset]"),
    option(
        "Output",
        "--eval-every",
        type=int,
        help="Steps between evaluations; 0: only at the end.  [preset]",
    ),
    option(
        "Checkpoints",
        "--save-every",
        type=int,
        help="Steps between checkpoints; 0: by time alone.  [preset]",
    ),
    option(
        "Checkpoints",
        "--save-minutes",
        type=float,
        help="Minutes since the last one; 0: by steps alone.  [15]",
    ),
    option("Checkpoints", "--keep", type=int, help="Checkpoints that stay.  [2]"),
)
START = (
    option("Checkpoints", "--resume", default="auto", show_default=True, metavar="auto|never|PATH",
           help="auto: go on with the run that --output-dir holds. PATH: start from another one."),
    option("Checkpoints", "--resume-with-changes", is_flag=True, help="Also where settings differ from the run's."),
    option("Profiling", "--profile", metavar="FIRST:LAST",
           help="Trace these steps with torch.profiler, into profile/."),
    option("Profiling", "--profile-memory", type=int, metavar="STEPS",
           help="Measure the first steps' memory beside the predicted one, into memory.json."),
    option("DeepSpeed", "--dry-run", is_flag=True,
           help="Check everything, print the resolved configuration, and stop."),
    option("DeepSpeed", "--deepspeed", is_flag=True, hidden=True),  # users pass it by habit; the JSON is always read
    option("DeepSpeed", "--local_rank", type=int, hidden=True),  # passed by the launcher; LOCAL_RANK says the same
)  # fmt: skip

PLACES = {
    **{"preset": ("run", "preset"), "losses": ("loss", "weights")},
    **{
        "data": ("data", "source"),
        "val_data": ("data", "val_source"),
        "workers": ("data", "workers"),
    },
    **{"image_root": ("data", "image_root"), "csv_separator": ("data", "separator")},
    **{"csv_img_key": ("data", "image_key"), "csv_caption_key": ("data", "caption_key")},
    **{name: ("student", name) for name in ("image_backbone", "text_backbone")},
    **{name: ("optim", name) for name in ("steps", "epochs", "micro_batch", "lr")},
    **{
        name: ("run", name)
        for name in ("seed", "deterministic", "output_dir", "log_every", "eval_every")
    },
    **{name: ("run", name) for name in ("save_every", "save_minutes", "keep")},
}
RANDOM = (
    ("student", "image_weights"),
    ("student", "text_weights"),
    ("teacher", "weights"),
)  # set by `--init random`


def add(*options: Callable) -> Callable:
    """Decorate a command with options, such as `@add(*WHAT, *OUTPUT)`; `--help` keeps their order."""

    def decorate(function: Callable) -> Callable:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate


def resolve_config(preset: str, settings: tuple[str, ...], options: dict[str, Any]) -> Config:
    """The preset's configuration, overridden by the options that were given. Prints which settings have no effect.

    `options` are the values of `WHAT`, and of `OUTPUT` if the command has it, without `preset`, `settings` and
    `deepspeed_config`.

    Raises:
        UserError: `Config.from_dict` refuses a setting, or a setting is given twice with different values.
    """
    overrides = parse_settings(settings)
    given = {
        name: value
        for name, value in {**options, "preset": preset}.items()
        if name in PLACES and value not in (None, ())
    }
    if isinstance(given.get("data"), tuple):
        given["data"] = list(given["data"]) if len(given["data"]) > 1 else given["data"][0]
    if "losses" in given:
        given["losses"] = parse_losses(given["losses"])
    written = {}
    for name, value in given.items():
        section, key = PLACES[name]
        written[f"{section}.{key}"] = option = "--" + name.replace("_", "-")
        _put(overrides, section, key, value, option)
    # Steps or epochs, if given, replace whichever of the two the preset sets.
    optim = overrides.get("optim", {})
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if optim.get(one) is not None and other not in optim:
            optim[other] = None
            break
    if options["init"] == "random":
        for section, key in RANDOM:
            _put(overrides, section, key, "random", "--init")
        overrides.setdefault("data", {}).setdefault("tokenizer", "builtin")
    config = load_preset(preset, overrides, written)
    say(*effects.without_effect(config, how_given(settings, options)))
    return config


def tell_beside_json(
    config: Config,
    ds_config: DeepSpeedConfig,
    ranks: int,
    settings: tuple[str, ...],
    options: dict[str, Any],
) -> None:
    """Print which settings of the command line the JSON overrules, or makes without effect."""
    by_set = {
        key: (f"--set optim.{key}", value)
        for key, value in parse_settings(settings).get("optim", {}).items()
    }
    by_option = {key: (f"--{key.replace('_', '-')}", options[key]) for key in ("lr", "micro_batch")}
    optim = by_set | {
        key: (option, value) for key, (option, value) in by_option.items() if value is not None
    }
    given = how_given(settings, {**options, "preset": None})
    say(
        *overruled(ds_config, optim),
        *effects.without_effect_in_step(config, ds_config, ranks, given),
    )


def how_given(settings: tuple[str, ...], options: dict[str, Any]) -> dict[str, str]:
    """The settings of the command line and how each was given: `{"data.prefetch": "--set data.prefetch"}`."""
    overrides = with_new_names(parse_settings(settings))
    by_set = (f"{section}.{key}" for section, values in overrides.items() for key in values)
    given = {name: f"--set {name}" for name in by_set}
    for name, (section, key) in PLACES.items():
        if options.get(name) not in (None, ()):
            given[f"{section}.{key}"] = "--" + name.replace("_", "-")
    return given


def _put(
    overrides: dict[str, dict[str, Any]], section: str, key: str, value: Any, option: str
) -> None:
    """Set the value of `option`; raises `UserError` if `--set` has given the setting another value."""
    values = overrides.setdefault(section, {})
    if key in values and values[key] != value:
        raise UserError(
            f"{option} is {shown(value)} and --set {section}.{key} is {shown(values[key])}: give one of them"
        )
    values[key] = value


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` if a tracker's library is not installed. Nothing is imported."""
    for name in names:
        library = TRACKERS[name].library
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f"run.report_to has {name!r}, which is not installed: pip install {library}"
            )


def check_early(config: Config, ds_config: DeepSpeedConfig, resume: str, profiles: Any) -> None:
    """Check what would otherwise be refused only after imports that take seconds. Raises `UserError`.

    `profiles` is a `memory.profiler.Profiles`.
    """
    check_trackers(config.run.report_to)
    if config.run.compile != "off" and profiles.memory is not None:
        raise UserError(
            f"run.compile is {config.run.compile!r} and --profile-memory is {profiles.memory}: what is measured is set "
            "beside the prediction, which is of the blocks as they are: leave out one of the two"
        )
    if config.optim.steps is not None:
        profiles.left(config.optim.steps, 0, lambda line: None)
    if resume == "auto" and not (Path(config.run.output_dir) / "checkpoint").exists():
        ds_config.batch(config.optim.micro_batch, int(os.environ["WORLD_SIZE"]))
