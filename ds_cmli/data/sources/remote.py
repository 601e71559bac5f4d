"""Data by name, `hf://datasets/OWNER/NAME`, as local files: fetched once, checked, kept.

One process fetches; those that wait for it take its result, or its error. A record for each name
holds the size, the stamp and the digest of each file. A local copy is taken as it is while its size
and time are those of the record, and compared with the digest otherwise.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ds_cmli.common import checksums
from ds_cmli.common.cache import cache_folder, locked
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError, one_line
from ds_cmli.common.pretrained import loading
from ds_cmli.data.sources.attempts import Pause, of_disk, patiently, refuses, why_of
from ds_cmli.data.sources.hub import START, Hub
from ds_cmli.data.sources.patterns import Count, File, Listing

LOOK_SECONDS, TELL_SECONDS = 0.5, 30  # between two looks at the progress, and two lines of it
AT_ONCE = 8  # files
ENDED = "the process that fetched it was ended"
# Of all files of a name, those that are wanted, in order; the second argument tells whether the
# name is that of a folder, which may hold others. It may raise `UserError`.
Choose = Callable[[list[str], bool], list[str]]
Known = tuple[int, str, str, int]


@dataclass
class Record:
    """What is known of a name, as JSON."""

    revision: str = ""
    paths: list[str] = field(default_factory=list)  # its files in order
    # Local copy -> size and stamp of the server, digest and modification time (ns) of the copy.
    files: dict[str, Known] = field(default_factory=dict)
    error: str = ""  # why not all files are there
    notices: list[str] = field(default_factory=list)  # of the last start

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record in a file; an empty one if that is missing or damaged."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = checksums.read(path)
            del content[checksums.KEY]
            content["files"] = {name: tuple(known) for name, known in content["files"].items()}
            return cls(**content)
        return cls()

    def write(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(checksums.sealed(asdict(self))))
        temporary.replace(path)


def is_remote(name: str) -> bool:
    return name.startswith(START)


def local_copies(name: str, choose: Choose) -> list[Path]:
    """The local copies of the files of a name, which are fetched where they are missing.

    Raises:
        UserError: as `choose`; the name is wrong, its server cannot be reached or refuses, the disk
            is too small, or the content is not what the hub says.
    """
    place = Hub(name)
    home = cache_folder() / "remote" / "records"
    path = home / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    before = _time(path)
    with loading(hub=True), locked(home, f"{path.stem}.lock", f"what is fetched of {name}"):
        record = Record.read(path)
        # Otherwise another process did it, while this one waited.
        if _time(path) == before or record.error == ENDED:
            record.error, record.notices = ENDED, []
            try:
                _Copies(name, place, record, path).update(choose)
                record.error = ""
            except UserError as error:
                record.error = str(error)
            finally:
                record.write(path)
        if record.error:
            raise UserError(record.error)
    say(*record.notices)
    place.revision = record.revision
    return list(map(place.local, record.paths))


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@dataclass
class _Copies:
    """The local copies of a name, brought up to date by the process that holds its lock."""

    name: str
    place: Hub
    record: Record
    path: Path  # the record's

    def update(self, choose: Choose) -> None:
        """Fetch what is missing, and note it in the record. Raises `UserError`."""
        why, place, record = "", self.place, self.record
        try:
            listing = patiently(place.listed, of_network=False)
        except UserError:
            raise
        except Exception as error:  # each library has its own
            why = why_of(error)
            if refuses(error):
                raise UserError(
                    f"data.source is {self.name!r}: its server refuses it ({why}): check the name, "
                    "and whether it needs credentials, such as HF_TOKEN"
                ) from None
            listing = self._without_network(why)
        paths = choose(listing.paths, listing.whole)
        if record.revision and place.revision != record.revision:
            print(f"{self.name} is at revision {place.revision} now, it was at {record.revision}")
        record.paths, record.revision = paths, place.revision
        wanted = list(map(listing.files.__getitem__, paths))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            there = pool.map(self._is_whole, wanted)
            missing = [file for file, is_whole in zip(wanted, there, strict=True) if not is_whole]
        if not why and missing:
            self._fetch(missing)
        elif missing:
            raise UserError(self._unreachable(why, f"{len(missing)} of its files"))
        elif why:
            line = f"{self.name} cannot be reached ({why}): using what is in {place.cache}"
            record.notices.append(line)

    def _without_network(self, why: str) -> Listing:
        """List the files as they were listed last, or else those in the cache."""
        record, place, files = self.record, self.place, {}
        try:
            kept = place.kept()
        except Exception as error:  # it has none, or not all
            if not record.paths:
                raise UserError(self._unreachable(why, "it")) from error
        else:  # another program may have fetched another revision
            if not record.paths or place.revision != record.revision:
                return kept
        place.revision = record.revision
        for path in record.paths:
            local = place.local(path)
            known = record.files.get(str(local))
            if known:
                files[path] = File(path, *known[:2])
            else:  # what is there is whole, and compared with its stamp when there is a network
                files[path] = File(path, local.stat().st_size if local.is_file() else 0)
        return Listing(files, record.paths, False)

    def _unreachable(self, why: str, missing: str) -> str:
        return (
            f"data.source is {self.name!r}: it cannot be reached ({why}), and {self.place.cache} "
            f"does not have {missing}: {self.place.remedy}"
        )

    def _is_whole(self, file: File) -> bool:
        """Whether there is a local copy as it was fetched, which the record then has."""
        path = self.place.local(file.path)
        if not path.is_file():
            return False
        status, known = path.stat(), self.record.files.get(str(path))
        if known is None or (file.stamp and not known[1]):
            if status.st_size != file.size:
                return False
            known = (file.size, file.stamp, self.place.digest(file), status.st_mtime_ns)
            if not self._agrees(file, known[2]):
                return False
        size, stamp, digest, time_then = known
        if status.st_size != size or (
            status.st_mtime_ns != time_then and self.place.digest(file) != digest
        ):
            print(f"{path} has changed since it was fetched", flush=True)
            return False
        self.record.files[str(path)] = (size, stamp, digest, status.st_mtime_ns)
        return True

    def _agrees(self, file: File, digest: str) -> bool:
        return file.stamp in ("", digest)

    def _fetch(self, missing: list[File]) -> None:
        """Fetch files, several at a time; those that are complete stay if one fails."""
        place = self.place
        size = sum(map(place.missing_bytes, missing))
        try:
            place.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_written(error) from None
        free = shutil.disk_usage(place.cache).free
        if size > free:
            raise UserError(
                f"data.source is {self.name!r}: {size / 1e9:.2f} GB are to be fetched to "
                f"{place.cache}, where {free / 1e9:.2f} GB are free: set HF_HOME to a folder "
                "on a larger disk"
            )
        self.record.write(self.path)  # a start without a network then knows what is missing
        line = f"{len(missing)} files of {self.name}, {size / 1e9:.2f} GB"
        print(f"fetching {line}, to {place.cache}", flush=True)
        ended, lock, pool = threading.Event(), threading.Lock(), ThreadPoolExecutor(AT_ONCE)
        bar = tqdm(
            total=size, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
        )

        def count(come: int) -> None:
            if ended.is_set():
                raise RuntimeError("another file could not be fetched")
            with lock:
                bar.n += come

        tasks = {pool.submit(self._one, file, count, ended.wait): file for file in missing}
        waiting, began = set(tasks), time.monotonic()
        printed = began
        try:
            while waiting:
                done, waiting = wait(waiting, LOOK_SECONDS, FIRST_EXCEPTION)
                for task in done:
                    self.record.files[str(place.local(tasks[task].path))] = task.result()
                bar.refresh()
                now = time.monotonic()
                if bar.disable and now - printed > TELL_SECONDS:
                    printed, rate = now, bar.n / (now - began) / 1e6
                    print(f"fetched {bar.n / 1e9:.2f} GB of {line}, at {rate:.1f} MB/s", flush=True)
        finally:
            ended.set()
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)
        print(f"fetched {line}, in {time.monotonic() - began:.0f} s", flush=True)

    def _not_written(self, error: Exception) -> UserError:
        return UserError(
            f"data.source is {self.name!r}: it cannot be written to {self.place.cache} "
            f"({one_line(error)}): set HF_HOME to another folder"
        )

    def _one(self, file: File, count: Count, pause: Pause) -> Known:
        """Fetch a file, once more if its digest is not the hub's; returns what is known of it."""
        path, digest = self.place.local(file.path), ""
        for again in (path.exists(), True):
            try:
                patiently(
                    partial(self.place.fetch, file, again, count),
                    left=partial(self.place.missing_bytes, file),
                    pause=pause,
                )
            except UserError:
                raise
            except Exception as error:  # each library has its own
                if of_disk(error):
                    raise self._not_written(error) from None
                raise UserError(
                    f"data.source is {self.name!r}: {file.path} cannot be fetched "
                    f"({why_of(error)}): start again to go on with what is in {self.place.cache}"
                ) from None
            digest = self.place.digest(file)
            if self._agrees(file, digest):
                return file.size, file.stamp, digest, path.stat().st_mtime_ns
            print(f"{file.path} has come with another checksum than the hub's", flush=True)
        os.remove(os.path.realpath(path))
        raise UserError(
            f"data.source is {self.name!r}: {file.path} came twice with the checksum {digest}, "
            f"and not the hub's {file.stamp}: start again later, or report it to the hub"
        )
