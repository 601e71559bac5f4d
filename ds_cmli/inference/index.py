"""An index of pictures on disk that is searched by text: global scores choose, CMLI orders.

Shapes: I images, J texts, N image patches, H hidden size, D embedding dimension, k results.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.pair_scores import combined
from ds_cmli.common import checksums
from ds_cmli.common.errors import UserError
from ds_cmli.config.validation import check_kind
from ds_cmli.inference.model import Model, PictureInput, TextEmbeddings, list_pictures, name_of

FILE, VERSION = "index.json", 1
SUMS = "sums.npy"  # the checksum of each picture's patches, which may be too many to read whole
EXACT = 2000  # up to this number of images, all of them are scored by CMLI
CANDIDATES = 200  # in a larger index, as many of the best by global score are scored by CMLI
AT_A_TIME = 512  # number of images whose patches are read from disk at a time
BLOCK = 1 << 22  # number of scores in memory at a time: 16 MB in fp32


@dataclass(frozen=True)
class Result:
    """A picture found by a text."""

    name: str  # the picture's file
    score: float  # "combined" from text to image, by which results are ordered
    global_score: float  # cosine similarity of the class tokens
    cmli_score: float  # s_t2i: the mean over the text's tokens of the similarity to the best patch
    flair_score: float | None = None  # of a model that was trained with it


class Index:
    """Embeddings of pictures in a folder, in fp16 and memory-mapped: they may exceed the memory.

    A picture takes 2 * (H + N * D) bytes.
    """

    def __init__(self, folder: str | Path):
        """Open the index in a folder; raises `UserError` if there is none."""
        self.folder = Path(folder)
        where = f"the index is {str(folder)!r}"
        try:
            content = checksums.read(self.folder / FILE)
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']!r}")
            self.model_path: str = str(content["model"])
            check_kind("names", content["names"], list[str])
            self.names: list[str] = content["names"]
            self.weights: str | None = content.get("weights")  # None: an earlier version's
            self.cls = np.load(self.folder / "cls.npy", mmap_mode="r")  # [I, H]
            self.patches = np.load(self.folder / "patches.npy", mmap_mode="r")  # [I, N, D]
            if not len(self.names) == len(self.cls) == len(self.patches):
                raise ValueError("its parts differ in length")
            if (self.cls.ndim, self.patches.ndim) != (2, 3):
                raise ValueError("its parts have other dimensions")
            self.sums: np.ndarray | None = None  # of each picture's patches, [I]
            if "files" in content:  # not in an earlier version's
                for name, digest in content["files"].items():
                    if checksums.of_file(self.folder / name) != digest:
                        raise ValueError(f"{name} does not agree with its checksum")
                self.sums = np.load(self.folder / SUMS)
        except FileNotFoundError:
            raise UserError(f"{where}: none is there; make one with --build PICTURES") from None
        except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
            raise UserError(f"{where}, which cannot be read ({error}): build it anew") from None

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: Model,
        pictures: str | Path | Sequence[PictureInput],
        model_path: str = "",
        batch_size: int = 32,
        progress: bool = False,
    ) -> tuple["Index", list[str]]:
        """Embed pictures into a new index.

        Returns:
            The index, and a line for each picture that was left out as unreadable.

        Raises:
            UserError: none of the pictures can be read, or the folder cannot be written.
        """
        folder = Path(folder)
        files = list_pictures(pictures)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # No index is found here until the new one is complete.
            (folder / FILE).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"the index is {str(folder)!r}: cannot write there: {error.strerror}"
            ) from None
        arrays = _Arrays(folder, len(files))
        names: list[str] = []
        refused: list[str] = []
        starts = range(0, len(files), batch_size)
        for start in tqdm(starts, "images", disable=not progress, leave=False):
            images: list[PictureInput] = []
            for number, file in enumerate(files[start : start + batch_size], start):
                try:
                    images.append(model.read(file))
                    names.append(name_of(file, number))
                except UserError as error:
                    refused.append(str(error))
            if images:
                embedded = model.embed_images(images, batch_size)
                patches, mask = embedded.patches, embedded.patch_mask
                if mask is not None:
                    # s_t2i is a mean of maxima over patches, which repeated ones do not change.
                    patches = torch.where(mask[..., None], patches, patches[:, :1])
                arrays.append(embedded.cls, patches)
        if not names:
            raise UserError(
                f"none of the {len(files)} pictures can be read, for instance: {refused[0]}"
            )
        arrays.close()
        content = {"version": VERSION, "model": str(model_path), "names": names}
        content["weights"] = model.digest
        content["files"] = {name: checksums.of_file(folder / name) for name in ("cls.npy", SUMS)}
        (folder / FILE).write_text(json.dumps(checksums.sealed(content)))
        return cls(folder), refused

    def __len__(self) -> int:
        return len(self.names)

    def fine_scores(
        self, model: Model, texts: TextEmbeddings, j: int, numbers: Tensor
    ) -> dict[str, Tensor]:
        """s_t2i as "cmli", and "flair" where it was trained, by which images are ranked for text j.

        fp32 [images of `numbers`].
        """
        tokens, mask = texts.tokens[j : j + 1], texts.token_mask[j : j + 1]
        parts: dict[str, list[Tensor]] = {"cmli": []}
        for part in numbers.split(AT_A_TIME):
            stored = self.patches[part.numpy()]
            if self.sums is not None and (_sums(stored) != self.sums[part.numpy()]).any():
                raise UserError(
                    f"the index is {str(self.folder)!r}, whose patches.npy does not agree with its "
                    "checksums: build it anew"
                )
            patches = torch.from_numpy(stored).to(tokens.dtype)
            parts["cmli"].append(cmli_scores(patches, tokens, mask)[1][:, 0])
            if model.flair is not None:
                present = None
                if model.config.data.aspect_patch:  # the others repeat the first, see `build`
                    present = (patches != patches[:, :1]).any(2)
                    present[:, 0] = True
                scores = model.flair(patches, texts.cls[j : j + 1], patch_mask=present)
                parts.setdefault("flair", []).append(scores[:, 0])
        return {kind: torch.cat(scores) for kind, scores in parts.items()}

    def _check(self, model: Model) -> None:
        """Raise `UserError` if other weights than `model`'s have embedded the pictures."""
        rows, columns = model.grid
        expected = model.student.width, (rows * columns, model.config.student.embed_dim)
        sizes = self.cls.shape[1], self.patches.shape[1:]
        if sizes != expected or self.weights not in (None, model.digest):
            raise UserError(
                f"the index {str(self.folder)!r} was built by another model, or by earlier weights "
                "of this one: give the model that built it as --model, or build it anew"
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
                f"candidates is {candidates}: the model was trained without a global loss, whose "
                "scores would choose them; leave it out"
            )
        if candidates is None:
            candidates = CANDIDATES if chooses and len(self) > EXACT else len(self)
        embedded = model.embed_texts(texts)
        for text, known in zip(embedded.texts, embedded.token_mask.any(1).tolist(), strict=True):
            if not known:
                raise UserError(f"the text is {text!r}, which has no word: give one to search for")

        def score(rows: slice, columns: slice) -> Tensor:
            images = torch.from_numpy(self.cls[columns].astype(np.float32))
            return upcast(embedded.cls[rows]) @ images.t()  # cosines of class tokens

        coarse, numbers = topk(score, len(embedded), len(self), max(k, candidates))
        results = []
        for j in range(len(embedded)):
            order = numbers[j].sort().values  # in the order in which they lie in the file
            place = torch.searchsorted(order, numbers[j])
            kinds = {"global": coarse[j]}
            for kind, fine in self.fine_scores(model, embedded, j, order).items():
                kinds[kind] = fine[place]
            total = combined(kinds, model.scales)
            best = []
            for i in total.argsort(descending=True, stable=True)[:k].tolist():
                scores = [of_kind[i].item() for of_kind in (total, *kinds.values())]
                best.append(Result(self.names[numbers[j, i]], *scores))
            results.append(best)
        return results


