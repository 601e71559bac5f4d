"""What a program saves and loads: files without the values of tensors."""

import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import IO, NamedTuple

import torch
from torch import Tensor

from ds_cmli.common.patches import patched
from ds_cmli.fits.recorder import Recorder

KINDS = {"float": "F", "bfloat": "BF", "int": "I", "uint": "U", "complex": "C"}
WITHOUT_VALUES = "tensors were saved without their values"


@contextmanager
def without_values(left_out: Counter[str], recorder: Recorder) -> Iterator[None]:
    """Inside, files that a program saves have gaps, which take no space, in place of values."""

    def recorded(restore: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(tensor: Tensor) -> Tensor:
            loaded = restore(tensor)
            recorder.see(loaded, "torch.load")
            return loaded

        return run

    with ExitStack() as stack:
        stack.enter_context(patched("torch: device of a loaded tensor", recorded))
        stack.enter_context(patched("torch: saving", partial(_saving, left_out)))
        stack.enter_context(patched("torch: loading", _loading))
        stack.enter_context(patched("torch: state of random numbers", _setting))
        if find_spec("safetensors") is not None:
            write = partial(_saving_safetensors, left_out)
            stack.enter_context(patched("safetensors: saving", write))
            stack.enter_context(patched("safetensors: loading", lambda _: _load_safetensors))
        yield


def _saving(left_out: Counter[str], save: Callable[..., None]) -> Callable[..., None]:
    """Replaces `torch.save`."""

    def run(
        obj: object, f: IO[bytes] | str | os.PathLike[str], *args: object, **kwargs: object
    ) -> None:
        left_out[WITHOUT_VALUES] += 1
        kwargs.pop("_use_new_zipfile_serialization", None)  # the old format cannot have gaps
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            if isinstance(f, str | os.PathLike):
                sys.audit("open", os.fspath(f), "wb", os.O_WRONLY)  # native code opens it
                save(obj, f, *args, **kwargs)
            else:  # it may have begun before, which gaps do not know
                whole = io.BytesIO()
                save(obj, whole, *args, **kwargs)
                f.write(whole.getvalue())

    return run


def _loading(load: Callable[..., object]) -> Callable[..., object]:
    """Replaces `torch.load`, which without data knows no `map_location` that is a function."""

    def run(f: object, map_location: object = None, *args: object, **kwargs: object) -> object:
        if callable(map_location):
            map_location = Places(map_location)
        return load(f, map_location, *args, **kwargs)

    return run


class StoredStorage(NamedTuple):
    """A storage of a file, as far as a function `map_location` needs to know it."""

    device: torch.device

    def cpu(self) -> "StoredStorage":
        return StoredStorage(torch.device("cpu"))

    def cuda(self, device: int | str | torch.device | None = None) -> "StoredStorage":
        return StoredStorage(torch.device("cuda", 0) if device is None else torch.device(device))


class Places(dict[str, str]):
    """The device that a function gives to each location of a file."""

    def __init__(self, place: Callable[[StoredStorage, str], StoredStorage | None]):
        super().__init__()
        self.place = place

    def get(self, location: str, default: object = None) -> str:  # type: ignore[override]
        placed = self.place(StoredStorage(torch.device("cpu")), location)
        return location if placed is None else str(placed.device)


def _setting(set_state: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Replaces `set_rng_state`: a state that was loaded has no values."""

    def run(new_state: Tensor) -> None:
        with suppress(RuntimeError):
            set_state(new_state)

    return run


def _saving_safetensors(left_out: Counter[str], _: Callable[..., None]) -> Callable[..., None]:
    """Replaces `save_file`: https://github.com/huggingface/safetensors#format."""

    def run(
        tensors: dict[str, Tensor],
        filename: str | os.PathLike[str],
        metadata: dict[str, str] | None = None,
    ) -> None:
        left_out[WITHOUT_VALUES] += 1
        header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.numel() * tensor.itemsize
            header[name] = {
                "dtype": _type_in_safetensors(tensor.dtype),
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(filename, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)

    return run


def _load_safetensors(
    filename: str | os.PathLike[str], device: str | int = "cpu", **_: object
) -> dict[str, Tensor]:
    """Replaces `load_file`."""
    from safetensors import safe_open

    with safe_open(filename, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118


def _type_in_safetensors(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "BOOL"
    kind, bits, rest = re.findall(r"\.([a-z]+)(\d+)(\w*)", str(dtype))[0]
    return KINDS[kind] + bits + rest.upper().removesuffix("FN")
