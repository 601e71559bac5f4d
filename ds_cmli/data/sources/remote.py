"""WebDataset tars in a storage, or on a slow disk, read from copies on this node.

Before the run only names, sizes and numbers of samples are known; a shard is copied and indexed
when its turn comes. URLs are fsspec's: `s3://`, `gs://`, `hf://`, `https://`.
"""

import gc
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from ds_cmli.commands import print_line
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.network import ask_again, storage_options
from ds_cmli.data.order import Order, WindowedOrder
from ds_cmli.data.shard_cache import Shard, ShardCache, shards_folder, start_fetching
from ds_cmli.data.sources import Source
from ds_cmli.data.sources.tar_index import is_damaged, map_rows, read_footer
from ds_cmli.data.sources.tars import Shards, Tars
from ds_cmli.errors import UserError, blame
from ds_cmli.pretrained import fetched_on_this_node

NUM_REQUESTS = 32  # at the same time, about sizes and numbers of samples
LISTING_SECONDS = 15.0  # in which tries of what is read before the run begin
GB = 10**9


def is_url(name: str) -> bool:
    """Return whether a name is that of tars in a storage."""
    return "://" in name and name.endswith(".tar")


def open_remote(name: str, urls: list[str], config: DataConfig) -> dict[str, Source]:
    """Open the tars at the URLs, whose numbers of samples are read from files beside them.

    Raises `UserError` if the storage does not answer, if fsspec's package for it is missing, or if
    there are no numbers.
    """
    with blame(f"data.source is {name!r}, which cannot be read"):
        shards = list_once(name, urls)
    digest = sha256(json.dumps(shards).encode()).hexdigest()
    return {"train": CopiedTars(shards, config, {"shards": digest})}


def open_copied(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open local tars, of which copies are read: `data.cache`."""
    tars = Tars(files, config)
    shards = [
        Shard(str(file.absolute()), file.stat().st_size, index.num_samples)
        for file, index in zip(files, tars.indices, strict=True)
    ]
    return {"train": CopiedTars(shards, config, tars.fingerprint())}


class CopiedTars(Shards):
    """Tars of which copies are read.

    All samples of a shard that does not exist or is damaged are bad ones. If a shard has fewer
    samples than was said, the missing ones are bad; if it has more, the others are left out.
    """

    def __init__(self, shards: list[Shard], config: DataConfig, fingerprint: Mapping[str, object]):
        super().__init__([shard.num_samples for shard in shards], config)
        self.shards = shards
        self.fingerprint_entries = fingerprint
        self.is_remote = is_url(shards[0].url)
        self.cache = ShardCache(int(config.cache_gb * GB))
        start_fetching(self.cache.max_bytes)

    def prefetch(self, indices: np.ndarray) -> None:
        """Have the shards of some samples fetched, which are read soon."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        # In their order, without repeats.
        self.cache.want(self.shards[shard] for shard in dict.fromkeys(numbers.tolist()))

    def name(self, index: int) -> str:
        shard, number = self.place(index)
        return f"{self.shards[shard].url}, sample {number}"

    def fingerprint(self) -> dict[str, object]:
        return {"images": len(self), **self.fingerprint_entries}

    def open_shard(self, shard: int) -> tuple[int, np.ndarray]:
        while True:
            try:
                copy = self.cache.get(self.shards[shard])
                index = read_footer(copy.with_suffix(".rows"))
                if index is None or is_damaged(index):  # both are fetched again
                    copy.unlink()
                    continue
                return os.open(copy, os.O_RDONLY | os.O_CLOEXEC), map_rows(index)
            except FileNotFoundError:  # another shard has just taken its place
                continue


def check_cache(sources: list[Source], order: Order, cache_gb: float) -> None:
    """Raise `UserError` if the copies that a node reads at a time do not fit the cache.

    They are the shards of its ranks' lanes, and one that is fetched.
    """
    copied = [source for source in sources if isinstance(source, CopiedTars)]
    sizes = sorted((shard.size or 0 for tars in copied for shard in tars.shards), reverse=True)
    if isinstance(order, WindowedOrder):
        # Ranks whose numbers are equal modulo this read the same lanes.
        num_groups = math.gcd(order.window, int(os.environ.get("WORLD_SIZE", "1")))
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_lanes = order.window // num_groups * min(num_ranks, num_groups) * len(order.lanes)
        sizes = sizes[: num_lanes + 1]
    needed_gb = sum(sizes) / GB
    if needed_gb > cache_gb:
        reads = f"a node reads {len(sizes):,} shards at a time, {needed_gb:.3g} GB"
        raise UserError(
            f"data.cache_gb is {cache_gb}: {reads}; give as much, or set data.shuffle_window lower"
        )


# --- what is known before the run


def list_once(name: str, urls: list[str]) -> list[Shard]:
    """Return `list_shards`; one rank of a node asks for it, and the others read its answer."""
    digest = sha256(name.encode(errors="surrogatepass")).hexdigest()
    file = shards_folder() / f"{digest[:24]}.listing"
    with fetched_on_this_node(name) as is_listed:
        if not is_listed:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(list_shards(urls)))
            # The file system refers to itself. Its connections are closed now, because a loader
            # process that is forked would share them.
            gc.collect()
        return [Shard(*shard) for shard in json.loads(file.read_text())]


