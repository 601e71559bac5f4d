"""The command-line options that make up a run's configuration, for all commands that need one.

An option such as --lr sets one setting. If --set names it too, the last of the two counts.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click import option

from ds_cmli.config.registry import plugin_option
from ds_cmli.config.schema import SECTIONS, Sections, description
from ds_cmli.errors import UserError, blame

# `config/ds_configs` is a folder in a wheel; in a checkout it is a link to the folder at the top.
DEFAULT_JSON = Path(__file__).with_name("ds_configs") / "zero2.json"

# The settings that `--init random` sets, unless they are given.
WEIGHT_SETTINGS = ("student.image_weights", "student.text_weights", "teacher.weights")
RANDOM = dict.fromkeys(WEIGHT_SETTINGS, "random") | {"data.tokenizer": "builtin"}


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
    with suppress(ValueError, RecursionError):
        return setting, json.loads(value)
    return setting, value


FLAGS = {
    "--preset": "run.preset",
    "--losses": "loss.weights",
    "--start-from": "student.source",
    "--data": "data.source",
    "--val-data": "data.val_source",
    "--image-root": "data.image_root",
    "--csv-img-key": "data.image_key",
    "--csv-caption-key": "data.caption_key",
    "--workers": "data.workers",
    "--steps": "optim.steps",
    "--epochs": "optim.epochs",
    "--micro-batch": "optim.micro_batch",
    "--lr": "optim.lr",
    "--seed": "run.seed",
    "--deterministic": "run.deterministic",
    "--output-dir": "run.output_dir",
    "--log-every": "run.log_every",
    "--eval-every": "run.eval_every",
    "--save-every": "run.save_every",
    "--save-minutes": "run.save_minutes",
    "--keep": "run.keep",
}
# Attributes of options that are not read as the type of the setting's default.
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "--losses": {"type": parse_losses, "metavar": "NAME[=WEIGHT],..."},
    "--data": {"multiple": True, "callback": lambda _, __, x: x[0] if len(x) == 1 else [*x]},
    "--epochs": {"type": float},
    "--deterministic": {"is_flag": True, "default": None},
}


def setting_option(flag: str, setting: str) -> Callable:
    section, _, key = setting.partition(".")
    default_type = type(getattr(SECTIONS[section](), key))
    attributes = ATTRIBUTES.get(flag, {"type": default_type})
    return option(flag, help=description(section, key), **attributes)


INIT_HELP = "Start from the preset's weights, or from random ones, without downloads."
SET = "SECTION.SETTING=VALUE"
SET_HELP = "Any setting of docs/settings.md, for instance student.layers=4. Repeatable."
RESUME_HELP = "auto: the run in --output-dir. never: a new run. PATH: another run."
MEMORY_HELP = "Measure the memory of the first steps, and predict it, into memory.json."
OPTIONS = (
    option("--set", "settings", type=parse_setting, multiple=True, metavar=SET, help=SET_HELP),
    option("--init", type=click.Choice(["preset", "random"]), default="preset", help=INIT_HELP),
    *(setting_option(flag, setting) for flag, setting in FLAGS.items()),
    plugin_option,
    option("--resume", default="auto", metavar="auto|never|PATH", help=RESUME_HELP),
    option("--resume-with-changes", is_flag=True, help="Resume even if settings differ."),
    option("--deepspeed_config", default=str(DEFAULT_JSON), help="DeepSpeed's JSON.  [zero2.json]"),
    option("--dry-run", is_flag=True, help="Print the resolved configuration, and stop."),
    option("--profile", metavar="FIRST:LAST", help="Trace these steps, into profile/."),
    option("--profile-memory", type=int, metavar="STEPS", help=MEMORY_HELP),
    # Users and launchers pass them by habit: the JSON is always read, and LOCAL_RANK says the same.
    option("--deepspeed", is_flag=True, hidden=True, expose_value=False),
    option("--local_rank", type=int, hidden=True, expose_value=False),
)


class ConfigCommand(click.Command):
    """A command with these options, which passes `settings` as {section: {setting: value}}."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for decorate in OPTIONS:
            decorate(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # click keeps the order of options here alone: `ctx.params` has lost it.
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        remaining = super().parse_args(ctx, args)
        values = ctx.params
        pairs = [*RANDOM.items()] if values.pop("init") == "random" else []
        pairs_of_set = iter(values.pop("settings"))
        for parameter in order:
            if parameter.name == "settings":
                pairs.append(next(pairs_of_set))
            elif setting := FLAGS.get(parameter.opts[0]):
                pairs.append((setting, values[str(parameter.name)]))
        settings = Sections()
        for setting, value in pairs:  # the last one counts
            section, _, key = setting.partition(".")
            settings.setdefault(section, {})[key] = value
        names = {parameter.name for parameter in self.params if parameter.opts[0] in FLAGS}
        ctx.params = {key: values[key] for key in values.keys() - names} | {"settings": settings}
        return remaining
