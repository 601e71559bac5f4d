"""`bad.jsonl` in a run's folder: each sample that was skipped, once, and why."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ds_cmli.common.cli import say
from ds_cmli.data.bad import Bad

NAME = "bad.jsonl"
AT_LOAD, IN_TRAINING, IN_EVALUATION = "load", "training", "evaluation"


class BadFile:
    """Appends `{"name", "reason", "when"}` lines; `when` is "load", "training" or "evaluation".

    A resumed run adds what it had not met before. Where the file cannot be written, lines wait in
    memory and the user is told once.
    """

    def __init__(self, path: Path, at_load: Iterable[Bad]):
        self.path, self.waiting, self.told = path, "", False
        self.at_load = set(at_load)
        self.known: set[tuple[str, ...]] | None = (
            None  # read at the first use: until then a run may be put aside
        )
        self.loaded = list(at_load)

    def write(self, bad: Iterable[Bad], when: str) -> None:
        """Add those samples that are not in the file."""
        if self.known is None:
            self._begin()
        assert self.known is not None
        for name, reason in bad:
            if (name, reason, when) not in self.known and (name, reason) not in self.at_load:
                self.known.add((name, reason, when))
                self.waiting += _line(name, reason, when)
        if self.waiting:
            self._flush()

    def _begin(self) -> None:
        """Read what an earlier start has met, and renew what is left out at load, which can be something else now."""
        lines = []
        with suppress(OSError):
            lines = self.path.read_bytes().decode(errors="replace").splitlines()
        met = [
            found for line in lines if (found := _parsed(line)) is not None and found[2] != AT_LOAD
        ]
        self.known = set(met)
        left_out = "".join(_line(*item, AT_LOAD) for item in self.loaded)
        content = left_out + "".join(_line(*found) for found in met)
        if not content and not lines:
            return
        beside = self.path.with_name(NAME + ".writing")
        try:
            beside.write_text(content, encoding="utf-8")
            os.replace(beside, self.path)
        except OSError as error:
            self.waiting = left_out
            self._tell(error)

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


def _line(name: str, reason: str, when: str) -> str:
    return json.dumps({"name": name, "reason": reason, "when": when}) + "\n"


def _parsed(line: str) -> tuple[str, str, str] | None:
    """The sample of a line; None if the line is damaged."""
    try:
        values = json.loads(line)
        return str(values["name"]), str(values["reason"]), str(values["when"])
    except (ValueError, KeyError, TypeError):
        return None
