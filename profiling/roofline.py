"""python profiling/roofline.py [--gpu a100] [--dtype bf16] [--lengths full] [--json FILE]

What the op's Triton kernels must take on a GPU that need not be here: FLOPs, bytes of DRAM and L2, and instructions
counted in the compiled kernels, each against the GPU's rate; beside it the bare product and autograd on materialised
similarities, and the step when only a part of the pairs is kept. The setting is one rank's block row of the source
document, 256 images with 512 texts. All of it is computed, nothing measured.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by its path: not this folder, but the repository is searched first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import math
from typing import Any, NamedTuple

import click

from ds_cmli.common.cli import run_command

I, J, N, M, D = 256, 512, 196, 64, 256  # noqa: E741  # images, texts, patches, positions, features
KEPT = (1.0, 0.3, 0.1, 0.03)


class GPU(NamedTuple):
    """Rates a second, of the manufacturer's whitepapers; those of L2 were measured by others, and are assumed here."""

    capability: int
    shared: int  # bytes of shared memory of a block
    flops: float  # 16-bit products with fp32 sums, dense
    dram: float  # bytes
    l2: float
    instructions: float  # warp instructions: four of each multiprocessor and cycle


GPUS = {
    "rtx3090": GPU(86, 99 * 1024, 71e12, 936e9, 2.0e12, 82 * 4 * 1.695e9),
    "rtx4090": GPU(89, 99 * 1024, 165e12, 1008e9, 4.0e12, 128 * 4 * 2.52e9),
    "a100": GPU(80, 163 * 1024, 312e12, 2039e9, 4.5e12, 108 * 4 * 1.41e9),
    "h100": GPU(90, 227 * 1024, 989e12, 3350e9, 5.6e12, 132 * 4 * 1.755e9),
}


class Work(NamedTuple):
    """What kernels do that run beside each other."""

    flops: float
    dram: float
    l2: float
    instructions: float = 0.0

    def times(self, gpu: GPU) -> dict[str, float]:
        """Milliseconds that each limit allows at best; the largest is the time at the limits."""
        rates = (gpu.flops, gpu.dram, gpu.l2, gpu.instructions)
        names = ("tensor cores", "DRAM", "L2", "instructions")
        return {
            name: 1e3 * amount / rate for name, amount, rate in zip(names, self, rates, strict=True)
        }


