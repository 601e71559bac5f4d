"""Exports both towers, with shared blocks and projection, and the scores as ONNX files, and checks
the files.

Shapes: B images or texts, I images, J texts, N patches, M text positions, H hidden size, D
embedding dimension, S image side.
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
from ds_cmli.cmli.pair_scores import both_ways
from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.common.errors import UserError
from ds_cmli.export.modeling import CMLIModel
from ds_cmli.models.student import Student

NEEDS = ("onnxscript", "onnxruntime")
WHAT = {
    "image": "the image tower, shared blocks included",
    "text": "the text tower, shared blocks included",
    "scores": "logits of all pairs from what both give",
}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in the messages of torch.onnx
TOLERANCE = 1e-5  # largest difference of any element of the normalised features
LOGITS_TOLERANCE = 1e-3  # of the scores, which are up to 200 times a cosine


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
    def __init__(self, model: CMLIModel):
        super().__init__()
        self.student, self.special_ids = model.student, model.config.special_ids

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 [B, M], bool [B, M] -> [B, H], [B, M, D], both of unit length, and `token_mask`,
        bool [B, M].
        """
        cls, tokens = self.student.encode_text(input_ids, attention_mask)
        mask = attention_mask
        for special in self.special_ids:
            mask = mask & (input_ids != special)
        return l2_normalize(cls), l2_normalize(self.student.projection(tokens)), mask


class Scores(nn.Module):
    def __init__(self, model: CMLIModel):
        super().__init__()
        self.scales = {kind: scale.item() for kind, scale in model.scales().items()}

    def forward(
        self,
        image_embeds: Tensor,
        patch_embeds: Tensor,
        text_embeds: Tensor,
        token_embeds: Tensor,
        token_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """[I, H], [I, N, D], [J, H], [J, M, D], bool [J, M] -> logits per image [I, J] and per text
        [J, I].
        """
        cmli = cmli_scores_reference(patch_embeds, token_embeds, token_mask)
        found = both_ways(image_embeds @ text_embeds.t(), cmli, self.scales)["combined"]
        return found.i2t, found.t2i.t()


@torch.no_grad()
def write_onnx(
    folder: Path, model: CMLIModel, image: Tensor, ids: Tensor, mask: Tensor
) -> list[str]:
    """Write `image.onnx` and `text.onnx`, for any number of images, and of texts of at most M
    positions, and `scores.onnx`, which takes what they give.

    Returns:
        Lines for the user about what was written.

    Raises:
        UserError: a tower cannot be exported, or onnxruntime computes other features.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=ids.shape[1])
    of_image, of_text = (
        ["image_embeds", "patch_embeds"],
        ["text_embeds", "token_embeds", "token_mask"],
    )
    images, texts = ImageTower(model.student), TextTower(model.eval())
    pixels, words = {"pixel_values": image}, {"input_ids": ids, "attention_mask": mask}
    one, short = (
        {"pixel_values": image[:1]},
        {name: value[:1, : ids.shape[1] // 2] for name, value in words.items()},
    )
    both = [
        dict(zip([*of_image, *of_text], [*images(**seen), *texts(**read)], strict=True))
        for seen, read in ((pixels, words), (one, short))
    ]
    rows, columns = {0: torch.export.Dim("images")}, {0: torch.export.Dim("texts")}
    pairs = rows, rows, columns, {**columns, 1: length}, {**columns, 1: length}
    files: list[tuple[str, nn.Module, dict[str, Tensor], dict[str, Tensor], tuple, list[str]]] = [
        ("image", images, pixels, one, ({0: batch},), of_image),
        ("text", texts, words, short, ({0: batch, 1: length},) * 2, of_text),
        ("scores", Scores(model), both[0], both[1], pairs, ["logits_per_image", "logits_per_text"]),
    ]
    lines = []
    for name, module, inputs, fewer, shapes, outputs in files:
        file = folder / f"{name}.onnx"
        try:
            _export(module, inputs, shapes, outputs, file)
            most = max(_difference(module, given, file) for given in (inputs, fewer))
        except Exception as error:
            said = COLOURS.sub("", str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{name}.onnx cannot be exported: {said[:200]}; give --no-onnx"
            ) from None
        if not most <= (LOGITS_TOLERANCE if name == "scores" else TOLERANCE):
            raise UserError(
                f"{str(file)!r}: onnxruntime's results differ by {most:.1e}; give --no-onnx"
            )
        lines.append(f"{folder.name}/{file.name}: {WHAT[name]}; onnxruntime within {most:.1e}")
    return lines


def _export(
    tower: nn.Module, inputs: dict[str, Tensor], shapes: tuple, outputs: list[str], file: Path
) -> None:
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
    pairs = [(a.astype(np.float32), b.float().numpy()) for a, b in zip(found, wanted, strict=True)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@contextlib.contextmanager
def _quiet() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
