"""Writing and reading DeepSpeed's checkpoint files, in place of DeepSpeed's `TorchCheckpointEngine`.

Files are written with a checksum and synced to disk. Errors are recorded, not raised: if one rank left DeepSpeed's
`save_checkpoint`, the others would wait in it forever. Files are read with PyTorch's `weights_only` loader, which runs
no code from a file; beside tensors and plain values it builds only the four DeepSpeed classes named here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_cmli.checkpoint import checksums
from ds_cmli.common.patches import environment

DEEPSPEED_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class NotFinite(Exception):
    """A tensor to be saved has NaN or inf: the run has diverged, and the checkpoint before is kept."""


def not_finite(value: Any, name: str = "") -> str | None:
    """The name of the first tensor in nested containers that has NaN or inf. CPU-GPU sync."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not value.numel():
            return None
        least, most = (
            value.detach().aminmax()
        )  # both are NaN if any value is; needs no mask of the tensor's size
        return None if least.isfinite() and most.isfinite() else name
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    return next(
        (bad_name for key, x in items if (bad_name := not_finite(x, f"{name}.{key}".lstrip(".")))),
        None,
    )


class CheckpointWriter(TorchCheckpointEngine):
    """Attributes: `files`, the size and checksum of each file written; `error`, why a file could not be written."""

    def __init__(self):
        super().__init__()
        self.files: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None

    def makedirs(self, path, exist_ok=False):
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = error

    def save(self, state_dict, path):
        write_tensors(self, state_dict, Path(path))

    def load(self, path, map_location=None):
        return torch.load(
            path, map_location=map_location, weights_only=True
        )  # `no_code` allows DeepSpeed's classes


def write_tensors(writer: CheckpointWriter, value: Any, path: Path) -> None:
    """`torch.save` that records the file, or the error, in `writer`; a value that is not finite is not written."""
    if writer.error is not None:
        return
    bad = not_finite(value)
    if bad is not None:
        writer.error = NotFinite(f"{bad} in {path.name}")
        return
    try:
        writer.files[path.name] = checksums.write_file(path, lambda file: torch.save(value, file))
    except OSError as error:
        writer.error = error


@contextmanager
def no_code() -> Iterator[None]:
    """A context in which no library runs code from files that it reads, even if it asks for that. Does not nest."""
    force = environment({"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"})
    with force, torch.serialization.safe_globals(DEEPSPEED_CLASSES):
        yield