class Kernels:
    """The op's kernels compiled for one GPU and dtype, and what they do for texts of given lengths."""

    def __init__(self, gpu: GPU, dtype: str, lengths: list[int]):
        import torch

        self.gpu, self.lengths, self.name = gpu, lengths, dtype
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        self.tokens = sum(lengths)

    def machine(
        self, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
    ) -> Any:
        from profiling.instructions import machine_code

        given = (tuple(types.items()), tuple(constants.items()))
        return machine_code(kernel, *given, self.gpu.capability, warps, stages)

    def forward(self) -> Work:
        """All scores and the argmax indices."""
        from ds_cmli.cmli.triton.backend import TEXTS_PER_PROGRAM
        from ds_cmli.cmli.triton.forward_kernel import forward_kernel
        from ds_cmli.cmli.triton.tiles import forward_tiles

        tiles = forward_tiles(N, M, D, self.dtype, divmod(self.gpu.capability, 10), self.gpu.shared)
        blocks, groups = math.ceil(N / tiles.rows), math.ceil(J / TEXTS_PER_PROGRAM)
        types = dict.fromkeys(("s_i2t", "s_t2i"), "fp32") | dict.fromkeys(
            ("image", "text"), self.name
        )
        types |= dict.fromkeys(("arg_i2t", "arg_t2i"), "u8") | dict.fromkeys(
            ("image_mask", "token_mask"), "i16"
        )
        types |= dict.fromkeys(("image_count", "text_count", "first", "code"), "i32") | {
            "suspect": "i1"
        }
        instructions = flops = l2 = below = 0.0
        for width in tiles.tokens:
            of_width = [
                n for n in self.lengths if n > below and (n <= width or width == tiles.tokens[-1])
            ]
            below = width
            steps = sum(math.ceil(n / width) for n in of_width)
            constants = {
                "D": D,
                "ROWS": tiles.rows,
                "TOKENS": width,
                "BD": tiles.features,
                "BLOCKS": blocks,
            }
            constants |= {"MASKED": False, "SAVE": True, "STAGES": tiles.stages}
            machine = self.machine(forward_kernel, types, constants, tiles.warps, tiles.stages)
            programs = I * blocks * groups
            instructions += (
                tiles.warps * programs * machine.executed([steps / groups] * len(machine.loops))
            )
            flops += 2 * I * blocks * tiles.rows * steps * width * D
            l2 += 2 * D * (programs * tiles.rows + I * blocks * steps * width)
        indices = I * J * (N + M)
        return Work(
            flops, 2 * D * (I * N + J * M) + indices + 8 * I * J, l2 + indices, instructions
        )

    def dense(self, of_image: bool) -> Work:
        """One side's gradient by the dense kernel."""
        from ds_cmli.cmli.triton.backward_kernel import gradient_kernel
        from ds_cmli.cmli.triton.tiles import backward_tiles

        capability = divmod(self.gpu.capability, 10)
        tiles = backward_tiles(D, self.dtype, capability, M if of_image else N)
        row_lengths, step_lengths = [N] * I, self.lengths
        if not of_image:
            row_lengths, step_lengths = step_lengths, row_lengths
        rows = sum(16 * math.ceil(n / 16) for n in row_lengths)
        long = sum(n // tiles.step + (n % tiles.step > 16) for n in step_lengths)
        short = sum(0 < n % tiles.step <= 16 for n in step_lengths)
        types = dict.fromkeys(("out", "source"), self.name) | dict.fromkeys(
            ("p_win", "q_win"), "u8"
        )
        types |= dict.fromkeys(("p_mask", "q_mask"), "i16")
        types |= dict.fromkeys(("scale", "p_grad", "q_weight"), "fp32") | {
            "sparse": "i32",
            "p_count": "i32",
        }
        types |= {
            f"{list_}_{part}": "i32"
            for list_ in ("p", "long", "short")
            for part in ("code", "first")
        }
        two_terms = self.name == "bf16"
        constants = {
            "D": D,
            "BD": tiles.features,
            "ROWS": tiles.rows,
            "LONG": tiles.step,
            "P_MASKED": not of_image,
        }
        constants |= {"Q_MASKED": of_image, "TWO_TERMS": two_terms, "STAGES": tiles.stages}
        machine = self.machine(gradient_kernel, types, constants, tiles.warps, tiles.stages)
        programs = rows / tiles.rows * D / tiles.features
        positions = long * tiles.step + short * 16
        flops = 2 * rows * positions * D * (1 + two_terms)
        l2 = programs * positions * tiles.features * 2 + I * J * (N + M) * D / tiles.features
        dram = 2 * D * (
            2 * len(row_lengths) * (N if of_image else M) + sum(step_lengths)
        ) + I * J * (N + M)
        return Work(flops, dram, l2, tiles.warps * programs * machine.executed([long, short]))

    def sparse(self, of_image: bool, kept: float = 1.0) -> Work:
        """One side's gradient by the sparse kernels, if this share of the pairs is kept."""
        from ds_cmli.cmli.triton.gradient import CHUNK, SEGMENTS, SPARSE, Lists, sparse_features
        from ds_cmli.cmli.triton.sparse_kernels import (
            pairs_kernel,
            sort_kernel,
            sparse_gradient_kernel,
        )

        p, q = ((I, N), (J, M)) if of_image else ((J, M), (I, N))
        lists, features = Lists.of(p, q, 2**30), sparse_features(D, self.dtype)
        assert lists is not None
        row_tiles = (
            I * math.ceil(N / 16) if of_image else sum(math.ceil(n / 16) for n in self.lengths)
        )
        positions = kept * (I * self.tokens if of_image else J * I * N)
        pairs = kept * q[0]  # of one sequence
        integers = dict.fromkeys(
            ("kept", "kept_count", "p_count", "q_count", "sparse", "starts", "lists"), "i32"
        )
        floats = dict.fromkeys(("scale", "p_weight", "q_weight", "p_grad", "q_grad"), "fp32")
        types = (
            integers | floats | {"counts": "i32", "p_ends": "i32", "q_win": "u8", "q_mask": "i16"}
        )
        chunks = math.ceil(q[0] / CHUNK)
        listing = (
            self.machine(pairs_kernel, types, {"WIDTH": CHUNK}, 4, 3).executed([chunks, chunks])
            * p[0]
            * 4
        )
        sorting = 0.0
        for fill in (False, True):
            constants = {
                "FILL": fill,
                "SEGMENTS": SEGMENTS,
                "TILES": lists.tiles,
                "WIDTH": lists.width,
            }
            machine = self.machine(sort_kernel, types, constants | {"MASKED": of_image}, 1, 3)
            turns = [pairs / SEGMENTS, math.ceil(q[1] / lists.width)][: len(machine.loops)]
            sorting += machine.executed(turns) * p[0] * SEGMENTS
        types |= dict.fromkeys(("out", "source"), self.name) | {"p_win": "u8", "p_mask": "i16"}
        step, unroll, warps, stages = SPARSE.values()
        constants = {"D": D, "BD": features, "STEP": step, "UNROLL": unroll, "TILES": lists.tiles}
        constants |= {"P_MASKED": not of_image, "TWO_TERMS": self.name == "bf16"}
        machine = self.machine(sparse_gradient_kernel, types, constants, warps, stages)
        steps = max(1.0, positions / row_tiles / step)
        adding = machine.executed([math.ceil(pairs / unroll), steps]) * warps * row_tiles
        gathered = 16 * row_tiles * pairs
        l2 = 2 * D * (gathered + positions) + 12 * positions + 32 * row_tiles * pairs
        dram = (
            2 * D * (2 * p[0] * p[1] + q[0] * q[1])
            + kept * I * J * (N + M)
            + 8 * positions
            + 20 * I * J
        )
        flops = 2 * 16 * positions * D * (2 if self.name == "bf16" else 1)
        return Work(flops, dram, l2, listing + sorting + adding)

    def backward(self, kept: float = 1.0) -> list[Work]:
        """Both gradients, each by the kernels that the op's estimate chooses."""
        from ds_cmli.cmli.triton.gradient import COSTS, sparse_pays

        chosen = []
        image_steps, text_steps = (
            I * 16 * math.ceil(N / 16),
            sum(16 * math.ceil(n / 16) for n in self.lengths),
        )
        for of_image in (True, False):
            sizes = (I, J, image_steps, text_steps, self.tokens)
            if not of_image:
                sizes = (J, I, text_steps, image_steps, I * N)
            pays = sparse_pays.fn(kept * I * J, *sizes, *COSTS[self.dtype])
            chosen.append(self.sparse(of_image, kept) if pays else self.dense(of_image))
        return chosen


def bare_product(tokens: int) -> Work:
    """The similarities alone, as a library would multiply them, none stored."""
    return Work(2 * I * N * tokens * D, 2 * D * (I * N + tokens), 0)


def materialised() -> list[Work]:
    """Autograd in 16 bits on stored similarities, padding included.

    They are written by the product, and read twice by products of the backward; between these they pass 11 times: 2 to
    mask them, 2 for the maxima; back, 2 to fill zeros for the maxima's gradients, 2 to scatter into them, 3 to add them.
    """
    similarities = 2 * I * J * N * M
    product = Work(2 * I * J * N * M * D, similarities, 0)
    return [product, Work(0, 11 * similarities, 0), product, product]


def rows(name: str, dtype: str, lengths: str, efficiency: float) -> list[dict[str, Any]]:
    """The table: a row for each part of a step."""
    from profiling.baselines import text_lengths

    gpu, valid = GPUS[name], text_lengths(lengths, J).tolist()
    kernels = Kernels(gpu, dtype, valid)
    forward = kernels.forward()
    parts = {
        "bare product": [bare_product(sum(valid))],
        "materialised autograd": materialised(),
        "forward": [forward],
    }
    parts["dense backward"] = [kernels.dense(True), kernels.dense(False)]
    parts["sparse backward"] = [kernels.sparse(True), kernels.sparse(False)]
    for kept in KEPT:
        parts[f"step, {kept:.0%} of the pairs kept"] = [forward, *kernels.backward(kept)]
    return [row(part, phases, gpu, efficiency) for part, phases in parts.items()]


def row(part: str, phases: list[Work], gpu: GPU, efficiency: float) -> dict[str, Any]:
    """One part of a step, whose phases follow each other."""
    flops, dram, l2, instructions = (sum(amounts) for amounts in zip(*phases, strict=True))
    times = [work.times(gpu) for work in phases]
    most = max(times, key=lambda limits: max(limits.values()))
    at_limits = sum(max(limits.values()) for limits in times)
    return {
        "part": part,
        "TFLOP": flops / 1e12,
        "DRAM GB": dram / 1e9,
        "L2 GB": l2 / 1e9,
        "1e9 instructions": instructions / 1e9,
        "ms at the limits": at_limits,
        "ms": at_limits / efficiency,
        "binds": max(most, key=lambda limit: most[limit]),
    }


@click.command(help=__doc__)
@click.option("--gpu", "name", default="a100", show_default=True, type=click.Choice(list(GPUS)))
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "fp16"]))
@click.option(
    "--lengths", default="full", show_default=True, type=click.Choice(["full", "captions", "mixed"])
)
@click.option(
    "--efficiency", default=0.55, show_default=True, help="Share of the limits that is reached."
)
@click.option("--json", "json_path", metavar="FILE", help="The rows, one object each.")
def command(name: str, dtype: str, lengths: str, efficiency: float, json_path: str | None) -> None:
    found = rows(name, dtype, lengths, efficiency)
    click.echo(
        f"computed, not measured: {name}, {dtype}, {I} x {J} pairs, {N} patches, lengths: {lengths}"
    )
    numbers = [key for key in found[0] if key not in ("part", "binds")]
    click.echo(f"{'':30}" + "".join(f"{key:>18}" for key in numbers) + "  what binds")
    for row in found:
        click.echo(
            f"{row['part']:30}"
            + "".join(f"{row[key]:18.3g}" for key in numbers)
            + f"  {row['binds']}"
        )
    click.echo(f"ms: at {efficiency:.0%} of the limits, an assumption for every row alike")
    if json_path is not None:
        Path(json_path).write_text(json.dumps(found, indent=1))


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
