"""python -m profiling.speed.exchange [--ranks 4] [--dtype bf16]

Gathered texts and texts that go round, in the all-pairs CMLI scores over real gloo ranks on this
CPU: the most bytes that one forward and backward pass takes on rank 0 beyond its inputs, the bytes
that it sends, and its time.

Shapes: image [B, N, D], text [B, M, D] of each rank.
"""

import os
import time
from itertools import accumulate

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ds_cmli.common import quiet

quiet.silence()

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ds_cmli.cmli.loss import score_global_batch
from ds_cmli.cmli.ring import Scorer
from ds_cmli.common.cli import run_command
from ds_cmli.distributed.traffic import Traffic
from profiling.memory.measure_cpu import allocator_events
from profiling.speed.baselines import DTYPES

EXCHANGES = ("gather", "ring")
SCRATCH = 2**20  # bytes of the op's tiles: little, so that what the exchange takes is seen


def one_rank(
    rank: int, ranks: int, file: str, shape: tuple[int, ...], dtype: str, results: dict
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    B, N, M, D = shape
    generator = torch.Generator().manual_seed(rank)
    image = torch.randn(B, N, D, generator=generator).to(DTYPES[dtype]).requires_grad_()
    text = torch.randn(B, M, D, generator=generator).to(DTYPES[dtype]).requires_grad_()
    mask = torch.arange(M) < torch.randint(1, M + 1, (B,), generator=generator)[:, None]
    weights = [torch.randn(B, B * ranks, generator=generator) for _ in range(2)]
    for exchange in EXCHANGES:
        score = Scorer(backend="chunked", scratch_bytes=SCRATCH, recompute=True, exchange=exchange)

        def step(enter=None, score=score):
            s_i2t, s_t2i = score_global_batch(image, text, mask, score=score)
            loss = (s_i2t * weights[0] + s_t2i * weights[1]).sum()
            return torch.autograd.grad(loss, (image, text))

        gradients = step()
        with Traffic().counting() as traffic:
            step()
        dist.barrier()
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        peak = max(accumulate(size for _, size in allocator_events(step)))
        results[exchange, rank] = peak, traffic.sent(ranks), seconds, gradients
    dist.destroy_process_group()


@click.command(help=__doc__)
@click.option("--ranks", default=4, show_default=True)
@click.option(
    "--shape", default=(32, 49, 64, 128), show_default=True, type=(int,) * 4, help="B N M D"
)
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(list(DTYPES)))
def main(ranks: int, shape: tuple[int, ...], dtype: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(one_rank, (ranks, f"{folder}/store", shape, dtype, results), nprocs=ranks)
        figures = dict(results)
    B, N, M, D = shape
    print(f"{ranks} ranks, B={B} N={N} M={M} D={D}, {dtype}; rank 0, forward and backward")
    print(f"{'exchange':10}{'peak bytes':>14}{'bytes sent':>14}{'seconds':>9}")
    for exchange in EXCHANGES:
        peak, sent, seconds, _ = figures[exchange, 0]
        print(f"{exchange:10}{peak:14,}{sent:14,}{seconds:9.2f}")
    pairs = [zip(figures["gather", r][3], figures["ring", r][3], strict=True) for r in range(ranks)]
    worst = max(((b - a).norm() / a.norm()).item() for rank in pairs for a, b in rank)
    print(f"largest relative difference of a gradient: {worst:.1e}")


if __name__ == "__main__":
    run_command(main)
