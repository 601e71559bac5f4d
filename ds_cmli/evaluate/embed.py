"""Embeds pictures and captions with a model, each once on one of the ranks, and scores them.

Shapes: r pictures and t texts, B of them in a batch, N patches, M tokens, H hidden size, D
embedding dimension, S image side in pixels.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ds_cmli.cmli import cmli_scores
from ds_cmli.common.errors import UserError, printable
from ds_cmli.common.hardware import one_attention_on_all_gpus
from ds_cmli.data.batch import Bad, Collate, Sample
from ds_cmli.data.images import View, black
from ds_cmli.data.pairs import NO_TOKEN, batches, described, told
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.report import Metrics
from ds_cmli.scores import BothWays, both_ways

if TYPE_CHECKING:
    from ds_cmli.losses.objective import Objective

FILLER = -1  # the number of an item that only pads a rank's share to the same number of batches
# A picture's class token [H] in fp32 and patches [N, D]; a text's and its valid tokens [M, D]: of
# unit length, the latter in the model's precision.
Embedding = tuple[Tensor, Tensor]


class HeldOut(Protocol):
    """Captions, by which all is counted, with their pictures."""

    size: int  # S

    def __len__(self) -> int: ...
    def text(self, row: int) -> str: ...
    def image(self, row: int) -> Tensor: ...  # uint8 [3, S, S]; any exception: it cannot be used
    def name(self, row: int) -> str: ...  # of the picture, for messages
    def image_id(self, row: int) -> Hashable: ...  # equal for all captions of one picture


class Files:
    """Captions of image files: a `HeldOut`."""

    def __init__(self, view: View, rows: list[tuple[Path, str]]) -> None:
        self.view, self.size, self.rows = view, view.size, rows

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, row: int) -> str:
        return self.rows[row][1]

    def image(self, row: int) -> Tensor:
        return self.view(self.rows[row][0].read_bytes())

    def name(self, row: int) -> str:
        return self.rows[row][0].name

    def image_id(self, row: int) -> Path:
        return self.rows[row][0]


@dataclass
class Evaluator:
    """A model, and how it embeds and scores.

    `heartbeat` is called for every batch and block, as often on every rank, for the detection of
    hangs; it may be collective.
    """

    objective: "Objective"
    tokenizer: CaptionTokenizer
    device: torch.device
    batch_size: int = 50
    workers: int = 0
    heartbeat: Callable[[], None] = lambda: None
    worker_init: Callable[[int], None] | None = None
    trained: bool = True  # whether the temperatures are; else no kinds of scores are combined

    def __post_init__(self) -> None:
        one_attention_on_all_gpus()  # as in training
        self.student = self.objective.student
        self.precision = str(next(self.objective.parameters()).dtype).removeprefix("torch.")
        # 1/temperature of each kind of scores that the losses compare.
        self.scales = self.objective.score_scales()  # collective under ZeRO-3
        both = ["global", "cmli", "combined"] if self.trained else ["global", "cmli"]
        self.kinds = both if "cmli" in self.scales else ["global"]

    def images(
        self, read: Callable[[int], Tensor], numbers: Sequence[int], size: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor, dict[int, str]]]:
        """Embed the pictures `read(number)`, as many numbers on every rank.

        Yields for each batch the numbers, class tokens [B, H] and patches [B, N, D], on the device,
        and why others cannot be read, by number.
        """
        pictures = Pictures(read, numbers, size)
        for items in batches(pictures, self.batch_size, self.workers, list, self.worker_init):
            self.heartbeat()
            images = torch.stack([image for _, image, _ in items]).to(self.device)
            cls, patches = self.student.image_embeddings(images)
            usable = [number != FILLER and not why for number, _, why in items]
            own = [number for number, _, why in items if number != FILLER and not why]
            broken = {number: why for number, _, why in items if why}
            yield own, cls[usable], patches[usable], broken

    def texts(self, texts: Mapping[int, str], count: int) -> tuple[dict[int, Embedding], dict]:
        """Embed texts, in as many batches as `count` of them take, the same on every rank.

        Returns also why others cannot be used.
        """
        samples, bad, out = list[Sample](), dict[int, str](), dict[int, Embedding]()
        for number, text in texts.items():
            unicode = printable(text) == text
            sample = Sample(black(0), self.tokenizer(text if unicode else ""), number, 0)
            if any(sample.tokens.valid):
                samples.append(sample)
            else:
                bad[number] = NO_TOKEN if unicode else "caption that is no Unicode"
        samples += [Sample(black(0), self.tokenizer("a"), FILLER, 0)] * (count - len(samples))
        for start in range(0, count, self.batch_size):
            self.heartbeat()
            batch = Collate(self.tokenizer)(samples[start : start + self.batch_size])
            ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
            cls, tokens = (x.cpu() for x in self.student.text_embeddings(ids, mask))  # sync
            for row, number in enumerate(batch.index.tolist()):
                out[number] = cls[row], tokens[row, batch.token_mask[row]]
        out.pop(FILLER, None)
        return out, bad

    def scores(self, images: Sequence[Embedding], texts: Sequence[Tensor]) -> dict[str, BothWays]:
        """Each of `kinds` for pictures and a `block` of texts, on the device."""
        cls, patches = (torch.stack(part).to(self.device) for part in zip(*images, strict=True))
        text_cls, tokens, token_mask = (part.to(self.device) for part in texts)
        cmli = cmli_scores(patches, tokens, token_mask) if "cmli" in self.kinds else None
        both = both_ways(cls @ text_cls.t(), cmli, self.scales)
        return {kind: both[kind] for kind in self.kinds}


def block(texts: Sequence[Embedding]) -> tuple[Tensor, Tensor, Tensor]:
    """Class tokens [t, H], padded tokens [t, M, D], and bool [t, M], False for the padding."""
    cls, tokens = zip(*texts, strict=True)
    length = torch.tensor([len(one) for one in tokens])
    mask = torch.arange(int(length.max())) < length[:, None]
    return torch.stack(cls), pad_sequence(list(tokens), batch_first=True), mask


@dataclass
class Pictures(Dataset):
    """A map-style data set of (number, picture, why it cannot be read)."""

    read: Callable[[int], Tensor]
    numbers: Sequence[int]
    size: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, Tensor, str]:
        number, why = self.numbers[index], ""
        if number != FILLER:
            try:
                return number, self.read(number), why
            except Exception as error:  # decoders raise nearly any exception for damaged files
                why = described(error)
        return number, black(self.size), why


def share(count: int) -> list[int]:
    """This rank's numbers below `count`, with fillers to be as many as rank 0's."""
    rank, ranks = distributed.rank(), distributed.world_size()
    own = list(range(rank, count, ranks))
    return own + [FILLER] * (-(-count // ranks) - len(own))


@dataclass
class Embedded:
    """A rank's pictures and exactly their captions, as far as they can be used, by number."""

    pairs: HeldOut
    image_of: list[int]  # the number of each caption's picture
    images: dict[int, Embedding]
    texts: dict[int, Embedding]
    captions: list[int]  # the usable ones of all ranks, in their order
    counts: Metrics  # `pairs`, `pictures`, and `left_out` and the names of some if any were


