"""python -m profiling.speed.roofline [--gpu a100] [--dtype bf16] [--lengths full] [--peers] [--json FILE]

What the op's Triton kernels must take on a GPU that need not be here: FLOPs, bytes of DRAM and L2, and instructions
counted in the compiled kernels, each against the GPU's rate; next to it the bare product and autograd on materialised
similarities, the step when only a part of the pairs is kept and, with --peers, the kernels of installed packages. "By
recompute" the forward saves no argmax indices, and those of the kept pairs are found again. The setting is one rank's
block row of the source document, 256 images with 512 texts; `colbert` and `colpali` are `maxsim` of 128 queries of 32
tokens with 128 documents of 180 and 1,030. All of it is computed, nothing measured.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ds_cmli.cmli.triton.backend import Sizes
from ds_cmli.common.cli import run_command
from ds_cmli.common.patches import replaced
from profiling.speed import kernel_work, peers
from profiling.speed.baselines import SETTINGS, text_lengths
from profiling.speed.gpu_rates import EFFICIENCY, GPU, GPUS, Work, at_limits
from profiling.speed.instructions import uncounted
from profiling.speed.kernel_work import DTYPES, Kernels

SIZES = Sizes(I=256, J=512, N=196, M=64, D=256)
# Of `maxsim`, documents as images and queries as texts.
ONE_WAY = {
    "colbert": Sizes(I=128, J=128, N=180, M=32, D=128),
    "colpali": Sizes(I=128, J=128, N=1030, M=32, D=128),
}
KEPT = (1.0, 0.3, 0.1, 0.03)


def bare_product(sizes: Sizes, tokens: int) -> Work:
    """The similarities alone, as a library would multiply them, none stored."""
    patches = sizes.I * sizes.N
    return Work(2 * patches * tokens * sizes.D, 2 * sizes.D * (patches + tokens), 0)


def materialised(sizes: Sizes, passes: int = 11) -> list[Work]:
    """Autograd in 16 bits on stored similarities, padding included.

    They are written by the product, and read twice by products of the backward; between these they pass 11 times: 2 to
    mask them, 2 for the maxima; back, 2 to fill zeros for the maxima's gradients, 2 to scatter into them, 3 to add them.
    In one direction without masks twice: maxima, and zeros.
    """
    positions = sizes.I * sizes.J * sizes.N * sizes.M
    product = Work(2 * positions * sizes.D, 2 * positions, 0)
    return [product, Work(0, 2 * passes * positions, 0), product, product]


def rows(
    name: str, dtype: str, lengths: str, efficiency: float, with_peers: bool, shape: str = "cmli"
) -> list[dict[str, Any]]:
    """The table: a row for each part of a step."""
    gpu, sizes, one_way = GPUS[name], ONE_WAY.get(shape, SIZES), shape in ONE_WAY
    valid = [sizes.M] * sizes.J if one_way else text_lengths(lengths, sizes.J).tolist()
    kernels = Kernels(gpu, dtype, sizes, valid, one_way)
    forward, scores = kernels.forward(), kernels.forward(indices=False)
    parts = {
        "bare product": [bare_product(sizes, sum(valid))],
        "materialised autograd": materialised(sizes, 2 if one_way else 11),
        "forward": [forward],
        "dense backward": [kernels.dense(True), kernels.dense(False)],
        "sparse backward": [work for work in (kernels.sparse(True), kernels.sparse(False)) if work],
    }
    for kept in KEPT[:1] if one_way else KEPT:
        backward = kernels.backward(kept)
        parts[f"step, {kept:.0%} of the pairs kept"] = [forward, *backward]
        parts[f"by recompute, {kept:.0%} kept"] = [scores, kernels.forward(kept), *backward]
    if with_peers:
        parts |= peers.steps(gpu, dtype, sizes, sum(valid), one_way)
    return [row(part, phases, gpu, efficiency) for part, phases in parts.items()]


def row(part: str, phases: list[Work], gpu: GPU, efficiency: float) -> dict[str, Any]:
    """One part of a step, whose phases follow each other."""
    flops, dram, l2, instructions = (sum(amounts) for amounts in zip(*phases, strict=True))
    times = [work.times(gpu) for work in phases]
    most = max(times, key=lambda limits: max(limits.values()))
    least = at_limits(phases, gpu)
    return {
        "part": part,
        "TFLOP": flops / 1e12,
        "DRAM GB": dram / 1e9,
        "L2 GB": l2 / 1e9,
        "1e9 instructions": instructions / 1e9,
        "ms at the limits": least,
        "ms": least / efficiency,
        "binds": max(most, key=lambda limit: most[limit]),
    }


@click.command(help=__doc__)
@click.option("--gpu", "name", default="a100", show_default=True, type=click.Choice(list(GPUS)))
@click.option("--shape", default="cmli", show_default=True, type=click.Choice(["cmli", *ONE_WAY]))
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(list(DTYPES)))
@click.option("--lengths", default="full", show_default=True, type=click.Choice(SETTINGS))
@click.option("--efficiency", default=EFFICIENCY, show_default=True, help="Reached of the limits.")
@click.option("--peers", "with_peers", is_flag=True, help="With kernels of installed packages.")
@click.option("--bytes-only", is_flag=True, help="No instructions: nothing is compiled.")
@click.option("--json", "json_path", metavar="FILE", help="The rows, one object each.")
def command(
    name: str,
    shape: str,
    dtype: str,
    lengths: str,
    efficiency: float,
    with_peers: bool,
    bytes_only: bool,
    json_path: str | None,
) -> None:
    with ExitStack() as stack:
        for module in (kernel_work, peers) if bytes_only else ():
            stack.enter_context(replaced(module, "machine_code", uncounted))
        table = rows(name, dtype, lengths, efficiency, with_peers, shape)
    of = ONE_WAY.get(shape, SIZES)
    sizes = f"{of.I} x {of.J} pairs, {of.N} positions"
    click.echo(f"computed, not measured: {name}, {dtype}, {sizes}, lengths: {lengths}")
    numbers = [key for key in table[0] if key not in ("part", "binds")]
    click.echo(f"{'':30}" + "".join(f"{key:>18}" for key in numbers) + "  what binds")
    for row in table:
        cells = "".join(f"{row[key]:18.3g}" for key in numbers)
        click.echo(f"{row['part']:30}{cells}  {row['binds']}")
    click.echo(f"ms: at {efficiency:.0%} of the limits, an assumption for every row alike")
    if json_path is not None:
        Path(json_path).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    run_command(command)
