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
from ds_cmli.common.errors import UserError, one_line, printable
from ds_cmli.common.hardware import one_attention_on_all_gpus
from ds_cmli.config.schema import Config, load_config
from ds_cmli.config.sources import RUN, Source, to_evaluate
from ds_cmli.data.batch import Collate, Sample
from ds_cmli.data.images import View, black
from ds_cmli.data.tokens import CaptionTokenizer, load_tokenizer, tokenizer_of
from ds_cmli.models import hf
from ds_cmli.models.student import Student
from ds_cmli.scores import BothWays, Match, both_ways, match

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SCORED = 256  # images that are on the device at a time
Picture = str | Path | Image.Image | np.ndarray | Tensor


@dataclass
class ImageEmbeddings:
    """Of I images, on the CPU, of unit length, in the model's precision."""

    cls: Tensor  # [I, H], for global scores
    patches: Tensor  # [I, N, D], for CMLI
    names: list[str]  # each picture's file, or its number if it came without a file


@dataclass
class TextEmbeddings:
    """Of J texts, on the CPU, of unit length, in the model's precision."""

    cls: Tensor  # [J, H]
    tokens: Tensor  # [J, M, D]
    token_mask: Tensor  # bool [J, M], True for tokens of the text, not special ones and padding
    texts: list[str]
    # Of each position, as (start, end) in characters; (0, 0) for special tokens.
    spans: list[list[tuple[int, int]]]


class Model:
    """A trained student that embeds and scores pictures and texts. It is made by `Model.load`."""

    def __init__(
        self,
        config: Config,
        student: Student,
        scales: dict[str, float],
        tokenizer: CaptionTokenizer,
        device: torch.device,
    ):
        """`scales`: 1/temperature of each kind of scores that was trained: "global", "cmli"."""
        one_attention_on_all_gpus()  # as in training
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.student, self.scales = student.to(device).eval(), scales

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> "Model":
        """Load a run, an export, or what else training can start from, such as a plain CLIP.

        Args:
            path: its folder, one of its files of weights, or a name of the hub.
            device: None means a GPU if there is one, and else the CPU.

        Raises:
            UserError: it is not there, or cannot be loaded.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source = Source(str(path))
        if not source.is_run:
            from ds_cmli.engine import build_models

            config = to_evaluate(source)
            words = tokenizer_of(config.data)
            objective, _ = build_models(config, words.vocab_size, special=words.special)
            # No one has trained a temperature for its patches.
            scales = {"global": objective.score_scales()["global"]}
            return cls(config, objective.student, scales, words, chosen)
        model = hf.load(source.path, source.weights or hf.WEIGHTS, "the model")
        config = to_evaluate(source)
        data, full = config.data, config.data.padding == "full"
        words = load_tokenizer(str(source.path), data.context_length, full)
        if source.has_own_data:
            config = load_config(source.path / RUN, "the model")
        return cls(config, model.student, model.scales(), words, chosen)

    @property
    def image_size(self) -> int:
        """S in pixels."""
        return self.config.data.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and of columns of patches; N is their product."""
        return self.student.grid

    def read(self, picture: Picture) -> Tensor:
        """Prepare a file or an image in memory as in training -> uint8 [3, S, S].

        Raises:
            UserError: it cannot be read.
        """
        is_file = isinstance(picture, str | Path)
        try:
            return View.of(self.config.data)(Path(picture).read_bytes() if is_file else picture)
        except Exception as error:  # decoders of damaged files raise nearly anything
            name = repr(str(picture)) if is_file else "a picture"
            raise UserError(f"{name} cannot be read: {one_line(error)}") from None

    @torch.inference_mode()
    def embed_images(
        self, pictures: str | Path | Sequence[Picture], batch_size: int = 32
    ) -> ImageEmbeddings:
        """Embed the pictures of a list, or of a folder and its subfolders in the order of names."""
        files = list_pictures(pictures)
        cls, patches = [], []
        for start in range(0, len(files), batch_size):
            images = torch.stack([self.read(file) for file in files[start : start + batch_size]])
            image_cls, features = self.student.image_embeddings(images.to(self.device))
            cls.append(image_cls.cpu())  # CPU-GPU sync
            patches.append(features.cpu())
        names = [str(x) if isinstance(x, str | Path) else str(i) for i, x in enumerate(files)]
        return ImageEmbeddings(torch.cat(cls), torch.cat(patches), names)

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
        whole = Collate(self.tokenizer)(samples)
        cls, tokens = [], []
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            ids, mask = whole.input_ids[part], whole.attention_mask[part]
            of_texts = self.student.text_embeddings(ids.to(self.device), mask.to(self.device))
            cls.append(of_texts[0].cpu())  # CPU-GPU sync
            tokens.append(of_texts[1].cpu())
        spans = [self.tokenizer.spans(text) for text in texts]
        return TextEmbeddings(torch.cat(cls), torch.cat(tokens), whole.token_mask, texts, spans)

    @torch.inference_mode()
    def scores(self, images: ImageEmbeddings, texts: TextEmbeddings) -> dict[str, BothWays]:
        """Score all images against all texts, on the model's device.

        Returns:
            For each kind the two directions, `i2t` and `t2i`, fp32 [I, J] each, on the CPU, of
            which a row is an image's in both. "global" are the cosines of the class tokens, equal
            both ways; "cmli" are s_i2t and s_t2i, which are not; "combined" is the sum of what was
            trained, each times 1/temperature.
        """
        text_cls, tokens, mask = (
            x.to(self.device) for x in (texts.cls, texts.tokens, texts.token_mask)
        )
        parts = []
        for start in range(0, len(images.cls), SCORED):
            part = slice(start, start + SCORED)
            cmli = cmli_scores(images.patches[part].to(self.device), tokens, mask)
            cosines = images.cls[part].to(self.device) @ text_cls.t()
            parts.append([x.cpu() for x in (cosines, *cmli)])
        cosines, i2t, t2i = map(torch.cat, zip(*parts, strict=True))
        return both_ways(cosines, (i2t, t2i), self.scales)

    def match(self, picture: Picture, text: str) -> Match:
        """Match each word of a text with its best patch, and each patch with its best word."""
        images, texts = self.embed_images([picture]), self.embed_texts(text)
        valid = texts.token_mask[0]
        spans = list(compress(texts.spans[0], valid.tolist()))  # the mask is of the padded text
        return match(texts.tokens[0][valid], images.patches[0], text, spans, self.grid)


def list_pictures(pictures: str | Path | Sequence[Picture]) -> list[Picture]:
    """The pictures of a list, of a folder and its subfolders sorted by name, or a file itself."""
    if isinstance(pictures, str | Path):
        path = Path(pictures)
        inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        pictures = [path] if path.is_file() else sorted(inside)
        if not pictures:
            raise UserError(f"{str(path)!r} has no picture: give files of {', '.join(SUFFIXES)}")
    if not len(pictures):
        raise UserError("no picture is given: give at least one")
    return list(pictures)
