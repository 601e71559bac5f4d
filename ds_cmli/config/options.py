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
from ds_cmli.config.presets import PRESETS
from ds_cmli.config.registry import IMAGE, LOSSES, SOURCES, TEXT, plugin_option
from ds_cmli.config.schema import Config, RunConfig, Sections

# `config/ds_configs` is a folder in a wheel; in a checkout it is a link to the folder at the top.
DEFAULT_JSON = Path(__file__).with_name("ds_configs") / "zero2.json"

PLACES: dict[str, str] = {}  # the options of a single setting, and that setting: "lr": "optim.lr"
# The settings that `--init random` sets, unless they are given.
WEIGHTS = ("student.image_weights", "student.text_weights", "teacher.weights")
RANDOM = dict.fromkeys(WEIGHTS, "random") | {"data.tokenizer": "builtin"}


def parse_losses(text: str) -> dict[str, float]:
    """Parse `--losses`: `"global,cmli=0.5"` -> `{"global": 1.0, "cmli": 0.5}`."""
    pairs = [part.strip().partition("=") for part in text.split(",")]
    with blame(f"--losses is {text!r}: write NAME or NAME=WEIGHT by comma, as global,cmli=0.5"):
        return {name: float(weight) if equals else 1.0 for name, equals, weight in pairs}


def parse_setting(text: str) -> tuple[str, object]:
    """Parse `--set`: `"student.layers=4"` -> `("student.layers", 4)`; JSON, or else plain text."""
    setting, equals, value = text.partition("=")
    if not equals or "." not in setting:
        need = "write SECTION.SETTING=VALUE, for instance student.layers=4"
        raise UserError(f"--set is {text!r}: {need}")
    if value.startswith(("{", "[")):
        with blame(f"--set {text}: not valid JSON"):
            return setting, json.loads(value)
    with suppress(ValueError):
        return setting, json.loads(value)
    return setting, value


def _setting(group: str, flag: str, setting: str, help: str, **more: Any) -> Callable:
    """Declare an option of a setting, of the default's type."""
    PLACES[flag.removeprefix("--").replace("-", "_")] = setting
    section, _, key = setting.partition(".")
    kind = type(getattr(getattr(Config(), section), key))
    if kind is bool:
        more |= {"is_flag": True, "default": None}
    elif kind in (int, float):
        more["type"] = kind
    return option(group, flag, help=help, **more)


_what = partial(_setting, "What to train")
_data = partial(_setting, "Data")
_length = partial(_setting, "Length and batch")
_output = partial(_setting, "Output")
_kept = partial(_setting, "Checkpoints")
_start = partial(option, "Start")
_also = partial(option, "What to train")
PRESET_HELP = f"{', '.join(PRESETS)}.  [{RunConfig.preset}; with --start-from finetune]"
LOSSES_HELP = f"NAME or NAME=WEIGHT, by comma, of {', '.join(LOSSES)}.  [preset]"
START_HELP = """A model of transformers or open_clip (a folder, or a name of the hub), a run or an
export to start from, with its joint space (docs/finetune.md)."""
INIT_HELP = "Start from the preset's weights, or from random ones, without downloads.  [preset]"
SET_HELP = "Any setting of docs/settings.md, for instance student.layers=4. Repeatable."
KINDS = ", ".join(entry.what for entry in SOURCES.values())
DATA_HELP = f"""'demo', or {KINDS}, also by hf://datasets/OWNER/NAME (docs/train.md). Repeat it to
mix, each with a share as WHAT::0.7.  [preset]"""
ROOT_HELP = "Folder of the images that a table or JSON names.  [the list's]"
WHERE_AUTO = 'where the JSON says "auto".  [preset]'
BIT_HELP = "Reproduce every bit on the same device; slower on a GPU."
FOLDER_HELP = "Folder of the run.  [runs/<preset>-<date and time>]"
BETWEEN = "Steps between"
MINUTES_HELP = "Minutes between checkpoints; 0: by steps alone.  [15]"
RESUME_HELP = "auto: the run in --output-dir. never: a new run. PATH: another run.  [auto]"
MEMORY_HELP = "Measure the memory of the first steps, and predict it, into memory.json."
OPTIONS = (
    _what("--preset", "run.preset", PRESET_HELP),
    _what("--losses", "loss.weights", LOSSES_HELP, type=parse_losses, metavar="LOSSES"),
    _what("--start-from", "student.source", START_HELP, metavar="MODEL"),
    _what("--image-backbone", "student.image_backbone", f"Of {', '.join(IMAGE)}.  [preset]"),
    _what("--text-backbone", "student.text_backbone", f"Of {', '.join(TEXT)}.  [preset]"),
    plugin_option,
    _also("--init", type=click.Choice(["preset", "random"]), default="preset", help=INIT_HELP),
    _also("--set", "settings", multiple=True, metavar="SECTION.SETTING=VALUE", help=SET_HELP),
    _data("--data", "data.source", DATA_HELP, multiple=True, metavar="WHAT"),
    _data("--val-data", "data.val_source", "Pairs to evaluate on.  [some of --data]"),
    _data("--image-root", "data.image_root", ROOT_HELP),
    _data("--csv-img-key", "data.image_key", "Column of the image.  [detected]"),
    _data("--csv-caption-key", "data.caption_key", "Column of the caption.  [detected]"),
    _data("--workers", "data.workers", "Data loading processes per rank.  [preset]"),
    _length("--steps", "optim.steps", "Number of optimizer steps.  [preset]"),
    _length("--epochs", "optim.epochs", "Epochs, instead of --steps.  [preset]", type=float),
    _length("--micro-batch", "optim.micro_batch", f"Pairs per rank, {WHERE_AUTO}"),
    _length("--lr", "optim.lr", f"Learning rate, {WHERE_AUTO}"),
    _length("--seed", "run.seed", "Seed of weights, data order and scenes.  [0]"),
    _length("--deterministic", "run.deterministic", BIT_HELP),
    _output("--output-dir", "run.output_dir", FOLDER_HELP),
    _output("--log-every", "run.log_every", "Log every so many steps.  [preset]"),
    _output(
        "--eval-every", "run.eval_every", f"{BETWEEN} evaluations; 0: only at the end.  [preset]"
    ),
    _kept("--save-every", "run.save_every", f"{BETWEEN} checkpoints; 0: by time alone.  [preset]"),
    _kept("--save-minutes", "run.save_minutes", MINUTES_HELP),
    _kept("--keep", "run.keep", "Number of newest checkpoints to keep.  [2]"),
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
    """A command with these options; it gets those of settings as sections, `settings`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own, self.params = self.params, []
        for decorate in OPTIONS:
            decorate(self)
        self.params += own

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, args)
        values = ctx.params
        given: list[tuple[str, Any]] = [*RANDOM.items()] if values.pop("init") == "random" else []
        texts = iter(values.pop("settings"))
        for name in (str(parameter.name) for parameter in order):
            if name == "settings":
                given.append(parse_setting(next(texts)))
            elif name in PLACES:
                value = values[name]
                if isinstance(value, tuple):  # of --data
                    value = list(value) if len(value) > 1 else value[0]
                given.append((PLACES[name], value))
        settings: Sections = {}
        for place, value in given:  # the last one counts
            section, _, key = place.partition(".")
            settings.setdefault(section, {})[key] = value
        ctx.params = {key: values[key] for key in values if key not in PLACES}
        ctx.params["settings"] = settings
        return rest
