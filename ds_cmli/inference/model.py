"""A trained student that embeds pictures and texts and scores them against each other.

Shapes: I images, J texts, N image patches, M text positions, H hidden size, D embedding dimension,
S image side.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.op import upcast
from ds_cmli.common.errors import UserError, one_line, printable
from ds_cmli.common.hardware import one_attention_on_all_gpus
from ds_cmli.config.schema import Config, load_config
from ds_cmli.data.batch import Collate, Sample
from ds_cmli.data.images import View, black
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.losses.objective import Objective
from ds_cmli.models.student import Student
from ds_cmli.scores import BothWays, Match, both_ways, match

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
PictureInput = str | Path | Image.Image | np.ndarray | Tensor


@dataclass
class ImageEmbeddings:
    """Embeddings of I images, on the CPU, of unit length, in the model's precision."""

    cls: Tensor  # [I, H], for global scores
    patches: Tensor  # [I, N, D], for CMLI
    names: list[str]  # each picture's file, or its number if it came without a file

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class TextEmbeddings:
    """Embeddings of J texts, on the CPU, of unit length, in the model's precision."""

    cls: Tensor  # [J, H]
    tokens: Tensor  # [J, M, D]
    token_mask: Tensor  # bool [J, M], True for tokens of the text, not special ones and padding
    texts: list[str]
    # Of each position, as (start, end) in characters; (0, 0) for special tokens.
    spans: list[list[tuple[int, int]]]

    def __len__(self) -> int:
        return len(self.texts)


