"""Exports the image and the text tower as ONNX files, with shared blocks and projection, and checks the files.

Shapes: B images or texts, N patches, M text positions, H hidden size, D embedding dimension, S image side.
"""

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.common.errors import UserError
from ds_cmli.models.student import Student

NEEDS = ("onnxscript", "onnxruntime")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in the messages of torch.onnx
TOLERANCE = 1e-5  # largest difference of any element of the normalised features


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in NEEDS)


class ImageTower(nn.Module):
    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, S, S] -> [B, H], [B, N, D], both of unit length."""
        cls, patches = self.student.encode_image(pixel_values)
        return l2_normalize(cls), l2_normalize(self.student.projection(patches))


class TextTower(nn.Module):
    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, M], bool [B, M] -> [B, H], [B, M, D], both of unit length."""
        cls, tokens = self.student.encode_text(input_ids, attention_mask)
        return l2_normalize(cls), l2_normalize(self.student.projection(tokens))


def write_onnx(folder: Path, student: Student, image: Tensor, ids: Tensor, mask: Tensor) -> list[str]:
    """Write `image.onnx` and `text.onnx`, for any number of images, and of texts of at most M positions.

    Returns:
        Lines for the user about what was written.

    Raises:
        UserError: a tower cannot be exported, or onnxruntime computes other features.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=ids.shape[1])
    towers: list[tuple[str, nn.Module, dict[str, Tensor], tuple, list[str]]] = [
        ("image", ImageTower(student), {"pixel_values": image}, ({0: batch},), ["image_embeds", "patch_embeds"]),
        (
            "text",
            TextTower(student),
            {"input_ids": ids, "attention_mask": mask},
            ({0: batch, 1: length},) * 2,
            ["text_embeds", "token_embeds"],
        ),
    ]
    lines = []
    for name, tower, inputs, shapes, outputs in towers:
        file = folder / f"{name}.onnx"
        try:
            _export(tower, inputs, shapes, outputs, file)
            most = max(_difference(tower, given, file) for given in (inputs, _shorter(inputs)))
        except Exception as error:
            said = COLOURS.sub("", str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the {name} tower cannot be exported to ONNX: {said[:200]}; give --no-onnx") from None
        if not most <= TOLERANCE:
            raise UserError(f"{str(file)!r}: onnxruntime's features differ by {most:.1e}; give --no-onnx")
        lines.append(
            f"{folder.name}/{file.name}: the {name} tower, shared blocks included; onnxruntime within {most:.1e}"
        )
    return lines


def _export(tower: nn.Module, inputs: dict[str, Tensor], shapes: tuple, outputs: list[str], file: Path) -> None:
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower.eval(),
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
        )


def _difference(tower: nn.Module, inputs: dict[str, Tensor], file: Path) -> float:
    """The largest absolute difference of any output between PyTorch and onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        wanted = tower(*inputs.values())
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, wanted, strict=True))


def _shorter(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with fewer rows and positions, to check that these sizes are dynamic."""
    return {name: value[:1, : value.shape[1] // 2] if value.dim() == 2 else value[:1] for name, value in inputs.items()}


@contextlib.contextmanager
def _quiet() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