def picture_numbers(pairs: HeldOut) -> list[int]:
    """The number of each caption's picture, in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(pairs.image_id(row), len(numbers)) for row in range(len(pairs))]


@torch.no_grad()
def embed(model: Evaluator, pairs: HeldOut) -> Embedded:
    """Embed every picture and every caption once, on one of the ranks. Collective.

    Raises:
        UserError: on every rank, if no pair can be used.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    image_of = picture_numbers(pairs)
    first = {number: row for row, number in reversed([*enumerate(image_of)])}  # a caption of each
    images, lost = dict[int, Embedding](), list[Bad]()
    read = lambda number: pairs.image(first[number])  # noqa: E731
    for numbers, cls, patches, broken in model.images(read, share(len(first)), pairs.size):
        images |= zip(numbers, zip(cls.cpu(), patches.cpu(), strict=True), strict=True)  # sync
        lost += [(pairs.name(first[number]), why) for number, why in broken.items()]
    # A caption belongs to the rank of its picture.
    own = {row: pairs.text(row) for row, number in enumerate(image_of) if number % ranks == rank}
    most = max(Counter(number % ranks for number in image_of).values())
    texts, bad = model.texts(own, most)
    lost += [(pairs.name(row), why) for row, why in bad.items()]
    texts = {row: text for row, text in texts.items() if image_of[row] in images}
    images = {number: images[number] for number in sorted({image_of[row] for row in texts})}
    gathered = distributed.gather_objects((list(texts), lost))  # collective
    captions = sorted(row for rows, _ in gathered for row in rows)
    at_load = list(getattr(pairs, "bad", ()))
    lost = [*at_load, *(one for _, of_rank in gathered for one in of_rank)]
    if not captions:
        raise UserError("no pair can be used, for instance " + ", ".join(told(lost)))
    pictures = len({image_of[caption] for caption in captions})
    counts: Metrics = {"pairs": len(captions), "pictures": pictures}
    if lost:
        left_out = len(image_of) - len(captions) + len(at_load)
        counts |= {"left_out": left_out, "left_out_first": told(lost)}
    return Embedded(pairs, image_of, images, texts, captions, counts)
