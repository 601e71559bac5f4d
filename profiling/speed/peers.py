"""What a step of both directions takes by the kernels of other packages, compiled for a GPU that need not be here.

late-interaction-kernels and flash-maxsim know one direction, so each runs twice: maxima over the texts for each patch,
over the images for each token. Each runs as its own launcher would: padding, the backward it chooses, and of the tiles
that it lists for the GPU those that are quickest at the limits. Gathered rows and atomic additions count as L2's bytes.

Shape legend: P sequences of L positions that take maxima, Q sequences of K positions over which; D features.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import click
import triton.language as tl

from ds_cmli.cmli.triton.backend import Sizes
from profiling.speed.gpu_rates import GPU, Work, at_limits
from profiling.speed.instructions import Machine, machine_code

FAMILIES = {80: "a100", 86: "ampere", 89: "ada", 90: "hopper"}  # as both packages name them
INTEGERS = dict.fromkeys(("argmax_ptr", "lengths_ptr", "q_lengths_ptr"), "i32")
INTEGERS |= dict.fromkeys(("q_mask_ptr", "d_mask_ptr"), "i8")


@dataclass
class Direction:
    """One direction of a step on one GPU."""

    gpu: GPU
    dtype: str
    P: int
    L: int
    Q: int
    K: int
    D: int
    valid: int  # positions of P that are not padding

    def compiled(
        self, kernel: Any, constants: dict[str, Any], warps: int, stages: int, grad: str = "fp32"
    ) -> Machine:
        """A kernel for contiguous tensors; `grad` is the type of the gradients it writes."""
        names = kernel.arg_names
        types = INTEGERS | dict.fromkeys(("Q_ptr", "D_ptr"), self.dtype)
        types |= dict.fromkeys(("grad_Q_ptr", "grad_D_ptr"), grad)
        types |= dict.fromkeys(("grad_s_ptr", "scores_ptr"), "fp32")
        strides = [name for name in names if name.startswith("stride")]
        last = dict.fromkeys((name for name in strides if self.is_last(name, names)), 1)
        known = {"d": self.D, "d_pad": self.D, "kd_layout": False, "cross": True, "shared_docs": 1}
        known |= last | constants
        known = {name: value for name, value in known.items() if name in names}
        sizes = {"Nq": self.P, "Nd": self.Q, "B": self.Q, "Ld": self.K}
        multiples = [name for name in strides if name not in last]
        for name, size in sizes.items():
            if name in names and name not in known and size % 16 == 0:
                multiples.append(name)
        given = tuple((name, type_) for name, type_ in types.items() if name in names)
        options = self.gpu.capability, warps, stages, tuple(multiples)
        return machine_code(kernel, given, tuple(known.items()), *options)

    @staticmethod
    def is_last(name: str, names: list[str]) -> bool:
        """Whether a stride is that of a tensor's last axis: the next argument is none of the same tensor."""
        tensor, after = name.rpartition("_")[0], names.index(name) + 1
        return after == len(names) or names[after].rpartition("_")[0] != tensor

    def forward(
        self, kernel: Any, constants: dict[str, Any], configs: list[Any], length: int
    ) -> Work:
        """Scores and int32 indices by a program a pair: blocks of `length` positions, each with all of Q's blocks."""
        works, pairs = [], self.P * self.Q
        for config in configs:
            options = config.num_warps, config.num_stages
            machine = self.compiled(kernel, constants | config.kwargs, *options)
            block_q, block_d = config.kwargs["BLOCK_Q"], config.kwargs["BLOCK_D"]
            blocks, steps = math.ceil(length / block_q), math.ceil(self.K / block_d)
            flops = 2 * pairs * blocks * block_q * steps * block_d * self.D
            l2 = 2 * self.D * pairs * (self.L + blocks * self.K) + 4 * pairs * length
            executed = config.num_warps * pairs * machine.executed([steps] * len(machine.loops))
            works.append(Work(flops, self.features + pairs * (4 * length + 4), l2, executed))
        return self.quickest(works)

    def atomic(self, machine: Machine, warps: int, programs: int) -> Work:
        """Both gradients by a program a position, which gathers a row from each of Q and adds one to it."""
        rows, in_fp32 = programs * self.Q, 8 * self.Q * self.K * self.D
        dram, l2 = 2 * self.features + 4 * rows + in_fp32, rows * (2 + 4) * self.D
        return Work(0, dram, l2, warps * programs * machine.executed([self.Q]))

    @property
    def features(self) -> int:
        """Bytes of both sides."""
        return 2 * self.D * (self.P * self.L + self.Q * self.K)

    def quickest(self, works: Iterable[Work]) -> Work:
        return min(works, key=lambda work: at_limits([work], self.gpu))


def fitting(configs: list[Any], direction: Direction) -> list[Any]:
    """Configurations whose tiles fit shared memory, but for small ones of many features."""
    out = []
    for config in configs:
        block_q, block_d = config.kwargs["BLOCK_Q"], config.kwargs["BLOCK_D"]
        held = 2 * direction.D * (block_q + config.num_stages * block_d)  # bytes
        if block_q >= 32 and block_d >= 64 and held <= direction.gpu.shared:
            out.append(config)
    return out


