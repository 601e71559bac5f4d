"""python -m profiling.speed.cut RUN [--pairs 1024,2048] [--cuts 1e-4,1e-3] [--start] [--cpu] [--json]

A step's losses over pairs with `loss.cmli_cut` and without, on a trained run's features.

Each row compares all pairs of G of the run's training pairs with gradient caching ("cached": the losses and
the gradients of all features), and as one batch ("plain": forward and backward of the all-pairs loss
alone). All are timed in turn in one process, by the wall, or by the processor (`--cpu`), where
other work is on it. `--start` takes the student as it is before training. The kept share and the bound of docs/kernels.md are printed too.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ds_cmli.common import quiet

quiet.silence()

import click
import torch
from torch import Tensor

from ds_cmli import engine
from ds_cmli.cmli import CMLILoss
from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from ds_cmli.data.load import build_data
from ds_cmli.data.loaders import train_loader
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.inference import Model
from ds_cmli.losses.objective import Objective
from ds_cmli.losses.pair_features import CachedStep, PairFeatures
from profiling.scripts import CLOCKS, Clock, compare, listed, prints_json, processor

MICRO_BATCH = 64  # pairs that gradient caching takes at a time
Figures = dict[str, Any]


def loaded(run: str) -> Model:
    """A trained run with a CMLI loss; `UserError` if it has none."""
    model = Model.load(run, "cpu")
    if "cmli" not in model.objective.losses:
        raise UserError(f"{run}: its losses have no 'cmli': give a run that was trained with it")
    return model


def embedded(model: Model, objective: Objective, pairs: int) -> list[PairFeatures]:
    """The features of the first `pairs` of a run's training pairs, in micro-batches."""
    data = build_data(model.config.data, model.config.run.seed)
    sampler = GlobalBatchSampler(len(data.train), MICRO_BATCH, 0, 1, model.config.run.seed)  # type: ignore[arg-type]
    loader = iter(train_loader(data, sampler, 0))
    with torch.no_grad():
        return [objective.embed(next(loader)) for _ in range(pairs // MICRO_BATCH)]


def cached_step(objective: Objective, features: list[PairFeatures]) -> Callable[[], Tensor]:
    """A step's losses over pairs. It writes gradients over the features, so each time over a copy's."""

    def run() -> Tensor:
        own = [copy.deepcopy(feature) for feature in features]
        objective.compare(CachedStep(own, torch.device("cpu")))
        return found(objective.cut)

    return run


def whole(features: list[PairFeatures]) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [B, N, D], tokens [B, M, D] and their mask [B, M] of all micro-batches."""
    longest = max(feature.token_mask.shape[1] for feature in features)

    def padded(x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), longest, *x.shape[2:])
        out[:, : x.shape[1]] = x
        return out

    image = torch.cat([feature.features["patches"] for feature in features])
    text = torch.cat([padded(feature.features["tokens"]) for feature in features])
    return image, text, torch.cat([padded(feature.token_mask) for feature in features])


def plain_step(loss: CMLILoss, features: list[PairFeatures]) -> Callable[[], Tensor]:
    image, text, mask = whole(features)

    def run() -> Tensor:
        loss(image.requires_grad_(), text.requires_grad_(), mask).backward()
        image.grad = text.grad = None
        return found(loss.cut)

    return run


def found(cut: object) -> Tensor:
    """The share of pairs kept, and the bound."""
    return torch.tensor([1.0, 0.0]) if cut is None else cut.found  # type: ignore[attr-defined]


def with_cut(objective: Objective, delta: float) -> Objective:
    """The same student and losses, with another cut."""
    config = replace(objective.config, cmli_cut=delta)
    other = Objective(objective.student, config)
    other.load_state_dict(objective.state_dict(), strict=False)
    return other


def compared(
    kind: str, pairs: int, runs: dict[float, Callable[[], Tensor]], repeats: int, clock: Clock
) -> list[Figures]:
    shares: dict[float, Tensor] = {}

    def noted(delta: float) -> Callable[[], None]:
        return lambda: shares.update({delta: runs[delta]()})

    timed = {delta: noted(delta) for delta in runs}
    # A warm-up of minutes would tell nothing: what is slow at first is over in a second.
    warm_ups = int(pairs <= 1024)
    times, rows = compare(timed, repeats, clock, warm_ups), []
    for delta in runs:
        kept, bound = shares[delta].tolist()
        ratio = statistics.median(a / b for a, b in zip(times[delta], times[0.0], strict=True))
        seconds = statistics.median(times[delta])
        click.echo(
            f"{kind:8}{pairs:>7,}{delta:>9g}{seconds:>10.2f} s{ratio:>8.3f}{kept:>9.1%}{bound:>12.2e}"
        )
        row = {"step": kind, "pairs": pairs, "cut": delta, "seconds": seconds}
        rows.append({**row, "ratio": ratio, "kept": kept, "bound": bound})
    return rows


@click.command(help=(__doc__ or "").split("\n\n")[1])
@click.argument("run")
@click.option("--pairs", default="1024,2048", show_default=True)
@click.option("--cuts", default="1e-4,1e-3", show_default=True, help="Beside 0.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--start", is_flag=True, help="The student before training.")
@click.option("--cpu", is_flag=True, help="Seconds of the processor, not of the wall.")
@prints_json
def command(run: str, pairs: str, cuts: str, repeats: int, start: bool, cpu: bool) -> Figures:
    sizes, deltas = listed("--pairs", pairs, int), [0.0, *listed("--cuts", cuts, float)]
    clock = CLOCKS["cpu" if cpu else "wall"]
    rows = measured(run, sizes, deltas, repeats, start, clock)
    return {"cpu": processor(), "start": start, "rows": rows}


def measured(
    run: str, sizes: list[int], deltas: list[float], repeats: int, start: bool, clock: Clock
) -> list[Figures]:
    """Print the table; the rows are those of `--json`."""
    distributed.init()
    model = loaded(run)
    objective = model.objective
    if start:
        data = build_data(model.config.data, model.config.run.seed)
        objective = engine.build_models(model.config, data.vocab_size)[0].eval()
    scale = objective.scales()["cmli"]
    where = "before training" if start else "trained"
    threads = f"{torch.get_num_threads()} threads"
    click.echo(f"{processor()}, {threads}, {where}, 1/temperature {scale:.1f}")
    click.echo(
        f"{'step':8}{'pairs':>7}{'cut':>9}{'time':>10}  {'ratio':>8}{'kept':>9}{'bound':>12}"
    )
    rows = []
    for pairs in sizes:
        features = embedded(model, objective, pairs)
        cached = {delta: cached_step(with_cut(objective, delta), features) for delta in deltas}
        rows += compared("cached", pairs, cached, repeats, clock)
        losses = {delta: CMLILoss(1 / scale, cut=delta) for delta in deltas}
        plain = {delta: plain_step(loss, features) for delta, loss in losses.items()}
        rows += compared("plain", pairs, plain, repeats, clock)
    distributed.shutdown()
    return rows


if __name__ == "__main__":
    run_command(command)
