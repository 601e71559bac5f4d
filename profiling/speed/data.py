"""python -m profiling.speed.data [--data ...] [--json]

How fast pairs come, compared with how fast pictures are decoded, and how long a training waits for them.

Three tables: decoders on the same JPEGs; pairs per second and loading process, against decoding the
same pictures and nothing else; the share of the trainer's steps spent waiting for the next batch.
The first table is of JPEGs of noise, the others of --data; of the demo, drawing a scene counts as
decoding.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
import torch
from PIL import Image, ImageOps

from ds_cmli.common.cli import run_command
from ds_cmli.config.options import WHAT, add
from ds_cmli.data.batch import Batch
from ds_cmli.data.load import Data
from ds_cmli.data.pairs import TrainPairs
from ds_cmli.data.pictures import decode
from ds_cmli.data.sampler import Draw
from ds_cmli.data.transforms import Framing
from profiling.scripts import prints_json, to_the_end
from profiling.speed.step import Training

PICTURES = 40  # of the table of decoders, of each size
SIZES = ((500, 375), (1024, 768), (2048, 1536))


def noise(width: int, height: int, seed: int) -> bytes:
    """A JPEG of coarse and fine noise: about as many bytes as a photograph of this size."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    picture = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    ).astype(np.int16)
    picture = (picture + draw.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=85)
    return file.getvalue()


def decoders(size: int) -> dict[str, Callable[[bytes], Any]]:
    """From a JPEG's bytes to its central square of `size` pixels."""

    def fit(picture: Image.Image) -> np.ndarray:
        return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))

    def torchvision_io(content: bytes) -> torch.Tensor:
        from torchvision.io import decode_jpeg
        from torchvision.transforms.v2 import functional as F

        image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        side = min(image.shape[1:])
        return F.resize(
            F.center_crop(image, [side, side]), [size, size], F.InterpolationMode.BICUBIC
        )

    found: dict[str, Callable[[bytes], Any]] = {
        "Pillow, whole": lambda content: fit(Image.open(io.BytesIO(content)).convert("RGB")),
        "torchvision.io, whole": torchvision_io,
        "ours: Pillow reduced, torch's resize": lambda content: decode(
            content, Framing(size), 10**9
        ),
    }
    try:
        import simplejpeg
    except ImportError:
        return found
    reduced = {"min_height": 2 * size, "min_width": 2 * size}
    found["simplejpeg, reduced"] = lambda content: fit(
        Image.fromarray(simplejpeg.decode_jpeg(content, **reduced))
    )
    return found


def decoder_table(size: int) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU a picture: {decoder: {"500x375": ms}}."""
    out: dict[str, dict[str, float]] = {}
    for width, height in SIZES:
        contents = [noise(width, height, seed) for seed in range(PICTURES // 8)]
        for name, function in decoders(size).items():
            times = []
            for content in [contents[0], *contents * 8]:
                started = time.process_time()
                function(content)
                times.append(time.process_time() - started)
            out.setdefault(name, {})[f"{width}x{height}"] = round(
                statistics.median(times[1:]) * 1e3, 2
            )
    return out


def bare(data: Data, draws: list[Draw]) -> tuple[float, float]:
    """Pictures decoded in a second, and in a second of CPU time, by this process, and nothing
    else done.
    """
    pairs, started, used = data.train, time.perf_counter(), time.process_time()
    for draw in draws:
        if isinstance(pairs, TrainPairs):
            pairs.pictures.image(draw.sample)
        else:
            pairs[draw]
    return len(draws) / (time.perf_counter() - started), len(draws) / (time.process_time() - used)


def loaded(training: Training, workers: int, batches: int) -> tuple[float, float]:
    """Pairs in a second out of the loader, in its steady state, and in a second of this
    process's CPU time.
    """
    sampler = training.sampler()
    loader = training.loader(sampler, workers)
    for _ in range(2 + workers * training.config.data.prefetch):
        next(loader)  # those prepared while the processes started
    started, used = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(loader)
    pairs = batches * sampler.micro_batch
    return pairs / (time.perf_counter() - started), pairs / (time.process_time() - used)


def waiting(
    step: Callable[[Batch], None], loader: Iterator[Batch], steps: int
) -> tuple[float, float]:
    """Seconds of a step, and the share of it spent waiting for its batch, over `steps` after the
    first two.
    """
    taken, waited = 0.0, 0.0
    for number in range(-2, steps):
        started = time.perf_counter()
        batch = next(loader)
        ready = time.perf_counter()
        step(batch)
        if number >= 0:
            waited += ready - started
            taken += time.perf_counter() - started
    return taken / steps, waited / taken


@click.command(help=(__doc__ or "").split("\n\n")[1])
@add(*WHAT)
@click.option("--batches", type=click.IntRange(1), default=10, show_default=True,
              help="Measured of each loader.")  # fmt: skip
@click.option("--train-steps", type=click.IntRange(0), default=10, show_default=True,
              help="0: without the last table.")  # fmt: skip
@prints_json
def command(preset, deepspeed_config, settings, batches, train_steps, **options) -> dict[str, Any]:
    with Training.of(preset, deepspeed_config, settings, options) as training:
        return measured(training, batches, train_steps)


def measured(training: Training, batches: int, train_steps: int) -> dict[str, Any]:
    """Print the tables; the figures are those of `--json`."""
    config, data = training.config, training.data
    found: dict[str, Any] = {
        "image_size": config.data.image_size,
        "threads": torch.get_num_threads(),
    }

    found["decoders_ms"] = decoder_table(config.data.image_size)
    click.echo(f"ms of CPU a JPEG, to {config.data.image_size} pixels square")
    click.echo(f"  {'':40}" + "".join(f"{f'{w}x{h}':>12}" for w, h in SIZES))
    for name, times in found["decoders_ms"].items():
        click.echo(f"  {name:40}" + "".join(f"{ms:>12.2f}" for ms in times.values()))

    sampler = training.sampler()
    order = iter(sampler)
    by_wall, by_cpu = bare(data, [draw for _ in range(batches) for draw in next(order)])
    found |= {"bare_per_s": by_wall, "bare_per_cpu_s": by_cpu}
    click.echo(f"pairs/s of {config.data.source}, and per second of CPU time")
    click.echo(f"  decoding alone      {by_wall:>8.0f} {by_cpu:>8.0f}")
    for workers in (0, 1, 2):
        rate, per_cpu = loaded(training, workers, batches)
        found[f"loader_{workers}_per_s"] = rate
        line = f"  {workers} loading processes {rate:>8.0f}"
        if workers:
            click.echo(f"{line} {'':8} ({rate / workers / by_wall:.2f} of decoding alone, each)")
        else:
            found["loader_0_per_cpu_s"] = per_cpu
            click.echo(f"{line} {per_cpu:>8.0f} ({per_cpu / by_cpu:.2f} of decoding alone)")

    if train_steps:
        step = to_the_end(training.step(), training.device)
        for workers in (0, 1):
            seconds, share = waiting(step, training.loader(sampler, workers), train_steps)
            found |= {f"step_{workers}_s": seconds, f"waiting_{workers}": share}
            click.echo(
                f"  {workers} loading processes: a step takes {seconds:.3f} s, {share:.2%} of it waiting for its batch"
            )
    return found


if __name__ == "__main__":
    run_command(command)
