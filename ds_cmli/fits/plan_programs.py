"""The plan of any program: `ds-cmli-memory plan --batch 64 -- train.py --batch-size {}`.

The program is changed by places in its arguments, and by the DeepSpeed JSON that they name.
"""

import json
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import click

from ds_cmli.common.cli import check_writable, option, run_command
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject, read
from ds_cmli.fits import largest, plan_table
from ds_cmli.fits.answer import Room
from ds_cmli.fits.command import ProgramCommand, check_program
from ds_cmli.fits.plan import Need, Settings, Step, deepspeed, torchrun

ACCUMULATION, CHECKPOINTING, LORA = "accumulation", "checkpointing", "lora"
# "{checkpointing}" is True or False, "{checkpointing:--flag|}" the one text or the other.
PLACE = re.compile(rf"\{{(|{ACCUMULATION}|{CHECKPOINTING}|{LORA})(?::([^|}}]*)\|([^}}]*))?\}}")
LIKE_A_PLACE = re.compile(r"\{[A-Za-z_][^{}\"]*\}")
MICRO_BATCH, STEPS = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
TRAIN_BATCH, ZERO, AUTO = "train_batch_size", "zero_optimization", "auto"
# One of these makes a JSON that of DeepSpeed.
KEYS = {ZERO, MICRO_BATCH, TRAIN_BATCH, STEPS}


@dataclass(frozen=True)
class DeepSpeedJson:
    """The file that the program's arguments name; without one, path and content are empty."""

    word: int = -1  # its place among the words
    path: str = ""
    content: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in (MICRO_BATCH, STEPS, TRAIN_BATCH):
            value = self.content.get(key, AUTO)
            if value != AUTO and (type(value) is not int or value < 1):
                self._refuse(key, value, f'give a number from 1 on, or "{AUTO}"')
        offload: object = None
        if isinstance(self.zero, dict):
            offload = self.zero.get("offload_optimizer")
        for key, value in ((ZERO, self.zero), (f"{ZERO}.offload_optimizer", offload or {})):
            if not isinstance(value, dict):
                self._refuse(key, value, "give an object")
        if type(self.stage) is not int or self.stage not in range(4):
            self._refuse(f"{ZERO}.stage", self.stage, "give one of 0 to 3")

    def _refuse(self, key: str, value: object, what_to_do: str) -> NoReturn:
        raise UserError(f"{self.path}: {key} is {json.dumps(value)}: {what_to_do}")

    def number(self, key: str) -> int:
        """The value; 0 for none, and for "auto"."""
        value = self.content.get(key, AUTO)
        if value == AUTO:
            return 0
        return value

    @property
    def zero(self) -> JsonObject:
        return self.content.get(ZERO, {})

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    @property
    def offloads(self) -> bool:
        return (self.zero.get("offload_optimizer") or {}).get("device", "none") != "none"

    def micro_batch(self, world_size: int) -> int:
        """The size as DeepSpeed takes it, from the batch of all ranks if need be; 0 for none."""
        if self.number(MICRO_BATCH):
            return self.number(MICRO_BATCH)
        return self.number(TRAIN_BATCH) // (world_size * (self.number(STEPS) or 1))


def find_json(program: tuple[str, ...]) -> DeepSpeedJson:
    """Find the DeepSpeed JSON among the program's words.

    Raises:
        UserError: an option for it names a file that is not there, or no JSON.
    """
    for number, word in enumerate(program):
        option_name, _, value = word.rpartition("=")
        option_name = option_name or program[max(number - 1, 0)]
        if not value.endswith(".json"):
            continue
        meant = re.match("--?(deepspeed|ds)", option_name) is not None
        try:
            content = read(Path(value), dict)
        except (OSError, ValueError) as error:
            if meant:
                raise UserError(f"{option_name} is {value!r}: {error.args[-1]}") from None
            continue
        if meant or KEYS & content.keys():
            return DeepSpeedJson(number, value, content)
    return DeepSpeedJson()


