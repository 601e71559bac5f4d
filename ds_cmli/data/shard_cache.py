"""Copies of remote shards in a folder of bounded size, fetched before they are read.

The processes of a node share the folder. Readers say by `want` which shards they read soon, and
wait by `get`; one process of the node fetches (`serve`). They talk through small files in
`requests/`, so any process can die at any time:

    NAME.want, NAME.wait  a shard is read soon, or a reader waits for it
    NAME.failed           why there is no copy

fsspec's caching file systems bound no bytes and fetch a file once in each process, so they are not
used; fsspec itself reads the storages. The fetching process is small: torch is not imported here.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import fsspec
from filelock import FileLock, Timeout

from ds_cmli.commands import print_line
from ds_cmli.data.network import DISK_IS_FULL, ask_again, storage_options
from ds_cmli.data.sources.tar_index import index_folder, save_index, scan
from ds_cmli.errors import UserError, blame, one_line
from ds_cmli.files import cache_folder

NUM_FETCHES = 8  # at the same time on a node
RETRY_SECONDS = 75.0  # in which tries begin, below the time after which a rank counts as hung
POLL_SECONDS = 0.05
TOUCH_SECONDS = 5.0  # from one mark of a copy as in use to the next
IN_USE_SECONDS = 60.0  # after such a mark; until then only a shard that is waited for replaces it
FORGET_SECONDS = 60.0  # after which a shard that could not be fetched is tried again
ALONE_SECONDS = 15.0  # after which a reader fetches itself if no process does
LINE_SECONDS = 10.0  # from one line about waiting readers to the next
FETCHING = "from ds_cmli.data.shard_cache import main; main()"
FREE_SPACE = "free some space, lower data.cache_gb, or set DS_CMLI_CACHE"


class Shard(NamedTuple):
    """A file of a storage."""

    url: str  # as fsspec takes it
    size: int | None  # bytes, if known
    num_samples: int = 0  # as its source says, before it is read


class LostShard(ValueError):
    """A shard that does not exist or is damaged: its samples are bad ones.

    Any other failure is a `UserError`: the run ends, saved, and a later start goes on. If these
    samples counted as bad, a start that can fetch the shard would train on others.
    """

    num_samples = 1  # of the shard; `get` sets it


def shards_folder() -> Path:
    return cache_folder() / "shards"


def fetched_bytes() -> int:
    """Return the bytes of all copies, also of unfinished ones: they grow while shards come."""
    total = 0
    for file in [*shards_folder().glob("*.tar"), *shards_folder().glob("*.part")]:
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def opening_progress() -> tuple[int, int]:
    """Return numbers that change while data are opened: bytes of copies, date of indices."""
    folder = index_folder()
    return fetched_bytes(), folder.stat().st_mtime_ns if folder.exists() else 0


class ShardCache:
    """The copies of shards in `shards_folder`.

    Args:
        max_bytes: the size of all copies together; one of unknown size counts when it is fetched.
    """

    def __init__(self, max_bytes: int):
        self.folder = shards_folder()
        self.requests = self.folder / "requests"
        self.max_bytes = max_bytes
        self.touched: dict[Shard, float] = {}
        self.write_error = f"{self.folder} cannot be written: {FREE_SPACE}"
        with blame(self.write_error):
            self.requests.mkdir(parents=True, exist_ok=True)

    def path(self, shard: Shard) -> Path:
        """Return the path of a shard's copy, which may not be there."""
        digest = sha256(f"{shard.size} {shard.url}".encode(errors="surrogatepass")).hexdigest()
        return self.folder / f"{digest[:24]}.tar"

    # --- readers

    def want(self, shards: Iterable[Shard]) -> None:
        """Request shards that are read soon or still; the one requested longest ago goes first."""
        time_now = time.monotonic()
        for shard in shards:
            if time_now - self.touched.get(shard, -TOUCH_SECONDS) < TOUCH_SECONDS:
                continue
            self.touched[shard] = time_now
            try:
                os.utime(self.path(shard))
            except FileNotFoundError:
                if not self._request_file(shard, ".failed").exists():
                    self._write_request(shard, ".want")

    def get(self, shard: Shard) -> Path:
        """Return the path of a shard's copy, after it has been fetched.

        Raises `LostShard` if the shard does not exist or is damaged, else `UserError` if it cannot
        be fetched.
        """
        copy = self.path(shard)
        start = time.monotonic()
        while not copy.exists():
            self._raise_failure(shard)
            self._write_request(shard, ".wait")
            time.sleep(POLL_SECONDS)
            if time.monotonic() - start > ALONE_SECONDS:
                with suppress(Timeout), self.lock().acquire(timeout=0):
                    self.make_room(shard, is_awaited=True)
                    self.fetch(shard)
        return copy

    def _raise_failure(self, shard: Shard) -> None:
        file = self._request_file(shard, ".failed")
        try:
            failure = json.loads(file.read_text())
            age = time.time() - file.stat().st_mtime
        except (FileNotFoundError, json.JSONDecodeError):  # there is none, or it is being written
            return
        if failure["is_lost"]:
            lost = LostShard(failure["reason"])
            lost.num_samples = shard.num_samples
            raise lost
        if age < FORGET_SECONDS:
            raise UserError(failure["reason"])
        file.unlink(missing_ok=True)  # of an earlier start

    def _write_request(self, shard: Shard, suffix: str) -> None:
        file = self._request_file(shard, suffix)
        if not file.exists():
            with blame(self.write_error):
                file.write_text(json.dumps(shard))

    def _request_file(self, shard: Shard, suffix: str) -> Path:
        return self.requests / f"{self.path(shard).stem}{suffix}"

    # --- the process that fetches

    def lock(self) -> FileLock:
        """Return the lock that the fetching process of the node holds."""
        return FileLock(self.folder / "fetching.lock")

    def requested_shards(self) -> Iterator[tuple[Shard, bool]]:
        """Yield requested shards, and whether a reader waits: these first, then the oldest."""
        requests = []
        for file in [*self.requests.glob("*.wait"), *self.requests.glob("*.want")]:
            is_prefetch = file.suffix == ".want"
            with suppress(FileNotFoundError):
                requests.append((is_prefetch, file.stat().st_mtime_ns, file))
        for is_prefetch, _, file in sorted(requests):
            with suppress(FileNotFoundError, json.JSONDecodeError):  # it is being written
                yield Shard(*json.loads(file.read_text())), not is_prefetch

    def make_room(self, shard: Shard, is_awaited: bool, fetching: Iterable[Shard] = ()) -> bool:
        """Return True if there is room for a shard, beside those that are being fetched.

        Deletes the copies that were wanted longest ago. Copies in use are deleted only if a reader
        waits for `shard`. A process that has a deleted copy open can still read it.
        """
        copies = [(file.stat(), file) for file in self.folder.glob("*.tar")]
        copies.sort(key=lambda copy: copy[0].st_mtime)
        reserved_bytes = sum(other.size or 0 for other in fetching)
        used_bytes = reserved_bytes + sum(status.st_size for status, _ in copies)
        excess = used_bytes + (shard.size or 0) - self.max_bytes
        for status, copy in copies:
            is_in_use = time.time() - status.st_mtime < IN_USE_SECONDS
            if excess <= 0 or (is_in_use and not is_awaited):
                break
            copy.unlink()
            copy.with_suffix(".rows").unlink(missing_ok=True)
            excess -= status.st_size
        # A shard that is larger than the bound is fetched alone.
        return excess <= 0 or (is_awaited and not reserved_bytes)

    def fetch(self, shard: Shard) -> None:
        """Fetch a shard for which there is room, or write down why it cannot be fetched."""
        copy = self.path(shard)
        part = copy.with_suffix(".part")
        try:
            if not copy.exists():
                download(shard, part)
                try:
                    rows = scan(part)
                except UserError as error:
                    raise LostShard(str(error).removeprefix(f"{part} is ")) from None
                save_index(rows, copy.with_suffix(".rows"))
                part.replace(copy)
        except Exception as error:
            part.unlink(missing_ok=True)  # first, because the disk may be full
            reason = one_line(error)
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                reason = f"the disk of {self.folder} is full: {FREE_SPACE}"
            failure = {"reason": reason, "is_lost": isinstance(error, LostShard)}
            with blame(self.write_error):
                self._request_file(shard, ".failed").write_text(json.dumps(failure))
        finally:
            for suffix in (".want", ".wait"):
                self._request_file(shard, suffix).unlink(missing_ok=True)


