"""python -m profiling.speed.search --model RUN [--images 20000] [--json]

What search in an index costs and finds: an index of scenes of the demo, embedded by a run's
student, is searched by captions of some of them. Beside the best by global score, which CMLI
orders, stands the exact search, which scores every picture by CMLI: time of a query, memory that it
adds, and how many of the exact search's results it has.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ds_cmli.common import quiet
from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from profiling.scripts import prints_json

CANDIDATES = (10, 50, 200, 1000)
K = 10  # results of a query
SEED = 1  # of the scenes, which no training with the default seed has seen


class Scenes(Sequence):
    """Pictures drawn when they are needed, uint8 [3, S, S]."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self.dataset.pair(at).image

    def caption(self, at: int) -> str:
        tokens = self.dataset.pair(at).tokens
        ids = [i for i, valid in zip(tokens.input_ids, tokens.valid, strict=True) if valid]
        return self.dataset.tokenizer.decode(ids)


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, what it holds now, or VmHWM, the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"this system does not tell {field} of a process: run it on Linux")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def searched(
    folder: Path, model: Any, texts: list[str], candidates: int
) -> tuple[dict[str, float], list[list[str]]]:
    """Milliseconds of a query, median and slowest, and the bytes that searching added; names of
    each one's results.
    """
    from ds_cmli.inference import Index

    index = Index(folder)  # anew, so that nothing of it is in this process's memory yet
    before, names, times = memory("VmRSS"), [], []
    forget_peak()
    for text in texts:
        started = time.perf_counter()
        (results,) = index.search(model, text, K, candidates)
        times.append(1000 * (time.perf_counter() - started))
        names.append([result.name for result in results])
    figures = {"median_ms": statistics.median(times), "slowest_ms": max(times)}
    return figures | {"memory_bytes": max(0, memory("VmHWM") - before)}, names


def recall(names: list[list[str]], exact: list[list[str]], k: int) -> float:
    """The share of the exact search's first k results that are among this one's first k."""
    shares = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(names, exact, strict=True)]
    return statistics.mean(shares)


@click.command()
@click.option("--model", "model_path", required=True, metavar="RUN", help="A run's folder.")
@click.option("--images", default=20_000, show_default=True, type=click.IntRange(K),
              help="Pictures in the index.")  # fmt: skip
@click.option("--queries", default=50, show_default=True, type=click.IntRange(1),
              help="Captions to search for.")  # fmt: skip
@prints_json
def command(model_path: str, images: int, queries: int) -> dict[str, Any]:
    """Measure search in an index of pictures: time, memory, and recall against exact CMLI."""
    quiet.silence()
    import torch

    from ds_cmli.data import assets
    from ds_cmli.data.demo_pictures import DemoPictures
    from ds_cmli.data.scenes import Scenes as Drawn
    from ds_cmli.inference import Index, Model

    model = Model.load(model_path)
    assets.fetch(["pictures"])
    size = model.image_size
    scenes = Scenes(Drawn("train", SEED, images, DemoPictures(size), model.tokenizer))
    chosen = range(0, images, max(1, images // queries))[:queries]
    texts = [scenes.caption(i) for i in chosen]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        index, _ = Index.build(folder, model, scenes, model_path, progress=True)
        built = {"images": len(index), "build_s": time.perf_counter() - started}
        built["index_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        del index
        threads = torch.get_num_threads()
        cost = f"{built['build_s']:.0f} s with {threads} threads, {built['index_bytes'] / 1e6:.0f} MB on disk"
        click.echo(f"{images} pictures of {size} pixels: {cost}")
        searched(folder, model, texts[:1], images)  # so that every file has been read once
        rows: dict[str, dict[str, float]] = {}
        results: dict[str, list[list[str]]] = {}
        for candidates in [c for c in CANDIDATES if c < images] + [images]:
            row = "exact" if candidates == images else str(candidates)
            rows[row], results[row] = searched(folder, model, texts, candidates)
    shares = f"recall@1  recall@{K}  own picture first"
    click.echo(f"{'candidates':>10}  {'median':>9}  {'slowest':>9}  {'memory':>8}  {shares}")
    for row, values in rows.items():
        values["recall_1"] = recall(results[row], results["exact"], 1)
        values[f"recall_{K}"] = recall(results[row], results["exact"], K)
        first = [names[0] == str(i) for names, i in zip(results[row], chosen, strict=True)]
        values["own_first"] = statistics.mean(first)
        cost = f"{values['median_ms']:6.1f} ms  {values['slowest_ms']:6.1f} ms  {values['memory_bytes'] / 1e6:5.0f} MB"
        share = (
            f"{values['recall_1']:8.3f}  {values[f'recall_{K}']:9.3f}  {values['own_first']:17.3f}"
        )
        click.echo(f"{row:>10}  {cost}  {share}")
    return {**built, "queries": len(texts), "threads": threads, "rows": rows}


if __name__ == "__main__":
    run_command(command)