@dataclass
class Program:
    """A program whose words and JSON are changed; each prediction is a process of its own."""

    words: tuple[str, ...]
    names: list[str]  # of the GPUs
    world_size: int
    batch: int | None  # samples of a step on each rank; None: those of the JSON
    write_to: str  # the path of a changed JSON

    def __post_init__(self) -> None:
        self.json = find_json(self.words)
        self.folder = tempfile.TemporaryDirectory()
        places = {match[1] for match in PLACE.finditer(" ".join(self.words))}
        micro_batch = self.json.micro_batch(self.world_size)
        if "" not in places and not micro_batch:
            raise UserError(
                f"nothing sets the micro-batch: write {largest.PLACE} for it in the program's "
                f"arguments, or give a DeepSpeed JSON with {MICRO_BATCH}"
            )
        pairs = self.batch or micro_batch * (self.json.number(STEPS) or 1)
        if not pairs:
            raise UserError(f"--batch is missing: the samples of a step where {largest.PLACE} is")
        own = Settings()
        if self.json.path:
            own = Settings(stage=self.json.stage, offload=self.json.offloads)
        own = replace(own, **dict.fromkeys(places & {CHECKPOINTING, LORA}, False))
        accumulates = ACCUMULATION in places or micro_batch > 0
        self.step = Step(own, pairs, self.world_size, accumulates=accumulates)

    def changed(self, settings: Settings, micro_batch: int, path: str) -> list[str]:
        """The program's words with the settings of a line, whose JSON is written to `path`."""
        times = self.step.pairs // micro_batch
        values: dict[str, object] = {"": micro_batch, ACCUMULATION: times}
        values |= {CHECKPOINTING: settings.checkpointing, LORA: settings.lora}
        words = list(self.words)
        if self.json.path:
            content = self.json_of(settings, micro_batch)
            Path(path).write_text(json.dumps(content, indent=2) + "\n")
            word = words[self.json.word]
            words[self.json.word] = word.removesuffix(self.json.path) + path
        filled = [PLACE.sub(lambda match: _text(match, values), word) for word in words]
        return [new for new, old in zip(filled, words, strict=True) if new or not old]

    def json_of(self, settings: Settings, micro_batch: int) -> JsonObject:
        zero = self.json.zero | {"stage": settings.stage}
        if settings.offload != self.step.own.offload:
            zero["offload_optimizer"] = {"device": ("none", "cpu")[bool(settings.offload)]}
        content = self.json.content | {ZERO: zero}
        if self.json.micro_batch(self.world_size):
            content |= {MICRO_BATCH: micro_batch, STEPS: self.step.pairs // micro_batch}
            if self.json.number(TRAIN_BATCH):
                content[TRAIN_BATCH] = self.step.pairs * self.world_size
        return content

    def measure(self, settings: Settings, micro_batch: int, gpu: str = "") -> Need:
        names = [gpu] * bool(gpu) or self.names
        options = ["--gpu", *names] * (len(names) == 1)
        if self.json.path or self.world_size > 1:
            options += ["--world-size", str(self.world_size)]
        file = f"{settings} {micro_batch}.json".replace(" ", "-")
        words = self.changed(settings, micro_batch, str(Path(self.folder.name) / file))
        answer = largest.answered(options, words, f"micro-batch {micro_batch}")
        if answer["waited_for"]:
            raise UserError(f"{' and '.join(answer['waited_for'])} did no step")
        fits = {}
        for name in names:
            if answer["fits"][str(Room(name))]:
                fits[name] = answer["retries"][str(Room(name))]
        return Need(answer["totals"]["device"], fits)

    def start(self, settings: Settings, micro_batch: int) -> str:
        words = self.changed(settings, micro_batch, self.write_to)
        launcher = ["python"]
        if self.json.path:
            launcher = deepspeed(self.world_size)
            if words[0] == "-m":
                words[0] = "--module"
        elif self.world_size > 1:
            launcher = torchrun(self.world_size)
        return shlex.join([*launcher, *words])


def _text(match: re.Match[str], values: Mapping[str, object]) -> str:
    value = values[match[1]]
    if match[2] is None:
        return str(value)
    return match[3 - bool(value)]


def tell(line: str) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


@click.command(
    cls=ProgramCommand,
    context_settings={"help_option_names": ["-h", "--help"]},
    options_metavar="[OPTIONS] --",
)
@option("Plan", "--world-size", type=click.IntRange(1), default=1, show_default=True, help="Ranks.")
@option("Plan", "--batch", type=click.IntRange(1), help="Samples of a step per rank.  [the JSON's]")
@plan_table.plan_options
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT|-m MODULE [ARGS]...")
def command(
    world_size: int,
    batch: int | None,
    gpu: str | None,
    prices: str | None,
    write_to: str,
    program: tuple[str, ...],
) -> int:
    """Plan a program: which settings fit on which GPU, and which of them cost the least work."""
    check_program(program)
    names, priced = plan_table.devices(gpu, prices)
    planned = Program(program, names, world_size, batch, write_to)
    for word in set(LIKE_A_PLACE.findall(PLACE.sub("", " ".join(program)))):
        tell(f"{word} is no place of a plan, and stays as it is")
    if planned.json.path:
        check_writable(write_to)
    return plan_table.make(planned, names, priced, tell)


def main() -> None:
    run_command(command)