class _Arrays:
    """The two arrays of a new index: memory-mapped files that are filled."""

    def __init__(self, folder: Path, most: int):
        """`most`: the number of pictures, if all of them can be read."""
        self.folder, self.most, self.length = folder, most, 0
        self.arrays: dict[str, np.memmap] = {}
        self.sums: list[np.ndarray] = []

    def append(self, cls: Tensor, patches: Tensor) -> None:
        """[B, H], [B, N, D]: the embeddings of the next pictures."""
        for name, values in (("cls.npy", cls), ("patches.npy", patches)):
            if name not in self.arrays:
                shape = (self.most, *values.shape[1:])
                self.arrays[name] = np.lib.format.open_memmap(
                    self.folder / name, "w+", np.float16, shape
                )
            self.arrays[name][self.length : self.length + len(values)] = values.half().numpy()
        end = self.length + len(cls)
        self.sums.append(_sums(self.arrays["patches.npy"][self.length : end]))
        self.length = end

    def close(self) -> None:
        for name, array in self.arrays.items():
            array.flush()
            if self.length < self.most:  # some pictures were left out
                np.save(self.folder / f"short-{name}", array[: self.length])
                (self.folder / f"short-{name}").replace(self.folder / name)
        np.save(self.folder / SUMS, np.concatenate(self.sums))


def _sums(rows: np.ndarray) -> np.ndarray:
    """The checksum of each of some rows, [I, ...] -> uint32 [I]."""
    sums = np.empty(len(rows), np.uint32)
    for number, row in enumerate(rows):
        sums[number] = zlib.crc32(row.tobytes())
    return sums


def topk(
    score: Callable[[slice, slice], Tensor], rows: int, columns: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, without holding the matrix of all scores.

    Args:
        score: computes a block of scores, [rows of the first slice, columns of the second slice].
        k: the number of results of each row, at most `columns`.

    Returns:
        Values and int64 column numbers, [rows, k] each, the best first. Of equal scores the lower
        number comes first.
    """
    k = min(k, columns)
    width = min(columns, max(k, 1 << 12))
    height = max(1, BLOCK // width)
    values, numbers = [], []
    for top in range(0, rows, height):
        down = slice(top, min(rows, top + height))
        best = torch.empty(down.stop - down.start, 0)
        where = torch.empty(best.shape, dtype=torch.int64)
        for left in range(0, columns, width):
            across = slice(left, min(columns, left + width))
            block = score(down, across)
            place = torch.arange(across.start, across.stop).expand(block.shape)
            best, where = torch.cat([best, block], 1), torch.cat([where, place], 1)
            # A stable sort keeps the lower number first among equal scores.
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, where = best[:, :k], where.gather(1, order[:, :k])
        values.append(best)
        numbers.append(where)
    return torch.cat(values), torch.cat(numbers)
