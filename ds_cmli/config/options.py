"""The command-line options that make up a run's configuration, for all commands that need one.

An option of a setting is that setting by name: of it and of `--set`, the last one given counts.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from ds_cmli.common import GroupedCommand, UserError, blame, option
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.registry import IMAGE, LOSSES, SOURCES, TEXT, plugin_option
from ds_cmli.config.schema import SECTIONS, Config, RunConfig, Sections, check, shown

# `config/ds_configs` is a folder in a wheel; in a checkout it is a link to the folder at the top.
DEFAULT_JSON = Path(__file__).with_name("ds_configs") / "zero2.json"

PLACES: dict[str, str] = {}  # the options of a single setting, and that setting: "lr": "optim.lr"
# The settings that `--init random` sets, unless they are given.
WEIGHTS = ("student.image_weights", "student.text_weights", "teacher.weights")
RANDOM = dict.fromkeys(WEIGHTS, "random") | {"data.tokenizer": "builtin"}
Decorator = Callable[[Any], Any]
Given = tuple[str, str, Any]  # the option as it was typed, the setting, its value


def number(text: str) -> object:
    """What is no number stays a text, which the setting refuses."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def parse_losses(text: str) -> dict[str, float]:
    """Parse `--losses`: `"global,cmli=0.5"` -> `{"global": 1.0, "cmli": 0.5}`."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            name = ""
        need = "write NAME or NAME=WEIGHT by comma, as global,cmli=0.5"
        check(bool(name), "--losses", text, need)
    return weights


def parse_setting(text: str) -> tuple[str, object]:
    """Parse `--set`: `"student.layers=4"` -> `("student.layers", 4)`; JSON, or else plain text."""
    setting, equals, value = text.partition("=")
    need = "write SECTION.SETTING=VALUE, for instance student.layers=4"
    check(bool(equals) and "." in setting[:-1].lstrip("."), "--set", text, need)
    if value.startswith(("{", "[")):
        with blame(f"--set {setting} is {shown(value)}: not valid JSON"):
            return setting, json.loads(value)
    with suppress(ValueError):
        return setting, json.loads(value)
    return setting, value


def _setting(group: str, flag: str, help: str, setting: str = "", **more: Any) -> Decorator:
    """Declare an option of `setting`, or of that of its own name, of the default's type."""
    name = flag.removeprefix("--").replace("-", "_")
    if not setting:
        (setting,) = (f"{of}.{name}" for of, kind in SECTIONS.items() if hasattr(kind, name))
    PLACES[name] = setting
    section, _, key = setting.partition(".")
    default = getattr(SECTIONS[section](), key)
    if isinstance(default, bool):
        more |= {"is_flag": True, "default": None}
    elif isinstance(default, int | float):
        more["type"] = number
    return option(group, flag, help=help, **more)


