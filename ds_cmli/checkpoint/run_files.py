"""`metrics.jsonl`, its checksums and `config.json`, which a run writes again where they are gone.

Only rank 0 uses this. The checkpoints of a folder that is gone come back with the next one, see
`checkpoints.Checkpoints`.
"""

import os
from pathlib import Path

from ds_cmli.checkpoint import files, lock
from ds_cmli.checkpoint.run_folder import CHECKSUMS, METRICS
from ds_cmli.common import checksums

CONFIG = "config.json"


class RunFiles:
    def __init__(self, folder: Path):
        """`folder`: the run's, in which the files are up to date."""
        self.folder = folder
        names = (METRICS, CHECKSUMS, CONFIG)
        self.contents = {name: bytearray(_read(folder / name)) for name in names}
        self.waiting = b""  # lines that could not be written yet

    def append(self, lines: bytes = b"", to_disk: bool = False) -> list[str]:
        """Write lines, and those that wait; returns what to tell about files written again.

        Raises:
            OSError: nothing could be written, and the lines wait. A line that was written in part
                is removed again.
        """
        self.waiting += lines
        lock.check(self.folder)
        warnings = self._mend()
        # First the checksums: a line without one has been written by another program.
        self._append(CHECKSUMS, checksums.of_lines(self.waiting), to_disk)
        self._append(METRICS, self.waiting, to_disk)
        self.waiting = b""
        return warnings

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
        self.contents[name] += lines

    def _mend(self) -> list[str]:
        """Write again what is missing in the folder. Raises OSError."""
        gone = []
        for name, content in self.contents.items():
            if _size(self.folder / name) < len(content):
                gone.append(name)
        if not gone:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in gone:
            files.publish(self.folder / name, bytes(self.contents[name]))
        place = f"{' and '.join(gone)} in {self.folder}"
        return [f"warning: {place}: removed, renamed or cut off meanwhile, written again"]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _size(path: Path) -> int:
    """The size in bytes; 0 without a file. Raises OSError, also for a folder in its place."""
    try:
        if not path.is_file() and path.exists():
            raise IsADirectoryError(21, "Is a directory", str(path))
        return path.stat().st_size
    except FileNotFoundError:
        return 0
