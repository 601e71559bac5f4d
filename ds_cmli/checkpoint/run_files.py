"""`metrics.jsonl` and its checksums. Only rank 0 uses this."""

import os
from pathlib import Path

from ds_cmli.checkpoint import lock
from ds_cmli.checkpoint.run_folder import CHECKSUMS, METRICS
from ds_cmli.common import checksums


class RunFiles:
    def __init__(self, folder: Path):
        self.folder = folder
        self.waiting = b""  # lines that could not be written yet

    def lines(self) -> int:
        """The number of lines in the file."""
        path = self.folder / METRICS
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def append(self, lines: bytes = b"", to_disk: bool = False) -> None:
        """Write lines, and those that wait.

        Raises:
            OSError: nothing could be written, and the lines wait. A line that was written in part
                is removed again.
        """
        self.waiting += lines
        lock.check(self.folder)
        # First the checksums: a line without one has been written by another program.
        self._append(CHECKSUMS, checksums.of_lines(self.waiting), to_disk)
        self._append(METRICS, self.waiting, to_disk)
        self.waiting = b""

    def _append(self, name: str, lines: bytes, to_disk: bool) -> None:
        with open(self.folder / name, "ab", buffering=0) as file:
            # Now the file cannot be one that a later holder of the lock has made.
            lock.check(self.folder)
            end = file.tell()
            try:
                if file.write(lines) != len(lines):
                    raise OSError("no space left on device")
            except OSError:
                file.truncate(end)
                raise
            if to_disk:
                os.fsync(file.fileno())
