"""The command-line options that make up a run's configuration, for all commands that need one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from ds_cmli.common.cli import option
from ds_cmli.common.errors import UserError
from ds_cmli.config.plugins import plugin_option
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.registry import IMAGE, LOSSES, SOURCES, TEXT, BackboneEntry
from ds_cmli.config.schema import (
    Config,
    RunConfig,
    Sections,
    parse_losses,
    parse_settings,
)
from ds_cmli.config.validation import shown

Decorator = Callable[[Callable], Callable]
OptionValues = dict[str, Any]  # the values that click gives a command


# `config/ds_configs` is a folder in a wheel; in a checkout it is a link to the folder at the top.
DEFAULT_JSON = Path(__file__).with_name("ds_configs") / "zero2.json"

# The options of a single setting: its section and name.
PLACES: dict[str, tuple[str, str]] = {}
# The settings that `--init random` sets.
RANDOM = (("student", "image_weights"), ("student", "text_weights"), ("teacher", "weights"))


def _setting(group: str, name: str, place: str, help: str, **more: Any) -> Decorator:
    """Declare an option of the setting `place`, such as "optim.lr", of the type of its default."""
    section, _, key = place.partition(".")
    PLACES[name.removeprefix("--").replace("-", "_")] = (section, key)
    default = getattr(getattr(Config(), section), key)
    if isinstance(default, bool):
        more |= {"is_flag": True, "default": None}
    elif isinstance(default, int | float):
        more["type"] = type(default)
    return option(group, name, help=help, **more)


def _described(table: dict[str, BackboneEntry]) -> str:
    kinds = [f"{name}: {entry.models}" for name, entry in table.items()]
    return "; ".join(kinds) + ".  [preset]"


_what = partial(_setting, "What to train")
_data = partial(_setting, "Data")
_length = partial(_setting, "Length and batch")
_output = partial(_setting, "Output")
_checkpoints = partial(_setting, "Checkpoints")
WHAT = (
    _what(
        "--preset",
        "run.preset",
        f"{', '.join(PRESETS)}.  [{RunConfig.preset}; with --start-from finetune]",
    ),
    _what(
        "--losses",
        "loss.weights",
        f"NAME or NAME=WEIGHT, by comma, of {', '.join(LOSSES)}.  [preset]",
    ),
    _what(
        "--start-from",
        "student.source",
        "Start from a CLIP or SigLIP model of transformers or a model of open_clip (a folder, or a "
        "name of the hub), or from a run or an export, with its joint space (docs/finetune.md).",
        metavar="MODEL",
    ),
    _what("--image-backbone", "student.image_backbone", _described(IMAGE)),
    _what("--text-backbone", "student.text_backbone", _described(TEXT)),
    plugin_option,
    option(
        "What to train",
        "--init",
        type=click.Choice(["preset", "random"]),
        default="preset",
        show_default=True,
        help="Start from the preset's weights, or from random ones (nothing is downloaded for "
        "them).",
    ),
    option(
        "What to train",
        "--set",
        "settings",
        multiple=True,
        metavar="SECTION.SETTING=VALUE",
        help="Any setting of docs/settings.md, for instance student.layers=4. Repeatable.",
    ),
    _data(
        "--data",
        "data.source",
        f"'demo', or pairs as {', '.join(entry.short for entry in SOURCES.values())}, also by "
        "hf://datasets/OWNER/NAME (docs/train.md). Repeat it to mix, each with a share as "
        "WHAT::0.7.  [preset]",
        multiple=True,
        metavar="WHAT",
    ),
    _data(
        "--val-data", "data.val_source", "Data to evaluate on.  [a part of --data]", metavar="WHAT"
    ),
    _data(
        "--image-root",
        "data.image_root",
        "Folder of the images that a table or JSON names.  [the list's]",
    ),
    _data("--csv-separator", "data.separator", "Separator of columns.  [detected]"),
    _data(
        "--csv-img-key",
        "data.image_key",
        "Column of the image, in a table and parquet.  [detected]",
    ),
    _data(
        "--csv-caption-key",
        "data.caption_key",
        "Column of the caption, in a table and parquet.  [detected]",
    ),
    _data("--workers", "data.workers", "Data loading processes per rank.  [preset]"),
    _length("--steps", "optim.steps", "Number of optimizer steps.  [preset]"),
    _length("--epochs", "optim.epochs", "Epochs, instead of --steps.  [preset]", type=float),
    _length(
        "--micro-batch",
        "optim.micro_batch",
        'Pairs per rank, where the JSON says "auto".  [preset]',
    ),
    _length("--lr", "optim.lr", 'Learning rate, where the JSON says "auto".  [preset]'),
    _length("--seed", "run.seed", "Seed of weights, data order and scenes.  [0]"),
    _length(
        "--deterministic",
        "run.deterministic",
        "Reproduce every bit on the same kind of device; slower on a GPU.",
    ),
    option(
        "DeepSpeed",
        "--deepspeed_config",
        default=str(DEFAULT_JSON),
        help="DeepSpeed's JSON.  [ds_configs/zero2.json]",
    ),
)
OUTPUT = (
    _output(
        "--output-dir", "run.output_dir", "Folder of the run.  [runs/<preset>-<date and time>]"
    ),
    _output("--log-every", "run.log_every", "Log every so many steps.  [preset]"),
    _output(
        "--eval-every", "run.eval_every", "Steps between evaluations; 0: only at the end.  [preset]"
    ),
    _checkpoints(
        "--save-every", "run.save_every", "Steps between checkpoints; 0: by time alone.  [preset]"
    ),
    _checkpoints(
        "--save-minutes",
        "run.save_minutes",
        "Minutes between checkpoints; 0: by steps alone.  [15]",
    ),
    _checkpoints("--keep", "run.keep", "Number of newest checkpoints to keep.  [2]"),
)
START = (
    option(
        "Checkpoints",
        "--resume",
        default="auto",
        show_default=True,
        metavar="auto|never|PATH",
        help="auto: resume the run in --output-dir. never: a new run. PATH: resume another run.",
    ),
    option(
        "Checkpoints",
        "--resume-with-changes",
        is_flag=True,
        help="Resume even if settings differ from the run's.",
    ),
    option(
        "Profiling",
        "--profile",
        metavar="FIRST:LAST",
        help="Trace these steps with torch.profiler, into profile/.",
    ),
    option(
        "Profiling",
        "--profile-memory",
        type=int,
        metavar="STEPS",
        help="Measure the memory of the first steps, and predict it, into memory.json.",
    ),
    option(
        "DeepSpeed",
        "--dry-run",
        is_flag=True,
        help="Print the resolved configuration, and stop.",
    ),
    # Users pass it by habit; the JSON is always read.
    option("DeepSpeed", "--deepspeed", is_flag=True, hidden=True),
    # Launchers pass it; LOCAL_RANK says the same.
    option("DeepSpeed", "--local_rank", type=int, hidden=True),
)


def add(*options: Decorator) -> Decorator:
    """Decorate a command with options, as `@add(*WHAT, *OUTPUT)`; `--help` keeps their order."""

    def decorate(function: Callable) -> Callable:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate


def resolve_config(settings: tuple[str, ...], options: OptionValues) -> Config:
    """The preset's configuration, overridden by the options that were given.

    `options` are the values of `WHAT`, and of `OUTPUT` if the command has it, without `settings`
    and `deepspeed_config`.

    Raises:
        UserError: `Config.from_dict` refuses a setting, or one is given twice with other values.
    """
    overrides = parse_settings(settings)
    written: dict[str, str] = {}
    for name, value in options.items():
        if name not in PLACES or value in (None, ()):
            continue
        if name == "losses":
            value = parse_losses(value)
        elif isinstance(value, tuple):  # of --data
            value = list(value) if len(value) > 1 else value[0]
        section, key = PLACES[name]
        written[f"{section}.{key}"] = flag = "--" + name.replace("_", "-")
        _put(overrides, section, key, value, flag)
    if options["init"] == "random":
        for section, key in RANDOM:
            _put(overrides, section, key, "random", "--init")
        overrides.setdefault("data", {}).setdefault("tokenizer", "builtin")
    return load_preset(None, overrides, written)


def _put(overrides: Sections, section: str, key: str, value: object, flag: str) -> None:
    """Set the value of an option; raises `UserError` if `--set` gives another one."""
    values = overrides.setdefault(section, {})
    if key in values and values[key] != value:
        other = f"--set {section}.{key} is {shown(values[key])}"
        raise UserError(f"{flag} is {shown(value)} and {other}: give one of them")
    values[key] = value
