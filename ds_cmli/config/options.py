"""The command-line options that make up a run's configuration, for all commands that need one.

An option of a setting is that setting by name: of it and of `--set`, the last one given counts.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from ds_cmli.common import GroupedCommand, UserError, option
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.registry import IMAGE, LOSSES, SOURCES, TEXT, plugin_option
from ds_cmli.config.schema import SECTIONS, Config, RunConfig, parse_losses, parse_settings

Decorator = Callable[[Callable], Callable]

# `config/ds_configs` is a folder in a wheel; in a checkout it is a link to the folder at the top.
DEFAULT_JSON = Path(__file__).with_name("ds_configs") / "zero2.json"

PLACES: dict[str, str] = {}  # the options of a single setting, and that setting: "lr": "optim.lr"
# The settings that `--init random` sets, unless they are given.
RANDOM = {
    "student": {"image_weights": "random", "text_weights": "random"},
    "teacher": {"weights": "random"},
    "data": {"tokenizer": "builtin"},
}


def number(text: str) -> object:
    """What is no number stays a text, which the setting refuses."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _setting(group: str, name: str, help: str, place: str = "", **more: Any) -> Decorator:
    """Declare an option of the setting `place`, or of its own name, of the default's type."""
    key = name.removeprefix("--").replace("-", "_")
    if not place:
        (place,) = (f"{of}.{key}" for of, kind in SECTIONS.items() if hasattr(kind(), key))
    PLACES[key] = place
    section, _, key = place.partition(".")
    default = getattr(SECTIONS[section](), key)
    if isinstance(default, bool):
        more |= {"is_flag": True, "default": None}
    elif isinstance(default, int | float):
        more["type"] = number
    return option(group, name, help=help, **more)


_what = partial(_setting, "What to train")
_data = partial(_setting, "Data")
_length = partial(_setting, "Length and batch")
_output = partial(_setting, "Output")
_checkpoints = partial(_setting, "Checkpoints")
WHAT = (
    _what("--preset", f"{', '.join(PRESETS)}.  [{RunConfig.preset}; with --start-from finetune]"),
    _what(
        "--losses",
        f"NAME or NAME=WEIGHT, by comma, of {', '.join(LOSSES)}.  [preset]",
        "loss.weights",
    ),
    _what(
        "--start-from",
        "Start from a CLIP or SigLIP model of transformers or a model of open_clip (a folder, or a "
        "name of the hub), or from a run or an export, with its joint space (docs/finetune.md).",
        "student.source",
        metavar="MODEL",
    ),
    _what("--image-backbone", f"Of {', '.join(IMAGE)}.  [preset]"),
    _what("--text-backbone", f"Of {', '.join(TEXT)}.  [preset]"),
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
        f"'demo', or pairs as {', '.join(entry.short for entry in SOURCES.values())}, also by "
        "hf://datasets/OWNER/NAME (docs/train.md). Repeat it to mix, each with a share as "
        "WHAT::0.7.  [preset]",
        "data.source",
        multiple=True,
        metavar="WHAT",
    ),
    _data("--val-data", "Pairs to evaluate on.  [some of --data]", "data.val_source"),
    _data("--image-root", "Folder of the images that a table or JSON names.  [the list's]"),
    _data("--csv-separator", "Separator of columns.  [detected]", "data.separator"),
    _data(
        "--csv-img-key", "Column of the image in a table or parquet.  [detected]", "data.image_key"
    ),
    _data("--csv-caption-key", "The same of the caption.  [detected]", "data.caption_key"),
    _data("--workers", "Data loading processes per rank.  [preset]"),
    _length("--steps", "Number of optimizer steps.  [preset]"),
    _length("--epochs", "Epochs, instead of --steps.  [preset]", type=number),
    _length("--micro-batch", 'Pairs per rank, where the JSON says "auto".  [preset]'),
    _length("--lr", 'Learning rate, where the JSON says "auto".  [preset]'),
    _length("--seed", "Seed of weights, data order and scenes.  [0]"),
    _length("--deterministic", "Reproduce every bit on the same device; slower on a GPU."),
    option(
        "DeepSpeed",
        "--deepspeed_config",
        default=str(DEFAULT_JSON),
        help="DeepSpeed's JSON.  [ds_configs/zero2.json]",
    ),
)
OUTPUT = (
    _output("--output-dir", "Folder of the run.  [runs/<preset>-<date and time>]"),
    _output("--log-every", "Log every so many steps.  [preset]"),
    _output("--eval-every", "Steps between evaluations; 0: only at the end.  [preset]"),
    _checkpoints("--save-every", "Steps between checkpoints; 0: by time alone.  [preset]"),
    _checkpoints("--save-minutes", "Minutes between checkpoints; 0: by steps alone.  [15]"),
    _checkpoints("--keep", "Number of newest checkpoints to keep.  [2]"),
)
_kept = partial(option, "Checkpoints")
_profile = partial(option, "Profiling")
_deepspeed = partial(option, "DeepSpeed")
START = (
    _kept(
        "--resume",
        default="auto",
        show_default=True,
        metavar="auto|never|PATH",
        help="auto: resume the run in --output-dir. never: a new run. PATH: resume another run.",
    ),
    _kept("--resume-with-changes", is_flag=True, help="Resume even if settings differ."),
    _profile("--profile", metavar="FIRST:LAST", help="Trace these steps, into profile/."),
    _profile(
        "--profile-memory",
        type=int,
        metavar="STEPS",
        help="Measure the memory of the first steps, and predict it, into memory.json.",
    ),
    _deepspeed("--dry-run", is_flag=True, help="Print the resolved configuration, and stop."),
    # Users pass it by habit; the JSON is always read.
    _deepspeed("--deepspeed", is_flag=True, hidden=True),
    # Launchers pass it; LOCAL_RANK says the same.
    _deepspeed("--local_rank", type=int, hidden=True),
)


def add(*options: Decorator) -> Decorator:
    """Decorate a command with options, as `@add(*WHAT, *OUTPUT)`; `--help` keeps their order."""

    def decorate(function: Callable) -> Callable:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate


class ConfigCommand(GroupedCommand):
    """A command with these options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, args)
        last, settings = {}, iter(ctx.params["settings"])
        for given in order:
            text = next(settings) if given.name == "settings" else PLACES.get(str(given.name), "")
            last[text.partition("=")[0]] = given.name
        for name, place in PLACES.items():
            if last.get(place) == "settings":
                ctx.params[name] = None
        return rest


def resolve_config(settings: tuple[str, ...], options: dict[str, Any]) -> Config:
    """The preset's configuration, overridden by `--set` and the options that were given.

    Raises `UserError`, which names an option where `Config.from_dict` refuses its setting.
    """
    sections, given = parse_settings(settings), {}
    for name, value in options.items():
        if name not in PLACES or value in (None, ()):
            continue
        if name == "losses":
            value = parse_losses(value)
        elif isinstance(value, tuple):  # of --data
            value = list(value) if len(value) > 1 else value[0]
        section, _, key = PLACES[name].partition(".")
        sections.setdefault(section, {})[key] = value
        given[PLACES[name]] = "--" + name.replace("_", "-")
    if options["init"] == "random":
        for section, values in RANDOM.items():
            sections[section] = values | sections.get(section, {})
    try:
        return load_preset(None, sections)
    except UserError as error:
        line = str(error)
        for place, flag in given.items():
            if line.startswith((f"{place} ", f"{place}.")):
                line = flag + line.removeprefix(place)
        raise UserError(line) from None