class Model:
    """A trained student that embeds and scores pictures and texts. It is made by `Model.load`."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        tokenizer: CaptionTokenizer,
        device: torch.device,
    ):
        one_attention_on_all_gpus()  # as in training
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.objective = objective.to(device).eval()
        self.collate = Collate(tokenizer)

    @cached_property
    def scales(self) -> dict[str, float]:
        """1/temperature of each kind of scores that was trained: "global", "cmli"."""
        return self.objective.score_scales()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        tokenizer: str | None = None,
    ) -> "Model":
        """Load the student of a run or of an exported model.

        Args:
            path: a run's output folder, with `config.json` and `student.safetensors`, or a folder
                that `python -m ds_cmli.export` has written.
            device: None means a GPU if there is one, and else the CPU.
            tokenizer: used instead of the run's, for instance if its path does not
                exist here.

        Raises:
            UserError: there is no such run, or it cannot be loaded.
        """
        from ds_cmli.checkpoint.weights import load_student
        from ds_cmli.export.folder import is_exported, load_exported

        path = Path(path)
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if is_exported(path):
            config, objective = load_exported(path)
            words = tokenizer_of(config.data, tokenizer or str(path))
            return cls(config, objective, words, chosen)
        config = load_config(path / "config.json", "the model")
        words = tokenizer_of(config.data, tokenizer)
        objective = load_student(path, config, words, setting="the model")
        config.loss = objective.config
        return cls(config, objective, words, chosen)

    @property
    def student(self) -> Student:
        return self.objective.student

    @property
    def image_size(self) -> int:
        """S in pixels. The shorter side of a picture is resized to it, and the centre cropped."""
        return self.config.data.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and of columns of patches; N is their product."""
        return self.student.grid

    def read(self, picture: PictureInput) -> Tensor:
        """Prepare a file, or what `data.images.View` takes, as in training -> uint8 [3, S, S].

        Raises:
            UserError: the picture cannot be read.
        """
        try:
            view = View.of(self.config.data)
            if isinstance(picture, str | Path):
                return view(Path(picture).read_bytes())
            return view(picture)
        except Exception as error:  # decoders of damaged files raise nearly anything
            name = repr(str(picture)) if isinstance(picture, str | Path) else "a picture"
            raise UserError(f"{name} cannot be read: {one_line(error)}") from None

    @torch.inference_mode()
    def embed_images(
        self, pictures: str | Path | Sequence[PictureInput], batch_size: int = 32
    ) -> ImageEmbeddings:
        """Embed the pictures of a list, or of a folder and its subfolders in the order of names."""
        files = list_pictures(pictures)
        cls, patches = [], []
        for start in _steps(len(files), batch_size, "images"):
            images = torch.stack([self.read(file) for file in files[start : start + batch_size]])
            image_cls, features = self.student.image_embeddings(images.to(self.device))
            cls.append(image_cls.cpu())  # CPU-GPU sync
            patches.append(features.cpu())
        names = [name_of(file, number) for number, file in enumerate(files)]
        return ImageEmbeddings(torch.cat(cls), torch.cat(patches), names)

    @torch.inference_mode()
    def embed_texts(self, texts: str | Iterable[str], batch_size: int = 128) -> TextEmbeddings:
        """Embed texts; those longer than the context length are truncated, as in training."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no text is given: give at least one")
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"a text is {type(text).__name__} {text!r}: give a string")
            if printable(text) != text:
                raise UserError(f"a text is {text!r}, which is no Unicode: give whole characters")
        samples = [Sample(black(0), self.tokenizer(text), i, i) for i, text in enumerate(texts)]
        whole = self.collate(samples)
        cls, tokens = [], []
        for start in _steps(len(texts), batch_size, "texts"):
            part = slice(start, start + batch_size)
            ids = whole.input_ids[part].to(self.device)
            mask = whole.attention_mask[part].to(self.device)
            text_cls, features = self.student.text_embeddings(ids, mask)
            cls.append(text_cls.cpu())  # CPU-GPU sync
            tokens.append(features.cpu())
        spans = [self.tokenizer.spans(text) for text in texts]
        return TextEmbeddings(torch.cat(cls), torch.cat(tokens), whole.token_mask, texts, spans)

    def scores(self, images: ImageEmbeddings, texts: TextEmbeddings) -> dict[str, BothWays]:
        """Score all images against all texts; "combined" by `t2i` ranks images for a text.

        Returns:
            For each kind the two directions, `i2t` and `t2i`, fp32 [I, J] each, of which a row is
            an image's in both. "global" are the cosines of the class tokens, equal both ways;
            "cmli" are s_i2t and s_t2i, which are not; "combined" is the sum of what was
            trained, each times 1/temperature.
        """
        with torch.inference_mode():
            cosines = upcast(images.cls) @ upcast(texts.cls).t()
            cmli = cmli_scores(images.patches, texts.tokens, texts.token_mask)  # [I, J] each
            return both_ways(cosines, cmli, self.scales)

    def match(self, picture: PictureInput, text: str) -> Match:
        """Match each word of a text with its best patch, and each patch with its best word."""
        images, texts = self.embed_images([picture]), self.embed_texts(text)
        valid = texts.token_mask[0]
        spans = list(compress(texts.spans[0], valid.tolist()))  # the mask is of the padded text
        return match(texts.tokens[0][valid], images.patches[0], text, spans, self.grid)


def name_of(picture: PictureInput, number: int) -> str:
    """A picture's file, or its number where it comes without one."""
    return str(picture) if isinstance(picture, str | Path) else str(number)


def list_pictures(pictures: str | Path | Sequence[PictureInput]) -> list[PictureInput]:
    """The pictures of a list, of a folder and its subfolders sorted by name, or a file itself."""
    if not isinstance(pictures, str | Path):
        return list(pictures)
    folder, path = pictures, Path(pictures)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{str(folder)!r}: no such file or folder of pictures")
    files: list[PictureInput] = []
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in SUFFIXES and file.is_file():
            files.append(file)
    if not files:
        raise UserError(
            f"{str(folder)!r} has no picture: give a folder with {', '.join(SUFFIXES)} files"
        )
    return files


def _steps(length: int, batch_size: int, kind: str) -> range:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: give at least 1")
    if not length:
        raise UserError(f"no {kind} are given: give at least one")
    return range(0, length, batch_size)
