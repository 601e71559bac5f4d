"""Writes the towers, with the shared blocks and the projection, and the scores as ONNX, and checks
that they give the same features there.

Shapes: B images or texts, I images, J texts, N patches, M text positions, H hidden size, D
embedding dimension, S image side.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ds_cmli.cmli.pair_scores import both_ways
from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError, first_line
from ds_cmli.export.modeling import CMLIModel
from ds_cmli.models.student import Student

NEEDS = ("onnxscript", "onnxruntime")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in the messages of torch.onnx
TOLERANCE = 1e-5  # largest difference of any element of the normalised features
LOGITS_TOLERANCE = 1e-3  # of the scores, which are up to 200 times a cosine


class ImageTower(nn.Module):
    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, S, S] -> [B, H], [B, N, D], both of unit length."""
        return self.student.image_embeddings(pixel_values)


class TextTower(nn.Module):
    def __init__(self, model: CMLIModel):
        super().__init__()
        self.student, self.special_ids = model.student, model.config.special_ids

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 [B, M], bool [B, M] -> [B, H], [B, M, D], both of unit length; bool [B, M]."""
        mask = attention_mask
        for special in self.special_ids:
            mask = mask & (input_ids != special)
        return *self.student.text_embeddings(input_ids, attention_mask), mask


class Scores(nn.Module):
    def __init__(self, model: CMLIModel):
        super().__init__()
        self.scales = {kind: scale.item() for kind, scale in model.scales().items()}
        self.flair = model.flair()

    def forward(
        self,
        image_embeds: Tensor,
        patch_embeds: Tensor,
        text_embeds: Tensor,
        token_embeds: Tensor,
        token_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """[I, H], [I, N, D], [J, H], [J, M, D], bool [J, M] -> logits per image and per text."""
        cmli = cmli_scores_reference(patch_embeds, token_embeds, token_mask)
        flair = self.flair and self.flair(patch_embeds, text_embeds, scratch_bytes=None)
        scores = both_ways(image_embeds @ text_embeds.t(), cmli, self.scales, flair)["combined"]
        return scores.i2t, scores.t2i.t()


class OnnxFile(NamedTuple):
    """One of the ONNX files."""

    name: str
    what: str
    module: nn.Module
    shapes: tuple[dict[int, Any], ...]  # of each input, the dimensions of any size
    outputs: list[str]
    tolerance: float = TOLERANCE


@torch.no_grad()
def write_onnx(
    folder: Path, model: CMLIModel, image: Tensor, ids: Tensor, mask: Tensor
) -> list[str]:
    """Write `image.onnx` and `text.onnx`, and `scores.onnx`, which takes what they give.

    Any number of images, and of texts of at most M positions, can be given to them.

    Returns:
        Lines for the user about what was written.

    Raises:
        UserError: a tower cannot be exported, or onnxruntime computes other features.
    """
    folder.mkdir(parents=True, exist_ok=True)
    most = ids.shape[1]
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=most)
    rows, columns = {0: torch.export.Dim("images")}, {0: torch.export.Dim("texts")}
    texts = {**columns, 1: length}
    image_part = OnnxFile(
        "image",
        "the image tower, shared blocks included",
        ImageTower(model.student),
        ({0: batch},),
        ["image_embeds", "patch_embeds"],
    )
    text_part = OnnxFile(
        "text",
        "the text tower, shared blocks included",
        TextTower(model.eval()),
        ({0: batch, 1: length}, {0: batch, 1: length}),
        ["text_embeds", "token_embeds", "token_mask"],
    )
    scores_part = OnnxFile(
        "scores",
        "logits of all pairs from what both give",
        Scores(model),
        (rows, rows, columns, texts, texts),
        ["logits_per_image", "logits_per_text"],
        LOGITS_TOLERANCE,
    )
    half = most // 2
    pixels, fewer_pixels = {"pixel_values": image}, {"pixel_values": image[:1]}
    words = {"input_ids": ids, "attention_mask": mask}
    fewer_words = {"input_ids": ids[:1, :half], "attention_mask": mask[:1, :half]}
    both = {**_outputs(image_part, pixels), **_outputs(text_part, words)}
    fewer_both = {**_outputs(image_part, fewer_pixels), **_outputs(text_part, fewer_words)}
    return [
        _write_part(folder, image_part, pixels, fewer_pixels),
        _write_part(folder, text_part, words, fewer_words),
        _write_part(folder, scores_part, both, fewer_both),
    ]


def _outputs(part: OnnxFile, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(part.outputs, part.module(**inputs), strict=True))


def _write_part(
    folder: Path, part: OnnxFile, inputs: dict[str, Tensor], fewer: dict[str, Tensor]
) -> str:
    """Write one file, compare it on both inputs, and return a line for the user."""
    file = folder / f"{part.name}.onnx"
    say(f"writing {folder.name}/{file.name}, which can take a minute")
    try:
        _export(part, inputs, file)
        most = np.maximum(
            _difference(part.module, inputs, file), _difference(part.module, fewer, file)
        )
    except Exception as error:
        said = COLOURS.sub("", first_line(error))
        raise UserError(f"{file.name} cannot be exported: {said[:200]}; give --no-onnx") from None
    if not most <= part.tolerance:
        raise UserError(
            f"{str(file)!r}: onnxruntime's results differ by {most:.1e}; give --no-onnx"
        )
    return f"{folder.name}/{file.name}: {part.what}; onnxruntime within {most:.1e}"


def _export(part: OnnxFile, inputs: dict[str, Tensor], file: Path) -> None:
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            part.module.eval(),
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=part.outputs,
            dynamic_shapes=part.shapes,
            dynamo=True,
            external_data=False,
        )


def _difference(tower: nn.Module, inputs: dict[str, Tensor], file: Path) -> float:
    """The largest absolute difference of any output between PyTorch and onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    results = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        wanted = tower(*inputs.values())
    most = 0.0
    for ours, theirs in zip(wanted, results, strict=True):
        difference = np.abs(theirs.astype(np.float32) - ours.float().numpy()).max()
        most = float(np.maximum(most, difference))  # a NaN stays
    return most


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