def download(shard: Shard, file: Path) -> None:
    """Fetch a shard into a file; what may be a failure of the network is tried again for a while.

    Raises `LostShard` if the shard does not exist, `UserError` if it cannot be fetched, and
    `OSError` if the file cannot be written.
    """

    def transfer() -> None:
        storage, path = fsspec.url_to_fs(shard.url, **storage_options(shard.url))
        storage.get_file(path, str(file))
        size = file.stat().st_size
        if shard.size not in (None, size):
            raise EOFError(f"it has {size:,} bytes and not {shard.size:,}")

    try:
        ask_again(transfer, f"{shard.url} cannot be fetched", RETRY_SECONDS)
    except FileNotFoundError as error:
        raise LostShard(str(error)) from None


def serve(cache: ShardCache, is_ended: Callable[[], bool]) -> None:
    """Fetch what readers ask for until `is_ended`; print a line while readers wait long."""
    fetching: dict[Shard, Future[None]] = {}
    pool = ThreadPoolExecutor(NUM_FETCHES)
    last_line = time.monotonic()
    while not is_ended():
        for shard in [shard for shard, future in fetching.items() if future.done()]:
            fetching.pop(shard).result()
        num_awaited = 0
        for shard, is_awaited in cache.requested_shards():
            num_awaited += is_awaited
            can_start = shard not in fetching and len(fetching) < NUM_FETCHES
            if can_start and cache.make_room(shard, is_awaited, fetching):
                fetching[shard] = pool.submit(cache.fetch, shard)
        time_now = time.monotonic()
        if not num_awaited:
            last_line = time_now
        elif time_now - last_line > LINE_SECONDS:
            last_line = time_now
            gb_here = fetched_bytes() / 1e9
            print_line(f"data: waiting for {num_awaited} shards, {gb_here:.2f} GB here")
        time.sleep(POLL_SECONDS)


def start_fetching(max_bytes: int) -> None:
    """Start a process that fetches for a node, and ends with this rank, if this is its first."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        subprocess.Popen(
            [sys.executable, "-c", FETCHING, str(max_bytes), str(os.getpid())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the run must not end it before the run ends
        )


def main() -> None:
    """Fetch for this node as long as the parent process lives, after the processes before it."""
    max_bytes, parent = map(int, sys.argv[1:])
    cache = ShardCache(max_bytes)
    # The folder has been deleted, or cannot be written: a reader says so.
    with suppress(FileNotFoundError, UserError):
        while os.getppid() == parent:
            with suppress(Timeout), cache.lock().acquire(timeout=1):
                # Earlier processes have asked for these and not finished them.
                for file in [*cache.requests.iterdir(), *cache.folder.glob("*.part")]:
                    file.unlink(missing_ok=True)
                serve(cache, lambda: os.getppid() != parent)
    os._exit(0)  # without waiting for unfinished transfers
