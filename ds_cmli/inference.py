"""A trained student that embeds pictures and texts and scores them against each other.

    model = Model.load("runs/demo-20260101-000000")
    images, texts = model.embed_images("pictures/"), model.embed_texts(["a red car"])
    model.scores(images, texts)["combined"].t2i  # [I, J], ranks images for a text; i2t: texts

Shapes: I images, J texts, N image patches, M text positions, H hidden size, D embedding dimension,
S image side.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.common.errors import UserError, blame, printable
from ds_cmli.common.hardware import one_attention_on_all_gpus
from ds_cmli.config.schema import Config, load_config
from ds_cmli.config.sources import RUN, Source, to_evaluate
from ds_cmli.data.batch import Collate, Sample
from ds_cmli.data.images import View, black
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.engine import build_models
from ds_cmli.models import hf
from ds_cmli.models.student import Student
from ds_cmli.scores import BothWays, Match, both_ways, match

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
    tokens: Tensor  # [J, M, D]
    token_mask: Tensor  # bool [J, M], True for tokens of the text, not special ones and padding
    texts: list[str]


@dataclass
class Model:
    """A trained student that embeds and scores pictures and texts. It is made by `Model.load`."""

    config: Config
    student: Student
    scales: dict[str, float]  # 1/temperature of the scores that were trained: "global", "cmli"
    tokenizer: CaptionTokenizer
    device: torch.device

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> "Model":
        """Load a run, an export, or what else training can start from, such as a plain CLIP: a
        folder, a file of weights in a run's, or a name of the hub. Raises `UserError`.

        `device`: None means a GPU if there is one, and else the CPU.
        """
        one_attention_on_all_gpus()  # as in training
        source, run = Source(str(path)), None
        if source.is_run:
            run = hf.load(source.path, source.weights or hf.WEIGHTS, "the model")
        config = to_evaluate(source)
        words = tokenizer_of(config.data)
        if source.has_own_data:
            config = load_config(source.path / RUN, "the model")
        if run is not None:
            student, scales = run.student, run.scales()
        else:
            objective, _ = build_models(config, words.vocab_size, special=words.special)
            # No one has trained a temperature for its patches.
            student, scales = objective.student, {"global": objective.score_scales()["global"]}
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(config, student.to(chosen).eval(), scales, words, chosen)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and of columns of patches; N is their product."""
        return self.student.grid

    def read(self, picture: Picture) -> Tensor:
        """Prepare a file or an image in memory as in training -> uint8 [3, S, S]."""
        is_file = isinstance(picture, str | Path)
        with blame(f"{str(picture)!r} cannot be read" if is_file else "a picture cannot be read"):
            content = Path(picture).read_bytes() if isinstance(picture, str | Path) else picture
            return View.of(self.config.data)(content)

    @torch.inference_mode()
    def embed_images(
        self, pictures: str | Path | Sequence[Picture], batch_size: int = 32
    ) -> ImageEmbeddings:
        """Embed the pictures of a list, or of a folder and its subfolders in the order of names."""
        if isinstance(pictures, str | Path):
            path = Path(pictures)
            inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            pictures = [path] if path.is_file() else sorted(inside)
        if not pictures:
            raise UserError(f"no picture is given: give some, or a folder of {', '.join(SUFFIXES)}")
        batches = []
        for start in range(0, len(pictures), batch_size):
            pixels = torch.stack([self.read(one) for one in pictures[start : start + batch_size]])
            features = self.student.image_embeddings(pixels.to(self.device))
            batches.append([x.cpu() for x in features])  # CPU-GPU sync
        names = [str(x) if isinstance(x, str | Path) else str(i) for i, x in enumerate(pictures)]
        cls, patches = map(torch.cat, zip(*batches, strict=True))
        return ImageEmbeddings(cls, patches, names)

    @torch.inference_mode()
    def embed_texts(self, texts: str | Iterable[str], batch_size: int = 128) -> TextEmbeddings:
        """Embed texts; those longer than the context length are truncated, as in training."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no text is given: give at least one")
        for text in texts:
            if not isinstance(text, str) or printable(text) != text:
                raise UserError(f"a text is {text!r}: give a string of Unicode")
        samples = [Sample(black(0), self.tokenizer(text), i, i) for i, text in enumerate(texts)]
        whole, batches = Collate(self.tokenizer)(samples), []
        given = (x.split(batch_size) for x in (whole.input_ids, whole.attention_mask))
        for ids, mask in zip(*given, strict=True):
            features = self.student.text_embeddings(ids.to(self.device), mask.to(self.device))
            batches.append([x.cpu() for x in features])  # CPU-GPU sync
        cls, tokens = map(torch.cat, zip(*batches, strict=True))
        return TextEmbeddings(cls, tokens, whole.token_mask, texts)

    @torch.inference_mode()
    def scores(self, images: ImageEmbeddings, texts: TextEmbeddings) -> dict[str, BothWays]:
        """Score all images against all texts, on the model's device.

        Returns for each kind i2t and t2i, fp32 [I, J] each, on the CPU: "global", the cosines of
        class tokens, "cmli", and "combined", the sum of what was trained over its temperatures.
        """
        of_texts = (texts.cls, texts.tokens, texts.token_mask)
        text_cls, tokens, mask = (x.to(self.device) for x in of_texts)
        parts = []
        for part in zip(images.cls.split(SCORED), images.patches.split(SCORED), strict=True):
            cls, patches = (x.to(self.device) for x in part)
            both = cls @ text_cls.t(), *cmli_scores(patches, tokens, mask)
            parts.append([x.cpu() for x in both])
        cosines, i2t, t2i = map(torch.cat, zip(*parts, strict=True))
        return both_ways(cosines, (i2t, t2i), self.scales)

    def match(self, picture: Picture, text: str) -> Match:
        """Match each word of a text with its best patch, and each patch with its best word."""
        images, texts = self.embed_images([picture]), self.embed_texts(text)
        valid = texts.token_mask[0]
        spans = list(compress(self.tokenizer.spans(text), valid.tolist()))  # padded is the mask
        return match(texts.tokens[0][valid], images.patches[0], text, spans, self.grid)
