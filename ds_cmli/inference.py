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
        """Load a trained student, or a model that training can start from, such as a plain CLIP.

        Args:
            path: the folder of a run, of an export or of a model; a file of weights of a run; or
                the name of a model on the hub.
            device: None: a GPU if there is one, otherwise the CPU.
            batch_size: how many pictures or texts are embedded at a time.

        Raises `UserError`.
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
        """Return the number of rows and of columns of patches; N is their product."""
        return self.evaluator.student.grid

    def read(self, picture: Picture) -> Tensor:
        """Return a file or an image in memory as training prepares it, uint8 [3, S, S]."""
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
        names = [
            str(picture if isinstance(picture, str | Path) else number)
            for number, picture in enumerate(pictures)
        ]
        without_captions = [(picture, None) for picture in pictures]
        files = embed.PictureFiles(View.of(self.config.data), without_captions)
        cls_parts = []
        patch_parts = []
        for _, cls, patches, broken in self.evaluator.images(files, list(range(len(names)))):
            for number, reason in broken.items():  # The first one that cannot be read ends this.
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

        Returns i2t and t2i by kind, fp32 [I, J] each, on the CPU. The kinds are "global", the
        cosines of class tokens; "cmli"; and, if temperatures were trained, "combined", the sum of
        the kinds that have a temperature, each divided by it.
        """
        text_features = embed.PaddedTexts(texts.cls, texts.tokens, texts.token_mask)
        image_features = [*map(embed.Embedding, images.cls, images.patches)]
        blocks_by_kind = defaultdict(list)
        for start in range(0, len(image_features), MAX_SCORED):
            block = image_features[start : start + MAX_SCORED]
            scores = self.evaluator.scores(block, text_features)
            for kind, directions in scores.items():
                on_cpu = torch.stack(directions).cpu()  # [2, I, J], CPU-GPU sync
                blocks_by_kind[kind].append(on_cpu)
        return {
            kind: DirectionScores(*torch.cat(blocks, 1)) for kind, blocks in blocks_by_kind.items()
        }

    def match(self, picture: Picture, text: str) -> Match:
        """Match each word of a text with its best patch, and each patch with its best word."""
        (patches,) = self.embed_images([picture]).patches
        (tokens,) = self.embed_texts(text).tokens
        return match(self.evaluator.tokenizer, text, tokens, patches, self.grid)


def picture_files(path: Path) -> list[Path]:
    """Return the pictures of a folder and its subfolders, or a file itself. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"the pictures {str(path)!r}: no such file or folder")
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
