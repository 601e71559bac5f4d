"""What the op's Triton kernels do: FLOPs, bytes of DRAM and L2, and instructions counted in the kernels compiled for a
GPU that need not be here. All of it is computed, nothing measured.

Shape legend: I images, J texts, N patches, M text positions, D features.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ds_cmli.cmli.triton.backend import TEXTS_PER_PROGRAM, Sizes
from ds_cmli.cmli.triton.backward_kernel import gradient_kernel
from ds_cmli.cmli.triton.forward_kernel import combine_kernel, forward_kernel
from ds_cmli.cmli.triton.gradient import (
    CHUNK,
    SEGMENTS,
    SPARSE,
    Lists,
    costs,
    sparse_features,
    sparse_pays,
)
from ds_cmli.cmli.triton.sparse_kernels import pairs_kernel, sort_kernel, sparse_gradient_kernel
from ds_cmli.cmli.triton.tiles import backward_tiles, forward_tiles, power_of_two
from profiling.speed.gpu_rates import GPU, Work
from profiling.speed.instructions import Machine, machine_code

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Kernels:
    """The op's kernels compiled for one GPU and dtype, and what they do for texts of given lengths."""

    def __init__(
        self,
        gpu: GPU,
        dtype: str,
        sizes: Sizes,
        lengths: Iterable[int] | Mapping[int, int],
        one_way: bool = False,
    ):
        """`one_way`: of `maxsim`, documents as images and queries as texts."""
        self.both = not one_way
        # Of arg_i2t and arg_t2i; and the bytes of a pair's.
        self.indices = tuple("u8" if length <= 256 else "i16" for length in (sizes.M, sizes.N))
        widths = [1 + (kind == "i16") for kind in self.indices]
        self.token_bytes = sizes.M * widths[1]
        self.pair_bytes = self.both * sizes.N * widths[0] + self.token_bytes
        self.gpu, self.name, self.dtype, self.sizes = gpu, dtype, DTYPES[dtype], sizes
        self.capability = divmod(gpu.capability, 10)
        self.lengths = Counter(lengths)  # texts of each length; a mapping is taken as it is
        self.tokens = self.lengths_sum(1)

    def lengths_sum(self, multiple: int) -> int:
        """Tokens of all texts, each text's rounded up to a multiple."""
        return sum(count * multiple * math.ceil(n / multiple) for n, count in self.lengths.items())

    def machine(
        self, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
    ) -> Machine:
        given = (tuple(types.items()), tuple(constants.items()))
        return machine_code(kernel, *given, self.gpu.capability, warps, stages)

    def forward(self, kept: float = 1.0, indices: bool = True) -> Work:
        """The scores of this share of the pairs, and their argmax indices if wanted."""
        I, J, N, M, D = self.sizes  # noqa: E741
        tiles = forward_tiles(N, M, D, self.dtype, self.capability, self.gpu.shared)
        blocks, groups = math.ceil(N / tiles.rows), math.ceil(J / TEXTS_PER_PROGRAM)
        types = dict.fromkeys(("s_i2t", "s_t2i"), "fp32")
        types |= dict.fromkeys(("image", "text"), self.name)
        types |= dict(zip(("arg_i2t", "arg_t2i"), self.indices, strict=True)) | {"suspect": "i1"}
        types |= dict.fromkeys(("image_mask", "token_mask"), "i16")
        types |= dict.fromkeys(("image_count", "text_count", "first", "code"), "i32")
        constants = {"D": D, "ROWS": tiles.rows, "BD": tiles.features, "BLOCKS": blocks}
        constants |= {"MASKED": False, "SAVE": indices, "STAGES": tiles.stages, "BOTH": self.both}
        instructions = flops = l2 = below = 0.0
        for width in tiles.tokens:
            last = width == tiles.tokens[-1]
            of_width = {n: k for n, k in self.lengths.items() if n > below and (n <= width or last)}
            below = width
            steps = kept * sum(count * math.ceil(n / width) for n, count in of_width.items())
            given = constants | {"TOKENS": width}
            machine = self.machine(forward_kernel, types, given, tiles.warps, tiles.stages)
            machine = machine.without(".NAN")  # looked for where inputs are huge alone
            programs = I * blocks * groups
            in_turn = [math.ceil(D / tiles.features) - 1] * (len(machine.loops) - 1)  # of a product
            instructions += tiles.warps * programs * machine.executed([steps / groups, *in_turn])
            flops += 2 * I * blocks * tiles.rows * steps * width * D
            l2 += 2 * D * (programs * tiles.rows + I * blocks * steps * width)
        written = indices * I * J * self.pair_bytes  # those of pairs that are not kept too, as 0
        dram = float(2 * D * (I * N + J * M) + written + 4 * (1 + self.both) * I * J)
        if blocks > 1:
            # Written, and read by `combine_kernel`.
            partial = kept * I * J * blocks * (4 * self.both + 4 * M + indices * self.token_bytes)
            dram, l2 = dram + 2 * partial, l2 + 2 * partial
            instructions += kept * self.combine(blocks, indices)
        return Work(flops, dram, l2 + written, instructions)

    def combine(self, blocks: int, indices: bool) -> float:
        """Instructions that put the blocks of an image together."""
        types = dict.fromkeys(("s_i2t", "s_t2i", "row_sum", "column_max"), "fp32")
        types |= dict.fromkeys(("arg_t2i", "column_arg"), self.indices[1])
        types |= {"kept": "u8", "token_mask": "i16"}
        types |= dict.fromkeys(("image_count", "text_count"), "i32")
        constants = {"BLOCKS": blocks, "WIDTH": power_of_two(self.sizes.M)}
        constants |= {"SAVE": indices, "KEPT": False, "BOTH": self.both}
        machine = self.machine(combine_kernel, types, constants, 4, 3)
        return 4 * self.sizes.I * self.sizes.J * machine.executed([blocks] * len(machine.loops))

    def dense(self, of_image: bool) -> Work:
        """One side's gradient by the dense kernel."""
        I, J, N, M, D = self.sizes  # noqa: E741
        tiles = backward_tiles(D, self.dtype, self.capability, M if of_image else N)
        row_lengths, step_lengths = Counter({N: I}), self.lengths
        if not of_image:
            row_lengths, step_lengths = step_lengths, row_lengths
        rows = sum(count * 16 * math.ceil(n / 16) for n, count in row_lengths.items())
        rests = {n: n % tiles.step for n in step_lengths}
        long = sum(count * (n // tiles.step + (rests[n] > 16)) for n, count in step_lengths.items())
        short = sum(count for n, count in step_lengths.items() if 0 < rests[n] <= 16)
        types = dict.fromkeys(("out", "source"), self.name)
        types |= self.won(of_image) | dict.fromkeys(("p_mask", "q_mask"), "i16")
        types |= dict.fromkeys(("scale", "p_grad", "q_weight"), "fp32")
        lists = [f"{name}_{part}" for name in ("p", "long", "short") for part in ("code", "first")]
        types |= dict.fromkeys(("sparse", "p_count", *lists), "i32")
        two_terms = self.name == "bf16"
        constants = {"D": D, "BD": tiles.features, "ROWS": tiles.rows, "LONG": tiles.step}
        constants |= {"P_MASKED": not of_image, "Q_MASKED": of_image}
        constants |= {"TWO_TERMS": two_terms, "STAGES": tiles.stages} | self.wins(of_image)
        machine = self.machine(gradient_kernel, types, constants, tiles.warps, tiles.stages)
        programs = rows / tiles.rows * math.ceil(D / tiles.features)
        positions = long * tiles.step + short * 16
        flops = 2 * rows * positions * D * (1 + two_terms)
        l2 = (
            programs * positions * tiles.features * 2 + I * J * self.pair_bytes * D / tiles.features
        )
        written, read = (N * I, J * M) if of_image else (M * J, I * N)
        dram = 2 * D * (2 * written + read) + I * J * self.pair_bytes
        return Work(flops, dram, l2, tiles.warps * programs * machine.executed([long, short]))

    def sparse(self, of_image: bool, kept: float = 1.0) -> Work | None:
        """One side's gradient by the sparse kernels if this share of the pairs is kept; None where they never run."""
        I, J, N, M, D = self.sizes  # noqa: E741
        p, q = ((I, N), (J, M)) if of_image else ((J, M), (I, N))
        lists = Lists.of(p, q, 2**30)
        if lists is None:
            return None
        row_tiles = I * math.ceil(N / 16) if of_image else self.lengths_sum(16) // 16
        p_wins, q_wins = self.wins(of_image).values()
        positions = q_wins * kept * (I * self.tokens if of_image else J * I * N)
        pairs = kept * q[0]  # of one sequence
        two_terms = self.name == "bf16"
        step, unroll, warps, stages = SPARSE.values()
        features = sparse_features(D, self.dtype)
        programs = row_tiles * math.ceil(D / features)
        constants = {"D": D, "BD": features, "STEP": step, "UNROLL": unroll, "TILES": lists.tiles}
        constants |= {"P_MASKED": not of_image, "TWO_TERMS": two_terms} | self.wins(of_image)
        types = self.sparse_types(of_image)
        machine = self.machine(sparse_gradient_kernel, types, constants, warps, stages)
        steps = max(1.0, positions / row_tiles / step)
        turns = [math.ceil(pairs / unroll)] * p_wins + [steps] * q_wins
        adding = machine.executed(turns) * warps * programs
        gathered = p_wins * 16 * row_tiles * pairs
        l2 = 2 * D * (gathered + positions) + programs / row_tiles * (12 * positions + 2 * gathered)
        dram = 2 * D * (2 * p[0] * p[1] + q[0] * q[1]) + kept * I * J * self.pair_bytes
        dram += 8 * positions + 20 * I * J
        flops = 2 * 16 * positions * D * (1 + two_terms)
        return Work(flops, dram, l2, self.listing(p, q, of_image, pairs) + adding)

    def listing(self, p: tuple[int, int], q: tuple[int, int], masked: bool, pairs: float) -> float:
        """Instructions that list the kept pairs, so many of a sequence, and sort their positions."""
        lists, chunks = Lists.of(p, q, 2**30), math.ceil(q[0] / CHUNK)
        assert lists is not None
        types = self.sparse_types(masked)
        machine = self.machine(pairs_kernel, types, {"WIDTH": CHUNK}, 4, 3)
        total = 4 * p[0] * machine.executed([chunks] * 2)
        constants = {"SEGMENTS": SEGMENTS, "TILES": lists.tiles, "WIDTH": lists.width}
        constants |= {"MASKED": masked}
        for fill in (False, True) if self.wins(masked)["Q_WINS"] else ():
            given = constants | {"FILL": fill}
            machine = self.machine(sort_kernel, types, given, 1, 3)
            # Where a thread has several tiles, a loop of five instructions waits for their stores.
            turns = [pairs / SEGMENTS, math.ceil(q[1] / lists.width), 1.0]
            total += machine.executed(turns[: len(machine.loops)]) * p[0] * SEGMENTS
        return total

    def wins(self, of_image: bool) -> dict[str, bool]:
        """Whether the side of the gradient, and the other one, win positions."""
        return {"P_WINS": self.both or not of_image, "Q_WINS": self.both or of_image}

    def won(self, of_image: bool) -> dict[str, str]:
        kinds = self.indices if of_image else self.indices[::-1]
        return dict(zip(("p_win", "q_win"), kinds, strict=True))

    def sparse_types(self, of_image: bool) -> dict[str, str]:
        lists = [
            "counts",
            "starts",
            "lists",
            "kept",
            "kept_count",
            "p_count",
            "q_count",
            "p_ends",
            "sparse",
        ]
        floats = ("scale", "p_weight", "q_weight", "p_grad", "q_grad")
        types = dict.fromkeys(lists, "i32") | dict.fromkeys(floats, "fp32")
        types |= self.won(of_image) | dict.fromkeys(("p_mask", "q_mask"), "i16")
        return types | dict.fromkeys(("out", "source"), self.name)

    def backward(self, kept: float = 1.0) -> list[Work]:
        """Both gradients, each by the kernels that the op's estimate chooses."""
        I, J, N, *_ = self.sizes  # noqa: E741
        image_steps, text_steps = I * 16 * math.ceil(N / 16), self.lengths_sum(16)
        chosen = []
        for of_image in (True, False):
            of_side = (I, J, image_steps, text_steps, self.tokens)
            if not of_image:
                of_side = (J, I, text_steps, image_steps, I * N)
            sparse = None
            dense, gathered, listed = costs(self.dtype, self.capability)
            p_wins, q_wins = self.wins(of_image).values()
            if sparse_pays.fn(kept * I * J, *of_side, dense, gathered * p_wins, listed * q_wins):
                sparse = self.sparse(of_image, kept)
            chosen.append(sparse or self.dense(of_image))
        return chosen