def flash_maxsim(direction: Direction, masked: bool) -> list[Work]:
    """Forward, and its `atomic_unified` backward, the default. `masked`: P has lengths."""
    forward, training = (
        import_module(f"flash_maxsim.{name}")
        for name in ("flash_maxsim", "flash_maxsim_batched_train")
    )
    configs = fitting(forward._get_configs(FAMILIES[direction.gpu.capability]), direction)
    constants = {"Lq": direction.L, "save_argmax": 1, "use_q_lengths": int(masked)}
    constants["input_dtype"] = int(direction.dtype == "bf16")
    result = direction.forward(forward._maxsim_fwd_kernel.fn, constants, configs, direction.L)
    # As its table has them: of a medium grid on an A100.
    warps, stages = {90: (1, 3), 80: (2, 3)}.get(direction.gpu.capability, (4, 2))
    sizes = {"Lq": direction.L, "Nq": direction.P, "B": direction.Q}
    machine = direction.compiled(training._maxsim_bwd_unified_kernel, sizes, warps, stages)
    return [result, direction.atomic(machine, warps, direction.P * direction.L)]


def late_interaction_kernels(direction: Direction, masked: bool) -> list[Work]:
    """Forward, and the backward that "auto" takes. `masked`: P has a mask, Q has not; else the other way round."""
    package = "late_interaction_kernels"
    tuning, forward = (import_module(f"{package}.{name}") for name in ("_autotune", "forward"))
    unified, lowmem = (
        import_module(f"{package}.backward.{name}") for name in ("unified", "lowmem")
    )
    launches = import_module(f"{package}.backward._autotune").BWD_CONFIGS
    hopper = direction.gpu.capability == 90
    listed = tuning._small_d_hopper() if hopper else tuning._small_d_ampere()
    configs = fitting(listed, direction)
    length = 1 << (direction.L - 1).bit_length()
    padded = masked or length > direction.L
    constants = {"Lq": length, "save_argmax": True, "normalize": False}
    constants |= {"has_q_mask": padded, "has_d_mask": not masked}
    constants["COMPUTE_DTYPE"] = {"bf16": tl.bfloat16, "fp16": tl.float16}[direction.dtype]
    works = [direction.forward(forward._maxsim_fwd_kernel.fn, constants, configs, length)]
    # Many rows meet in a row: it takes no atomics then.
    few = direction.P >= 256 and direction.Q >= 256 and length <= 64
    kernel = (lowmem._bwd_dQ_kernel if few else unified._bwd_unified_kernel).fn
    rows = []
    for launch in launches:
        grad = direction.dtype if few else "fp32"
        machine = direction.compiled(kernel, constants, launch.num_warps, launch.num_stages, grad)
        if few:
            gathered = direction.valid * direction.Q
            executed = launch.num_warps * direction.valid * machine.executed([direction.Q])
            dram, l2 = direction.features + 4 * gathered, 2 * direction.D * gathered
            rows.append(Work(0, dram, l2, executed))
        else:
            rows.append(direction.atomic(machine, launch.num_warps, direction.valid))
    works.append(direction.quickest(rows))
    if few:
        of_rows = one_hot(direction, lowmem._bwd_dD_owned_kernel.fn, constants, configs)
        works.append(direction.quickest(of_rows))
    return works


def one_hot(
    direction: Direction, kernel: Any, constants: dict[str, Any], configs: list[Any]
) -> Iterable[Work]:
    """The gradient of Q by products with matrices of indices, a program a tile of its rows."""
    for config in configs:
        block_q, block_d = config.kwargs.values()
        options = config.num_warps, config.num_stages
        given = constants | config.kwargs
        machine = direction.compiled(kernel, given, *options, grad=direction.dtype)
        programs = direction.Q * math.ceil(direction.K / block_d)
        positions = direction.P * math.ceil(direction.L / block_q) * block_q
        executed = config.num_warps * programs
        executed *= machine.executed([direction.P] * len(machine.loops))
        flops = 2 * programs * block_d * positions * direction.D
        l2 = programs * direction.P * direction.L * (2 * direction.D + 4)
        dram = direction.features + 4 * direction.P * direction.L * direction.Q
        yield Work(flops, dram, l2, executed)


PEERS = {"late-interaction-kernels": late_interaction_kernels, "flash-maxsim": flash_maxsim}


def steps(
    gpu: GPU, dtype: str, sizes: Sizes, tokens: int, one_way: bool = False
) -> dict[str, list[Work]]:
    """A step of each installed package, `tokens` positions of all texts being valid; `one_way`: of the texts alone,
    queries without a mask and documents with one."""
    I, J, N, M, D = sizes  # noqa: E741
    functions = {}
    for name, step in PEERS.items():
        if find_spec(name.replace("-", "_")) is None:
            click.echo(f"{name} is not installed: left out")
            continue
        patches = Direction(gpu, dtype, I, N, J, M, D, valid=I * N)
        texts = Direction(gpu, dtype, J, M, I, N, D, valid=tokens)
        of_patches = [] if one_way else step(patches, False)
        functions[f"{name} {version(name)}"] = [*of_patches, *step(texts, not one_way)]
    return functions