def list_shards(urls: list[str]) -> list[Shard]:
    """Return the shards at the URLs, in which `*` stands for any name.

    Raises `UserError` if none exists, or if their numbers of samples are not given beside them.
    """
    storage, _ = fsspec.url_to_fs(urls[0], skip_instance_cache=True, **storage_options(urls[0]))
    paths: list[str] = []
    for url in urls:
        path = storage._strip_protocol(url)
        paths += sorted(storage.glob(path)) if "*" in url else [path]
    sizes = sizes_of(storage, paths)
    missing = [path for path in paths if sizes[path] is None]
    if len(missing) == len(paths):
        raise UserError(f"none of the {len(paths):,} shards exists: {urls[0]}")
    counts = counts_beside(storage, paths)
    if missing:
        count = f"{len(missing):,} of {len(paths):,} shards do not exist, the first {missing[0]}"
        num_samples = sum(counts.get(path, 0) for path in missing)
        print_line(f"data: {count}: their {num_samples:,} samples count as broken")
    uncounted = [path for path in paths if path not in counts and sizes[path] is not None]
    if uncounted:
        example = '{"00000.tar": 10000, "00001.tar": 9998}'
        files = f"{uncounted[0].removesuffix('.tar')}_stats.json (img2dataset) nor a sizes.json"
        raise UserError(f"no number of samples is given by {files}: write one, as {example}")
    return [
        Shard(storage.unstrip_protocol(path), sizes[path], counts.get(path, 0)) for path in paths
    ]


def sizes_of(storage: Any, paths: list[str]) -> dict[str, int | None]:
    """Return the size in bytes of each file; None of one that does not exist."""
    if "http" in storage.protocol:
        return ask_each(lambda path: storage.info(path)["size"], paths)
    folders = {path.rpartition("/")[0] for path in paths}
    entries = [entry for folder in folders for entry in storage.ls(folder, detail=True)]
    sizes = {entry["name"]: entry["size"] for entry in entries}
    return {path: sizes.get(path) for path in paths}


def counts_beside(storage: Any, paths: list[str]) -> dict[str, int]:
    """Return the number of samples of those shards of which a file beside them gives it.

    It is webdataset's and open_clip's `sizes.json`, or img2dataset's `NAME_stats.json`.
    """
    counts: dict[str, int] = {}
    folders = {path.rpartition("/")[0] for path in paths}
    for folder, sizes in read_each(storage, folders, "/sizes.json").items():
        counts |= {f"{folder}/{name}": int(count) for name, count in sizes.items()}
    stems = [path.removesuffix(".tar") for path in paths if path not in counts]
    for stem, stats in read_each(storage, stems, "_stats.json").items():
        counts[f"{stem}.tar"] = int(stats["successes"])
    return counts


def read_each(storage: Any, stems: Iterable[str], ending: str) -> dict[str, Any]:
    """Return the content of the JSON file STEM + `ending` of each stem that has one."""
    contents = ask_each(lambda stem: storage.cat_file(stem + ending), stems)
    return {stem: json.loads(content) for stem, content in contents.items() if content is not None}


def ask_each(ask: Callable[[str], Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return what a storage answers about each path, after several tries; None: no such file."""

    def answer(path: str) -> Any:
        try:
            return ask_again(lambda: ask(path), f"no answer about {path}", LISTING_SECONDS)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        return dict(zip(paths, pool.map(answer, paths), strict=True))
