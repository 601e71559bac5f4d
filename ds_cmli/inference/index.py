"""An index of pictures on disk that is searched by text: global scores choose candidates, which
CMLI then orders.

Shapes: I images, N image patches, H hidden size, D embedding dimension.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.pair_scores import combined
from ds_cmli.common.errors import UserError
from ds_cmli.inference.model import ImageEmbeddings, Model, Picture, TextEmbeddings, list_pictures
from ds_cmli.inference.topk import topk

FILE, VERSION = "index.json", 1
EXACT = 2000  # up to this number of images, all of them are scored by CMLI
CANDIDATES = 200  # in a larger index, as many of the best by global score are scored by CMLI
AT_A_TIME = 512  # number of images whose patches are read from disk at a time


@dataclass(frozen=True)
class Result:
    """A picture found by a text."""

    name: str  # the picture's file
    score: float  # "combined" from text to image, by which results are ordered
    global_score: float  # cosine similarity of the class tokens
    cmli_score: float  # s_t2i: the mean over the text's tokens of the similarity to the best patch


class Index:
    """Embeddings of pictures in a folder of their own, in fp16 and memory-mapped, so that they may
    exceed the memory.

    A picture takes 2 * (H + N * D) bytes.
    """

    def __init__(self, folder: str | Path):
        """Open the index in a folder; raises `UserError` if there is none."""
        self.folder = Path(folder)
        try:
            content = json.loads((self.folder / FILE).read_text())
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']!r}")
            self.model_path: str = str(content["model"])
            self.names: list[str] = content["names"]
            self.weights: str | None = content.get("weights")  # None: an earlier version's
            self.cls = np.load(self.folder / "cls.npy", mmap_mode="r")  # [I, H]
            self.patches = np.load(self.folder / "patches.npy", mmap_mode="r")  # [I, N, D]
            if not len(self.names) == len(self.cls) == len(self.patches):
                raise ValueError("its parts differ in length")
        except FileNotFoundError:
            raise UserError(
                f"the index is {str(folder)!r}: none is there; make one with --build PICTURES"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the index is {str(folder)!r}, which cannot be read ({error}): build it anew"
            ) from None

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: Model,
        pictures: str | Path | Sequence[Picture],
        model_path: str = "",
        batch_size: int = 32,
        progress: bool = False,
    ) -> tuple["Index", list[str]]:
        """Embed pictures into a new index. Returns it, and a line for each picture that was left
        out as unreadable.

        Raises:
            UserError: none of the pictures can be read, or the folder cannot be written.
        """
        folder = Path(folder)
        files: Sequence[Picture] = (
            list_pictures(pictures) if isinstance(pictures, str | Path) else pictures
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE).unlink(
                missing_ok=True
            )  # no index is found here until the new one is complete
        except OSError as error:
            raise UserError(
                f"the index is {str(folder)!r}: cannot write there: {error.strerror}"
            ) from None
        arrays: tuple[Any, Any] | None = None
        names: list[str] = []
        refused: list[str] = []
        for start in tqdm(
            range(0, len(files), batch_size), "images", disable=not progress, leave=False
        ):
            images, batch = [], []
            for number, file in enumerate(files[start : start + batch_size], start):
                try:
                    images.append(model.read(file))
                    batch.append(str(file) if isinstance(file, str | Path) else str(number))
                except UserError as error:
                    refused.append(str(error))
            if not images:
                continue
            found = model.embed_images(images, batch_size)
            if arrays is None:
                arrays = _files(folder, len(files), found)
            arrays[0][len(names) : len(names) + len(batch)] = found.cls.half().numpy()
            arrays[1][len(names) : len(names) + len(batch)] = found.patches.half().numpy()
            names += batch
        if arrays is None:
            raise UserError(
                f"none of the {len(files)} pictures can be read, for instance: {refused[0]}"
            )
        for array, name in zip(arrays, ("cls.npy", "patches.npy"), strict=True):
            array.flush()
            if len(names) < len(files):  # some pictures were left out
                np.save(folder / f"short-{name}", array[: len(names)])
                (folder / f"short-{name}").replace(folder / name)
        content = {"version": VERSION, "model": str(model_path), "names": names}
        content["weights"] = model.digest
        (folder / FILE).write_text(json.dumps(content))
        return cls(folder), refused

    def __len__(self) -> int:
        return len(self.names)

    def global_scores(self, texts: TextEmbeddings, rows: slice, columns: slice) -> Tensor:
        """Cosines of class tokens, fp32 [texts of `rows`, images of `columns`]."""
        images = torch.from_numpy(self.cls[columns].astype(np.float32))
        return upcast(texts.cls[rows]) @ images.t()

    def cmli_scores(self, texts: TextEmbeddings, numbers: Tensor) -> Tensor:
        """s_t2i, by which images are ranked for a text, fp32 [images of `numbers`, texts]."""
        out = []
        for part in numbers.split(AT_A_TIME):
            patches = torch.from_numpy(self.patches[part.numpy()]).to(texts.tokens.dtype)
            out.append(cmli_scores(patches, texts.tokens, texts.token_mask)[1])
        return torch.cat(out)

    def _check(self, model: Model) -> None:
        """Raise `UserError` if other weights than `model`'s have embedded the pictures."""
        sizes = self.cls.shape[1], self.patches.shape[1:]
        expected = (
            model.student.width,
            (model.grid[0] * model.grid[1], model.config.student.embed_dim),
        )
        if sizes != expected or self.weights not in (None, model.digest):
            raise UserError(
                f"the index {str(self.folder)!r} was built by another model, or by earlier weights of this one: "
                "give the one that built it as --model, or build it anew"
            )

    def search(
        self, model: Model, texts: str | Sequence[str], k: int = 10, candidates: int | None = None
    ) -> list[list[Result]]:
        """The k best pictures of each text, the best first.

        Args:
            candidates: how many of the best pictures by global score are scored by CMLI too. None
                means all pictures if the index has at most 2,000, or the model no trained global
                score, and else 200. The result is exact if no picture is left out.

        Raises:
            UserError: a number is below 1, candidates are given for a model without a global score,
                a text has no token, or the index was built by another model.
        """
        for name, value in (("k", k), ("candidates", candidates)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: give at least 1")
        self._check(model)
        chooses = "global" in model.scales
        if candidates is not None and not chooses:
            raise UserError(
                f"candidates is {candidates}: the model was trained without a global loss, whose scores "
                "would choose them; leave it out"
            )
        if candidates is None:
            candidates = CANDIDATES if chooses and len(self) > EXACT else len(self)
        embedded = model.embed_texts(texts)
        for text, known in zip(embedded.texts, embedded.token_mask.any(1).tolist(), strict=True):
            if not known:
                raise UserError(f"the text is {text!r}, which has no word: give one to search for")
        score = lambda rows, columns: self.global_scores(embedded, rows, columns)  # noqa: E731
        coarse, numbers = topk(score, len(embedded), len(self), max(k, candidates))
        found = []
        for j in range(len(embedded)):
            one = TextEmbeddings(
                embedded.cls[j : j + 1],
                embedded.tokens[j : j + 1],
                embedded.token_mask[j : j + 1],
                embedded.texts[j : j + 1],
                embedded.spans[j : j + 1],
            )
            order = numbers[j].sort().values  # in the order in which they lie in the file
            fine = self.cmli_scores(one, order)[:, 0]
            position = torch.searchsorted(order, numbers[j])
            fine = fine[position]
            total = combined({"global": coarse[j], "cmli": fine}, model.scales)
            best = total.argsort(descending=True, stable=True)[:k].tolist()
            found.append(
                [
                    Result(
                        self.names[numbers[j, i]],
                        total[i].item(),
                        coarse[j, i].item(),
                        fine[i].item(),
                    )
                    for i in best
                ]
            )
        return found


def _files(folder: Path, length: int, found: ImageEmbeddings) -> tuple[Any, Any]:
    """The two arrays of the index, as memory-mapped files to be filled."""
    open_file = np.lib.format.open_memmap
    cls = open_file(folder / "cls.npy", "w+", np.float16, (length, *found.cls.shape[1:]))
    return cls, open_file(
        folder / "patches.npy", "w+", np.float16, (length, *found.patches.shape[1:])
    )
