"""A trained student that embeds pictures and texts and scores them against each other.

    model = Model.load("runs/demo-20260101-000000")
    images, texts = model.embed_images("pictures/"), model.embed_texts(["a red car"])
    model.scores(images, texts)["combined"].t2i  # [I, J], ranks images for a text; i2t: texts

I images, J texts, N patches, M tokens, H hidden size, D embedding dimension, S image side.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_cmli.config.schema import Config
from ds_cmli.config.source import ModelSource
from ds_cmli.data.images import Picture, View
from ds_cmli.errors import UserError
from ds_cmli.evaluate import embed
from ds_cmli.scores import DirectionScores, Match, match

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_SCORED = 256  # images that are scored at a time


@dataclass
class ImageEmbeddings:
    """The features of I images, of unit length, on the CPU."""

    cls: Tensor  # [I, H], for global scores
    patches: Tensor  # [I, N, D], for CMLI
    names: list[str]  # each picture's file, or its number if it came without a file


@dataclass
class TextEmbeddings:
    """The features of J texts, of unit length, on the CPU."""

    cls: Tensor  # [J, H]
    tokens: Tensor  # [J, M, D], without special ones
    token_mask: Tensor  # bool [J, M], False for padding
    texts: list[str]


@dataclass(repr=False)
class Model:
    """A trained student that embeds and scores pictures and texts. It is made by `Model.load`."""

    config: Config
    evaluator: embed.Evaluator

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device | None = None, batch_size: int = 50
    ) -> "Model":
        """Load a run, an export, or what else training can start from, such as a plain CLIP: a
        folder, a file of weights in a run's, or a name of the hub. Raises `UserError`.

        `device`: None means a GPU if there is one, and else the CPU.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source = ModelSource(str(path))
        return cls(*embed.load_evaluator(source, chosen, precision="fp32", batch_size=batch_size))

    def __repr__(self) -> str:
        encoders = f"{self.config.student.image_model} and {self.config.student.text_model}"
        rows, columns = self.grid
        patches = f"{rows} x {columns} patches of {self.config.data.image_size} px"
        return f"Model({encoders}, {patches}, on {self.evaluator.device})"

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and of columns of patches; N is their product."""
        return self.evaluator.student.grid

    def read(self, picture: Picture) -> Tensor:
        """Prepare a file or an image in memory as in training -> uint8 [3, S, S]."""
        return View.of(self.config.data)(picture)

    @torch.inference_mode()
    def embed_images(self, pictures: str | Path | Sequence[Picture]) -> ImageEmbeddings:
        """Embed the pictures of a list, or of a folder and its subfolders in the order of names.

        Raises `UserError` if there is none, or if one cannot be read.
        """
        if isinstance(pictures, str | Path):
            pictures = picture_files(Path(pictures))
        if not pictures:
            raise UserError(f"no picture is given: give some, or a folder of {', '.join(SUFFIXES)}")
        names = []
        for number, picture in enumerate(pictures):
            names.append(str(picture if isinstance(picture, str | Path) else number))
        rows = [(picture, None) for picture in pictures]
        files = embed.PictureFiles(View.of(self.config.data), rows)
        cls_parts = []
        patch_parts = []
        for _, cls, patches, broken in self.evaluator.images(files, [*range(len(rows))]):
            for number, reason in broken.items():
                raise UserError(f"the picture {names[number]} cannot be read: {reason}")
            cls_parts.append(cls.cpu())  # CPU-GPU sync
            patch_parts.append(patches.cpu())
        return ImageEmbeddings(torch.cat(cls_parts), torch.cat(patch_parts), names)

    @torch.inference_mode()
    def embed_texts(self, texts: str | Iterable[str]) -> TextEmbeddings:
        """Embed texts; those longer than the context length are truncated, as in training.

        Raises `UserError` if there is none, or if one has no token.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no text is given: give at least one")
        embedded, bad = self.evaluator.texts(dict(enumerate(texts)), len(texts))
        for number, reason in bad.items():
            raise UserError(f"the text {texts[number]!r} cannot be used: {reason}")
        padded = embed.pad_texts([embedded[number] for number in range(len(texts))])
        return TextEmbeddings(*padded, texts)

    @torch.inference_mode()
    def scores(self, images: ImageEmbeddings, texts: TextEmbeddings) -> dict[str, DirectionScores]:
        """Score all images against all texts, on the model's device.

        Returns for each kind i2t and t2i, fp32 [I, J] each, on the CPU: "global", the cosines of
        class tokens, "cmli", and, if temperatures were trained, "combined", the sum over them.
        """
        text_features = embed.PaddedTexts(texts.cls, texts.tokens, texts.token_mask)
        image_features = [*map(embed.Embedding, images.cls, images.patches)]
        parts = defaultdict(list)
        for start in range(0, len(image_features), MAX_SCORED):
            block = image_features[start : start + MAX_SCORED]
            scores = self.evaluator.scores(block, text_features)
            for kind, both in scores.items():
                parts[kind].append(torch.stack(both).cpu())  # [2, I, J], CPU-GPU sync
        return {kind: DirectionScores(*torch.cat(blocks, 1)) for kind, blocks in parts.items()}

    def match(self, picture: Picture, text: str) -> Match:
        """Match each word of a text with its best patch, and each patch with its best word."""
        (patches,) = self.embed_images([picture]).patches
        (tokens,) = self.embed_texts(text).tokens
        return match(self.evaluator.tokenizer, text, tokens, patches, self.grid)


def picture_files(path: Path) -> list[Path]:
    """Return the pictures of a folder and its subfolders, or the file itself."""
    if not path.exists():
        raise UserError(f"the pictures {str(path)!r}: no such file or folder")
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
