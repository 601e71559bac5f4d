"""A trained student that embeds pictures and texts and scores them against each other.

    model = Model.load("runs/demo-20260101-000000")
    images, texts = model.embed_images("pictures/"), model.embed_texts(["a red car"])
    model.scores(images, texts)["combined"].t2i  # [I, J], ranks images for a text; i2t: texts

I images, J texts, N patches, M tokens, H hidden size, D embedding dimension, S image side.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_cmli.config.schema import Config
from ds_cmli.config.source import Source
from ds_cmli.data.images import View, read_image_file
from ds_cmli.errors import UserError
from ds_cmli.evaluate.embed import Evaluator, block, load
from ds_cmli.scores import BothWays, Match, match

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SCORED = 256  # images that are scored at a time
Picture = str | Path | Image.Image | np.ndarray | Tensor


@dataclass
class ImageEmbeddings:
    """Of I images, on the CPU, of unit length."""

    cls: Tensor  # [I, H], for global scores
    patches: Tensor  # [I, N, D], for CMLI
    names: list[str]  # each picture's file, or its number if it came without a file


@dataclass
class TextEmbeddings:
    """Of J texts, on the CPU, of unit length."""

    cls: Tensor  # [J, H]
    tokens: Tensor  # [J, M, D], without special ones
    token_mask: Tensor  # bool [J, M], False for padding
    texts: list[str]


@dataclass(repr=False)
class Model:
    """A trained student that embeds and scores pictures and texts. It is made by `Model.load`."""

    config: Config
    evaluator: Evaluator

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device | None = None, batch_size: int = 50
    ) -> "Model":
        """Load a run, an export, or what else training can start from, such as a plain CLIP: a
        folder, a file of weights in a run's, or a name of the hub. Raises `UserError`.

        `device`: None means a GPU if there is one, and else the CPU.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(*load(Source(str(path)), chosen, precision="fp32", batch_size=batch_size))

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
        content = read_image_file(Path(picture)) if isinstance(picture, str | Path) else picture
        return View.of(self.config.data)(content)

    @torch.inference_mode()
    def embed_images(self, pictures: str | Path | Sequence[Picture]) -> ImageEmbeddings:
        """Embed the pictures of a list, or of a folder and its subfolders in the order of names."""
        if isinstance(pictures, str | Path):
            path = Path(pictures)
            if not path.exists():
                raise UserError(f"the pictures {str(path)!r}: no such file or folder")
            inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            pictures = [path] if path.is_file() else sorted(inside)
        if not pictures:
            raise UserError(f"no picture is given: give some, or a folder of {', '.join(SUFFIXES)}")
        names = [str(x) if isinstance(x, str | Path) else str(i) for i, x in enumerate(pictures)]
        read, view = lambda i: self.read(pictures[i]), View.of(self.config.data)
        listed, parts = SimpleNamespace(image=read, view=view), []
        for _, cls, patches, broken in self.evaluator.images(listed, [*range(len(names))]):
            for number, why in broken.items():
                raise UserError(f"the picture {names[number]} cannot be read: {why}")
            parts.append((cls.cpu(), patches.cpu()))  # CPU-GPU sync
        cls, patches = map(torch.cat, zip(*parts, strict=True))
        return ImageEmbeddings(cls, patches, names)

    @torch.inference_mode()
    def embed_texts(self, texts: str | Iterable[str]) -> TextEmbeddings:
        """Embed texts; those longer than the context length are truncated, as in training."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no text is given: give at least one")
        embedded, bad = self.evaluator.texts(dict(enumerate(texts)), len(texts))
        for number, why in bad.items():
            raise UserError(f"the text {texts[number]!r} cannot be used: {why}")
        return TextEmbeddings(*block([embedded[number] for number in range(len(texts))]), texts)

    @torch.inference_mode()
    def scores(self, images: ImageEmbeddings, texts: TextEmbeddings) -> dict[str, BothWays]:
        """Score all images against all texts, on the model's device.

        Returns for each kind i2t and t2i, fp32 [I, J] each, on the CPU: "global", the cosines of
        class tokens, "cmli", and, if temperatures were trained, "combined", the sum over them.
        """
        of_texts, parts = (texts.cls, texts.tokens, texts.token_mask), []
        pairs = [*zip(images.cls, images.patches, strict=True)]
        for start in range(0, len(pairs), SCORED):
            kinds = self.evaluator.scores(pairs[start : start + SCORED], of_texts)
            parts.append({kind: [way.cpu() for way in both] for kind, both in kinds.items()})
        every = {kind: zip(*(part[kind] for part in parts), strict=True) for kind in parts[0]}
        return {kind: BothWays(*map(torch.cat, ways)) for kind, ways in every.items()}

    def match(self, picture: Picture, text: str) -> Match:
        """Match each word of a text with its best patch, and each patch with its best word."""
        images, texts = self.embed_images([picture]), self.embed_texts(text)
        words, patches = self.evaluator.tokenizer, images.patches[0]
        return match(words, text, texts.tokens[0], patches, self.grid)
