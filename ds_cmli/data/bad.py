"""Samples that cannot be used: counts, names in a file, and whether there are too many."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from ds_cmli.common.checksums import sealed, verify
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse
from ds_cmli.distributed.process_group import CollectiveFlags

Bad = tuple[str, str]  # file name, reason

SHOWN = 5
NO_TOKEN = "caption without a token"
EMPTY = "empty caption"
BAD_FILE = "bad.jsonl"
AT_LOAD = "load"  # when a sample of the file was found; the others: "training", "evaluation"


class Refused(ValueError):
    """A picture or its captions are not read; the message tells the user why."""


class BadFile:
    """`bad.jsonl` in a run's folder: each sample that was skipped, once, and why.

    Lines are `{"name", "reason", "when", "sha256"}`; `when` is "load", "training" or "evaluation".
    A resumed run adds what it had not met before. Where the file cannot be written, lines wait in
    memory and a line is printed once.
    """

    def __init__(self, path: Path, at_load: Iterable[Bad]):
        self.path, self.waiting, self.told = path, "", False
        self.at_load = list(at_load)
        # What the file names, read at the first use: until then a run may be put aside.
        self.known: set[tuple[str, ...]] | None = None

    def write(self, bad: Iterable[Bad], when: str) -> None:
        """Add those samples that are not in the file."""
        if self.known is None:
            self.known = self._begin()
        for name, reason in bad:
            at_load, sample = (name, reason, AT_LOAD), (name, reason, when)
            if at_load not in self.known and sample not in self.known:
                self.known.add(sample)
                self.waiting += _line(sample)
        if self.waiting:
            self._flush()

    def _begin(self) -> set[tuple[str, ...]]:
        """Read what an earlier start has met, and renew what is left out at load.

        The latter can be something else now.
        """
        lines = []
        with suppress(OSError):
            lines = self.path.read_bytes().decode(errors="replace").splitlines()
        met = [sample for sample in map(_parsed, lines) if sample and sample[2] != AT_LOAD]
        at_load = [(name, reason, AT_LOAD) for name, reason in self.at_load]
        left_out = "".join(map(_line, at_load))
        content = left_out + "".join(map(_line, met))
        if content or lines:
            beside = self.path.with_name(BAD_FILE + ".writing")
            try:
                beside.write_text(content, encoding="utf-8")
                os.replace(beside, self.path)
            except OSError as error:
                self.waiting = left_out
                self._tell(error)
        return {*at_load, *met}

    def _flush(self) -> None:
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                content = self.waiting.encode()
                if file.write(content) != len(content):
                    file.truncate(end)  # a line that was written in part
                    raise OSError("no space left on device")
            self.waiting = ""
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self.told:
            self.told = True
            with suppress(OSError):  # the terminal is gone
                say(f"warning: {self.path} cannot be written now: {error.strerror or error}")


def _line(sample: tuple[str, ...]) -> str:
    return json.dumps(sealed(dict(zip(("name", "reason", "when"), sample, strict=True)))) + "\n"


def _parsed(line: str) -> tuple[str, str, str] | None:
    """The sample of a line; None if the line is damaged."""
    try:
        values = parse(line, dict)
        verify(values)
        return str(values["name"]), str(values["reason"]), str(values["when"])
    except (ValueError, KeyError):
        return None


@dataclass
class BadSamples:
    """Counts of the bad samples that training meets, and the limit of their share.

    A sample counts each time it is requested, so that the counts of several ranks simply add up.
    The share is relative to the whole data set until more samples than that have been requested,
    then to all requested samples: one broken image in the first batch is one of `length`, not one
    of a batch.
    """

    max_share: float  # the largest share that is accepted
    length: int  # number of samples in the training set
    at_load: list[Bad] = field(default_factory=list)  # samples that were left out at load
    count: int = 0  # bad samples that this rank has met in training
    first: list[Bad] = field(default_factory=list)  # the first few of all, to be shown
    of_ranks: list[Bad] = field(default_factory=list)  # `first` of all ranks at the last `gather`
    file: BadFile | None = None  # names all of them; only rank 0 has one
    waiting: list[Bad] = field(default_factory=list)  # met on this rank since the last `gather`

    def __post_init__(self):
        self.first.extend(self.at_load[:SHOWN])

    def add(self, bad: list[Bad]) -> None:
        self.count += len(bad)
        self.waiting += bad
        for item in bad:
            if len(self.first) < SHOWN and item not in self.first:
                self.first.append(item)

    def too_many(self, count: int, seen: int) -> bool:
        """Whether `count` bad samples of `seen` requested ones are too large a share.

        Both are numbers since the start and over all ranks.
        """
        passes = max(1.0, seen / self.length) if self.length else 1.0
        samples = (self.length + len(self.at_load)) * passes
        return count + len(self.at_load) * passes > self.max_share * samples

    def gather(self, flags: CollectiveFlags) -> int:
        """The count over all ranks; what they have met is written to the file. Collective."""
        gathered = flags.gather((self.count, self.first, self.waiting))  # collective
        counts, first, met = zip(*gathered, strict=True)
        self.waiting = []
        self.of_ranks = list(chain.from_iterable(first))
        if self.file is not None:
            self.file.write(chain.from_iterable(met), "training")
        return sum(counts)

    def evaluated(self, left_out: list[Bad]) -> None:
        """Record what an evaluation has left out, the same on every rank."""
        if self.file is not None:
            self.file.write(left_out, "evaluation")

    def check(self, flags: CollectiveFlags, seen: int) -> None:
        """Raise `UserError` on all ranks if there are too many (see `too_many`). Collective."""
        count = self.gather(flags)  # collective
        if self.too_many(count, seen):
            self.first = self.of_ranks
            raise UserError(self.message(count))

    def summary(self, flags: CollectiveFlags) -> list[str]:
        """The lines to print at the end of a run; none if no sample was skipped. Collective."""
        skipped = self.gather(flags)  # collective
        if not skipped and not self.at_load:
            return []
        met = f"{len(self.at_load)} samples at load and {skipped} in training"
        return [f"skipped {met}; the first: {self._named()}"]

    def message(self, count: int) -> str:
        """The message of the `UserError` for too many bad samples; `count` as in `too_many`."""
        left_out = len(self.at_load)
        return (
            f"{count + left_out} samples of {self.length + left_out} cannot be used, more than "
            f"data.max_bad_share = {self.max_share}: mend or remove them, or raise it. "
            f"The first: {self._named()}"
        )

    def _named(self) -> str:
        where = "" if self.file is None else f"; all are in {self.file.path}"
        return ", ".join(told(self.first)) + where


def told(bad: list[Bad]) -> list[str]:
    """The first few bad samples as text: `["2.png (no such file)", ...]`."""
    return [f"{name} ({reason})" for name, reason in bad[:SHOWN]]
