"""python -m profiling.speed.data {sizes,shuffle,images}

sizes: seconds and memory of an epoch's order, by the number of samples.
shuffle: how many shards a batch mixes, beside a full permutation and webdataset's buffer.
images: images a second of CPU from local tars, from HTTP, and by webdataset from the same server.
"""

import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ds_cmli.libraries import silence

silence()

import click
import numpy as np
from PIL import Image

from ds_cmli.config.presets import load_preset
from ds_cmli.data.build import build_data
from ds_cmli.data.order import FullOrder, Order, WindowedOrder
from ds_cmli.data.pairs import loader
from ds_cmli.data.sampler import GlobalBatchSampler
from profiling.speed import storage_server

SHARD = 10_000  # samples
BATCH = 256
BUFFER = 5_000  # samples of webdataset's shuffle


@click.group()
def command() -> None:
    """Measure where samples come from."""


# --- sizes


@command.command()
@click.argument("counts", nargs=-1, type=float)
def sizes(counts: tuple[float, ...]) -> None:
    """Print seconds to the first batch of an epoch and of a resume in mid-epoch, and memory."""
    print(
        f"{'samples':>8} {'order':9} {'start s':>8} {'resume s':>9} {'us/sample':>10} {'MB':>7} {'B/sample':>9}"
    )
    for count in map(int, counts or (1e5, 1e6, 1e7, 1e8, 1e9)):
        for name in ("windowed", "full") if count <= 1e8 else ("windowed",):
            # Each in a process of its own, whose peak of memory is its own.
            row = subprocess.check_output(
                [sys.executable, "-m", __spec__.name, "size", name, str(count)]
            )
            print(f"{count:8.0e} {name:9} {row.decode().strip()}", flush=True)


