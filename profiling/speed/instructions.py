"""Counts the instructions of the op's Triton kernels, compiled for GPUs that need not be here, in their machine code.

An instruction counts as often as the loops around it turn; one behind a branch as if it were always reached, unless it
counts as rare.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Machine(NamedTuple):
    """The machine code of a kernel: its instructions, the first and last of each loop, and of what a branch skips."""

    instructions: list[str]
    loops: list[tuple[int, int]]
    branches: list[tuple[int, int]]

    @classmethod
    def parse(cls, text: str) -> "Machine":
        """Read what `nvdisasm -c` prints. A loop is a branch backwards; those of one instruction end the program."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            label = re.match(r"\s*(\.L\w+):", line)
            if label:
                labels[label[1]] = len(instructions)
            match = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
            if match:
                instructions.append(match[1].strip())
        loops, branches = {}, []
        for place, instruction in enumerate(instructions):
            jump = re.search(r"\bBRA.*`\((\.L\w+)\)", instruction)
            target = labels.get(jump[1], place) if jump else place
            if target < place:
                loops[target] = place  # several branches to one place are one loop
            elif target > place + 1 and instruction.startswith("@"):
                branches.append((place + 1, target - 1))
        return cls(instructions, sorted(loops.items()), branches)

    def without(self, rare: str) -> "Machine":
        """The machine code without what the innermost branch around an instruction with the text `rare` skips."""
        skipped: set[int] = set()
        for place, instruction in enumerate(self.instructions):
            around = [branch for branch in self.branches if branch[0] <= place <= branch[1]]
            if rare in instruction and around:
                first, last = min(around, key=lambda branch: branch[1] - branch[0])
                skipped |= set(range(first, last + 1))
        left = [place for place in range(len(self.instructions)) if place not in skipped]
        now = {place: number for number, place in enumerate(left)}
        loops = [(now[first], now[last]) for first, last in self.loops]
        return Machine([self.instructions[place] for place in left], loops, [])

    def executed(self, trips: Sequence[float]) -> float:
        """Instructions of a warp if the loops turn so often, in the order of their beginnings; an inner loop's trips
        are those in one of the outer one. ValueError if these are not as many as there are loops."""
        if len(trips) != len(self.loops):
            raise ValueError(f"{len(self.loops)} loops, {len(trips)} numbers of trips")
        total = 0.0
        for place in range(len(self.instructions)):
            times = 1.0
            for (first, last), turns in zip(self.loops, trips, strict=True):
                times *= turns if first <= place <= last else 1.0
            total += times
        return total


class Uncounted(Machine):
    """Stands for a kernel that is not compiled."""

    def without(self, rare: str) -> "Machine":
        return self

    def executed(self, trips: Sequence[float]) -> float:
        return 0.0


def uncounted(*_: object) -> Machine:
    return Uncounted([], [], [])


@functools.cache
def machine_code(
    kernel: Any,
    pointers: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    capability: int,
    warps: int,
    stages: int,
    multiples: tuple[str, ...] = (),
) -> Machine:
    """Compile a kernel as a launch would, its tensors aligned to 16 bytes and the integers named in `multiples`
    multiples of 16, and read its machine code."""
    types, values = dict(pointers), dict(constants)
    signature = {}
    for name in kernel.arg_names:
        signature[name] = (
            "constexpr" if name in values else "*" + types[name] if name in types else "i32"
        )
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or name in multiples
    }
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        text = subprocess.run(
            [tool, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    return Machine.parse(text)
