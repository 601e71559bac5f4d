"""Checks of pretrained weights: finite values, missing, unused and resized keys, room in memory."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ds_cmli.common.errors import UserError, check_regular

# Finds the number of the block in a key of timm's and transformers' models.
BLOCK = re.compile(r"(?:^|\.)(?:blocks?|layers?\d*|stages|h)\.(\d+)\.")
# Finds a key of an image encoder of transformers, whose layout is not timm's.
TRANSFORMERS_VISION = re.compile(r"(?:^|\.)(?:patch_embeddings?|embedder)\.")
FILES = ("model.safetensors", "pytorch_model.bin")  # the usual names in a folder of weights
Shape = tuple[int, ...]
CGROUP = Path("/sys/fs/cgroup")  # of this process, as containers and Slurm see it


@dataclass
class WeightsSource:
    """Where a model's weights come from, for messages about them."""

    setting: str  # "student.image_weights"
    weights: str  # its value, with "demo" resolved to a path
    partial: bool  # `weights_partial` of the same section: whether missing weights may start random

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.setting} is {self.weights!r}: {problem}")

    @property
    def allow(self) -> str:
        return f"or set {self.setting.split('.')[0]}.weights_partial=true to start from random ones"


def weights_file(source: WeightsSource, needed: str) -> str:
    """The file at the path of the weights, or in the folder there.

    Raises:
        UserError: there is none, with what is `needed`.
    """
    path = Path(source.weights)
    check_regular(f"{source.setting} is {source.weights!r}", path)
    if path.is_dir():
        files = [path / name for name in FILES if (path / name).is_file()]
        files = files or sorted(path.glob("*.safetensors"))
        if len(files) == 1 or (files and files[0].name in FILES):
            return str(files[0])
        raise source.error(
            f"a folder with {len(files)} files of weights; give {needed}, or a folder with one"
        )
    if not path.is_file():
        raise source.error(f"no such file; give 'hub', 'random' or {needed}")
    return str(path)


def not_finite(value: object, name: str = "") -> str | None:
    """The name of the first tensor in nested containers that has NaN or inf. CPU-GPU sync."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not value.numel():
            return None
        # Both are NaN if any value is; this needs no mask of the tensor's size.
        least, most = value.detach().aminmax()
        return None if least.isfinite() and most.isfinite() else name
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, inner in items:
        bad = not_finite(inner, f"{name}.{key}".lstrip("."))
        if bad:
            return bad
    return None


def check_finite(source: WeightsSource, model: nn.Module) -> None:
    """Raise `UserError` if a weight is not finite. Called before the model is cut."""
    key = not_finite(model.state_dict())
    if key is not None:
        raise source.error(f"its {key!r} holds NaN or infinite values; give weights that are whole")


def account(
    source: WeightsSource, model: nn.Module, given: Mapping[str, Shape], before: Mapping[str, Shape]
) -> None:
    """Print which weights are missing, unused or resized, or refuse the weights.

    Args:
        model: the part of the model that is used, after its last blocks are cut off.
        given: shapes of the weights by key, with the model's keys.
        before: shapes in the file by key; the library has resized a tensor if it differs.

    Raises:
        UserError: a shape does not fit; no key fits; or, unless `source.partial`, a block lacks a
            matrix. A missing bias, norm or scale starts neutral, but a random matrix spoils the
            features of the other blocks.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing = [key for key in wanted if key not in given]
    unused = [key for key in given if key not in wanted]
    other, resized = [], []
    for key, shape in wanted.items():
        if key not in given:
            continue
        if given[key] != shape:
            other.append(f"{key} {list(given[key])} for {list(shape)}")
        if before.get(key, shape) != shape:
            resized.append(f"{key} {list(before[key])} -> {list(shape)}")
    if other:
        raise source.error(
            f"{_count(other, wanted)} of another shape: {_some(other)}; give this model's own"
        )
    if len(missing) == len(wanted):
        do = "give weights in the layout of the model"
        if prefix := _prefix(wanted, unused):
            do = f"remove {prefix!r} from its keys"
        elif any(map(TRANSFORMERS_VISION.search, unused)):
            do = "they are transformers' names: give the weights that timm has of this model"
        raise source.error(
            f"none of its keys ({_some(unused)}) is one of the model's ({_some(missing)}): {do}"
        )
    blocks = _blocks(key for key in missing if len(wanted[key]) > 1)
    if blocks and not source.partial:
        # With no block there, training would start from nothing.
        allow = f", {source.allow}" if blocks < _blocks(wanted) else ""
        raise source.error(
            f"it lacks weights of block {', '.join(map(str, sorted(blocks)))} "
            f"({_count(missing, wanted)} missing: {_some(missing)}): give weights that have "
            f"them{allow}"
        )
    name = f"{source.setting} {source.weights}"
    if missing:
        count = _count(missing, wanted)
        say(f"{name}: {count} missing there, random at the start: {_some(missing)}")
    if unused:
        say(f"{name}: {_count(unused, given)} there not used: {_some(unused)}")
    if resized:
        say(f"{name}: {_count(resized, given)} resized: {_some(resized)}")


def _prefix(wanted: Iterable[str], unused: Iterable[str]) -> str:
    """What stands before the model's keys in the file; "" if there is none."""
    for own in wanted:
        for key in unused:
            if key.endswith(f".{own}"):
                return key.removesuffix(own)
    return ""


def _blocks(keys: Iterable[str]) -> set[int]:
    return {int(block[1]) for block in map(BLOCK.search, keys) if block}


def _count(keys: Sized, of: Sized) -> str:
    return f"{len(keys)} of {len(of)} keys"


def _some(keys: Iterable[str]) -> str:
    first, more = list(keys)[:3], list(keys)[3:]
    return ", ".join([*first, "..."] if more else first)


def say(line: str, model: nn.Module | None = None) -> None:
    """Print on the first rank, unless the parameters of `model` are fake tensors."""
    if os.environ.get("RANK", "0") == "0" and not isinstance(
        next(model.parameters(), None) if model else None, FakeTensor
    ):
        print(line, flush=True)


def check_room(setting: str, value: object, parameters: int) -> None:
    """Raise `UserError` if `parameters` in fp32 are more than the memory that is free here.

    Nothing in a prediction, which is for another machine.

    Args:
        setting, value: what to change.
    """
    if isinstance(torch.empty(0), FakeTensor):
        return
    needed, free = 4 * parameters, min(_free(), default=None)
    if free is not None and needed > free:
        raise UserError(
            f"{setting} is {value!r}: {parameters:,} parameters take {needed:,} B, and {free:,} B "
            "are free here: give a smaller model"
        )


def count(model: nn.Module | None) -> int:
    if model is not None:
        return sum(parameter.numel() for parameter in model.parameters())
    return 0


def _free() -> Iterator[int]:
    """Bytes: what the machine and the control group have left."""
    yield psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = (CGROUP / "memory.current").read_text().strip()
        inactive = re.search(r"inactive_file (\d+)", (CGROUP / "memory.stat").read_text())
        if limit != "max":  # pages of files that are not in use are given up when memory is short
            yield int(limit) - int(used) + (int(inactive[1]) if inactive else 0)
    except (OSError, ValueError):
        return
