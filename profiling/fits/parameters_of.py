"""Runs a program, and writes how many parameters its modules have: `parameters_of.py FILE SCRIPT`.

The modules are those whose forward pass it runs; `fits` runs it like any program. The file is JSON:
"parameters", those of the "largest" layer, and the "precision" of autocast, or else of the
parameters.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
modules: dict[int, nn.Module] = {}
autocast: set[torch.dtype] = set()


def seen(module: nn.Module, _: tuple) -> None:
    modules[id(module)] = module
    if torch.is_autocast_enabled("cuda"):
        autocast.add(torch.get_autocast_dtype("cuda"))


def counted() -> dict[str, object]:
    sizes: dict[int, tuple[int, torch.dtype]] = {}
    largest = 0
    for module in modules.values():
        own = {id(parameter): _size(parameter) for parameter in module.parameters(recurse=False)}
        largest = max(largest, sum(size for size, _ in own.values()))
        sizes |= own
    total = sum(size for size, _ in sizes.values())
    widest = max(sizes.values(), key=lambda size: size[0])
    precision = NAMES[next(iter(autocast), widest[1])]
    return {"parameters": total, "largest": largest, "precision": precision}


def _size(parameter: nn.Parameter) -> tuple[int, torch.dtype]:
    return getattr(parameter, "ds_numel", parameter.numel()), parameter.dtype  # ZeRO-3 empties it


def main() -> None:
    answer, *sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    register_module_forward_pre_hook(seen)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Path(answer).write_text(json.dumps(counted()))


if __name__ == "__main__":
    main()