@command.command(hidden=True)
@click.argument("name")
@click.argument("count", type=int)
def size(name: str, count: int) -> None:
    """Print a row of `sizes`."""
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    order: Order = FullOrder([count])
    if name == "windowed":
        order = WindowedOrder([np.full(count // SHARD, SHARD)], 64)
    sampler = GlobalBatchSampler(order, BATCH, 0, 8, 0)
    next(iter(sampler))
    first = time.process_time()
    sampler.epoch = 1
    sampler.position = count // 2 // sampler.global_batch * sampler.global_batch
    batches = iter(sampler)
    next(batches)
    resumed = time.process_time()
    num_batches = min(50, sampler.batches_per_epoch // 4)
    for _ in range(num_batches):
        next(batches)
    done = time.process_time()
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle)
    microseconds = (done - resumed) / max(1, num_batches) / BATCH * 1e6
    print(
        f"{first - start:8.2f} {resumed - first:9.2f} {microseconds:10.2f} {peak / 1e6:7.0f} {peak / count:9.3f}"
    )


# --- shuffle


@command.command()
@click.option("--shards", default=1000, show_default=True)
def shuffle(shards: int) -> None:
    """Print the distinct shards of a batch, and how alike the shards of neighbours are."""
    shard_sizes = np.full(shards, SHARD - 1000)
    num_samples = int(shard_sizes.sum())
    rows: dict[str, Callable[[], np.ndarray]] = {"full": lambda: of_order(FullOrder([num_samples]))}
    for window in (1, 16, 64, 256):
        order = WindowedOrder([shard_sizes], window)
        rows[f"windowed, {window} shards"] = partial(of_order, order)
    rows[f"webdataset, buffer of {BUFFER}"] = lambda: of_buffer(shards)
    print(f"{'order':28} {'of 256':>7} {'of 4096':>8} {'correlation':>12}")
    for name, shards_in_order in rows.items():
        shard_of = shards_in_order()
        batch_shards, global_batch_shards = (
            np.mean([len(set(shard_of[i : i + n])) for i in range(0, len(shard_of) - n + 1, n)])
            for n in (256, 4096)
        )
        correlation = np.corrcoef(shard_of[:-1], shard_of[1:])[0, 1]
        print(f"{name:28} {batch_shards:7.1f} {global_batch_shards:8.1f} {correlation:12.3f}")


def of_order(order: Order, count: int = 400_000) -> np.ndarray:
    """Return the shard of each of the first positions, int64 [count]."""
    return order.samples(np.arange(count), 0, 0).indices // (SHARD - 1000)


def of_buffer(num_shards: int, count: int = 400_000) -> np.ndarray:
    """Return the same of webdataset's own shuffles of shards and of samples, in one process."""
    from webdataset.filters import shuffle as shuffled

    shards = list(range(num_shards))
    random.Random(0).shuffle(shards)
    samples = (shard for shard in shards for _ in range(SHARD - 1000))
    buffered = shuffled(BUFFER, rng=random.Random(0))(samples)
    return np.fromiter((next(buffered) for _ in range(count)), np.int64, count)


# --- images


@command.command()
@click.option("--shards", default=8, show_default=True)
@click.option("--samples", default=500, show_default=True, help="Of each shard.")
@click.option("--latency", default=0.05, show_default=True, help="Seconds of the server.")
def images(shards: int, samples: int, latency: float) -> None:
    """Print images a second, and a second of this process's CPU, of one epoch each."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ["DS_CMLI_CACHE"] = str(folder / "cache")
        make_shards(folder, shards, samples)
        pattern = f"{{0..{shards - 1}}}.tar"
        with storage_server.http(folder, latency, failures=0.01) as server:
            rows = {
                "local tars, full order": lambda: ours(f"{folder}/{pattern}", 0),
                "local tars, windowed": lambda: ours(f"{folder}/{pattern}", 4),
                "HTTP, first epoch": lambda: ours(f"{server.url}/{pattern}", 4),
                "HTTP, copies are here": lambda: ours(f"{server.url}/{pattern}", 4),
                "webdataset, pipe:curl": lambda: by_webdataset(f"{server.url}/{pattern}"),
            }
            print(f"{'':24} {'images/s':>9} {'images/CPU s':>13}")
            for row, epoch in rows.items():
                started = time.perf_counter()
                cpu_started = time.process_time()
                count = sum(epoch())
                seconds = time.perf_counter() - started
                cpu_seconds = time.process_time() - cpu_started
                print(f"{row:24} {count / seconds:9.0f} {count / cpu_seconds:13.0f}", flush=True)


def make_shards(folder: Path, shards: int, samples: int) -> None:
    """Write tars of JPEG pictures of 256 pixels, some 25 kB each, and their captions."""
    chance = np.random.default_rng(0)
    contents = []
    for _ in range(50):
        coarse = Image.fromarray(chance.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        coarse.resize((256, 256)).save(file := io.BytesIO(), "jpeg", quality=90)
        contents.append(file.getvalue())
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(samples):
                for ending, content in (("jpg", contents[number % 50]), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    counts = {f"{shard}.tar": samples for shard in range(shards)}
    (folder / "sizes.json").write_text(json.dumps(counts))


def ours(source: str, window: int) -> Iterator[int]:
    """Yield the sizes of the batches of one epoch, as training gets them."""
    settings = {"source": source, "tokenizer": "builtin", "shuffle_window": window, "held_out": 1}
    settings |= {"image_size": 224, "resize": "shortest"}
    data = build_data(load_preset("tiny", {"data": settings}).data, 0)
    sampler = GlobalBatchSampler(data.order, BATCH, 0, 1, 0)
    batches = iter(loader(data.train, data.collate, 0, batch_sampler=sampler))
    for _ in range(sampler.batches_per_epoch):
        yield len(next(batches).image)


def by_webdataset(source: str) -> Iterator[int]:
    """Yield the same of a pipeline as open_clip's: shuffled by buffers, decoded by Pillow."""
    import webdataset
    from torchvision import transforms

    view = transforms.Compose(
        [transforms.Resize(224, 3), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(f"pipe:curl -s {source}"),
        webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue),
        webdataset.shuffle(BUFFER, initial=1000),
        webdataset.decode("pilrgb"),
        webdataset.to_tuple("jpg", "txt"),
        webdataset.map_tuple(view, str),
        webdataset.batched(BATCH, partial=False),
    )
    for pictures, _ in pipeline:
        yield len(pictures)


if __name__ == "__main__":
    command()