_what = partial(_setting, "What to train")
_data = partial(_setting, "Data")
_length = partial(_setting, "Length and batch")
_output = partial(_setting, "Output")
_kept = partial(_setting, "Checkpoints")
_start = partial(option, "Start")
_also = partial(option, "What to train")
KINDS = ", ".join(entry.what for entry in SOURCES.values())
LOSSES_HELP = f"NAME or NAME=WEIGHT, by comma, of {', '.join(LOSSES)}.  [preset]"
START_HELP = """A model of transformers or open_clip (a folder, or a name of the hub), a run or an
export to start from, with its joint space (docs/finetune.md)."""
SET_HELP = "Any setting of docs/settings.md, for instance student.layers=4. Repeatable."
DATA_HELP = f"""'demo', or {KINDS}, also by hf://datasets/OWNER/NAME (docs/train.md). Repeat it to
mix, each with a share as WHAT::0.7.  [preset]"""
RESUME_HELP = "auto: the run in --output-dir. never: a new run. PATH: another run.  [auto]"
MEMORY_HELP = "Measure the memory of the first steps, and predict it, into memory.json."
OPTIONS = (
    _what("--preset", f"{', '.join(PRESETS)}.  [{RunConfig.preset}; with --start-from finetune]"),
    _what("--losses", LOSSES_HELP, "loss.weights", type=parse_losses, metavar="LOSSES"),
    _what("--start-from", START_HELP, "student.source", metavar="MODEL"),
    _what("--image-backbone", f"Of {', '.join(IMAGE)}.  [preset]"),
    _what("--text-backbone", f"Of {', '.join(TEXT)}.  [preset]"),
    plugin_option,
    _also(
        "--init",
        type=click.Choice(["preset", "random"]),
        default="preset",
        help="Start from the preset's weights, or from random ones, without downloads.  [preset]",
    ),
    _also("--set", "settings", multiple=True, metavar="SECTION.SETTING=VALUE", help=SET_HELP),
    _data("--data", DATA_HELP, "data.source", multiple=True, metavar="WHAT"),
    _data("--val-data", "Pairs to evaluate on.  [some of --data]", "data.val_source"),
    _data("--image-root", "Folder of the images that a table or JSON names.  [the list's]"),
    _data("--csv-img-key", "Column of the image.  [detected]", "data.image_key"),
    _data("--csv-caption-key", "Column of the caption.  [detected]", "data.caption_key"),
    _data("--workers", "Data loading processes per rank.  [preset]"),
    _length("--steps", "Number of optimizer steps.  [preset]"),
    _length("--epochs", "Epochs, instead of --steps.  [preset]", type=number),
    _length("--micro-batch", 'Pairs per rank, where the JSON says "auto".  [preset]'),
    _length("--lr", 'Learning rate, where the JSON says "auto".  [preset]'),
    _length("--seed", "Seed of weights, data order and scenes.  [0]"),
    _length("--deterministic", "Reproduce every bit on the same device; slower on a GPU."),
    _output("--output-dir", "Folder of the run.  [runs/<preset>-<date and time>]"),
    _output("--log-every", "Log every so many steps.  [preset]"),
    _output("--eval-every", "Steps between evaluations; 0: only at the end.  [preset]"),
    _kept("--save-every", "Steps between checkpoints; 0: by time alone.  [preset]"),
    _kept("--save-minutes", "Minutes between checkpoints; 0: by steps alone.  [15]"),
    _kept("--keep", "Number of newest checkpoints to keep.  [2]"),
    _start("--resume", default="auto", metavar="auto|never|PATH", help=RESUME_HELP),
    _start("--resume-with-changes", is_flag=True, help="Resume even if settings differ."),
    _start("--deepspeed_config", default=str(DEFAULT_JSON), help="DeepSpeed's JSON.  [zero2.json]"),
    _start("--dry-run", is_flag=True, help="Print the resolved configuration, and stop."),
    _start("--profile", metavar="FIRST:LAST", help="Trace these steps, into profile/."),
    _start("--profile-memory", type=int, metavar="STEPS", help=MEMORY_HELP),
    # Users and launchers pass them by habit: the JSON is always read, and LOCAL_RANK says the same.
    _start("--deepspeed", is_flag=True, hidden=True, expose_value=False),
    _start("--local_rank", type=int, hidden=True, expose_value=False),
)


class ConfigCommand(GroupedCommand):
    """A command with these options; it gets those of settings in one list, `settings`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own, self.params = self.params, []
        for decorate in OPTIONS:
            decorate(self)
        self.params += own

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, args)
        values, given = ctx.params, list[Given]()
        if values.pop("init") == "random":
            given = [("--init", setting, value) for setting, value in RANDOM.items()]
        texts = iter(values.pop("settings"))
        for parameter in order:
            name = str(parameter.name)
            if name == "settings":
                given.append(("--set", *parse_setting(next(texts))))
            elif name in PLACES:
                given.append((parameter.opts[0], PLACES[name], values[name]))
        for name in PLACES:
            del values[name]
        values["settings"] = given
        return rest


def resolve_config(settings: list[Given]) -> Config:
    """The preset's configuration with these settings; of one given twice the last counts.

    Raises `UserError`, which names the option by which the setting was given.
    """
    sections, flags = Sections(), dict[str, str]()
    for flag, setting, value in settings:
        section, _, key = setting.partition(".")
        if isinstance(value, tuple):  # of --data
            value = list(value) if len(value) > 1 else value[0]
        sections.setdefault(section, {})[key] = value
        flags[setting] = flag
    try:
        return load_preset(None, sections)
    except UserError as error:
        line = str(error)
        for setting, flag in flags.items():
            if flag != "--set" and line.startswith((f"{setting} ", f"{setting}.")):
                raise UserError(flag + line.removeprefix(setting)) from None
        raise
