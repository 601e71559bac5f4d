"""Embeds pictures and captions with a model, each once on one of the ranks, and scores them.

t texts, B pictures of a batch, N patches, M tokens, H hidden size, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_cmli.cmli import cmli_scores
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import score_scales
from ds_cmli.config.schema import Config, load_config
from ds_cmli.config.source import RUN, ModelSource, evaluation_config
from ds_cmli.data.images import View, black
from ds_cmli.data.pairs import (
    NO_TOKEN,
    Bad,
    Collate,
    EvalPairs,
    Sample,
    bad_texts,
    loader,
    reason_of,
)
from ds_cmli.data.scenes import Scenes
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import DTYPES, build_models
from ds_cmli.engine.blocks import cast_buffers
from ds_cmli.errors import UserError
from ds_cmli.evaluate.summary import Metrics
from ds_cmli.files import read_json
from ds_cmli.hardware import one_attention_on_all_gpus
from ds_cmli.losses.objective import Objective
from ds_cmli.models import hf
from ds_cmli.scores import DirectionScores, all_kinds

FILLER = -1  # the number of an item that only pads a rank's items to the number of rank 0's
Reasons = dict[int, str]  # why pictures or texts cannot be used, by number


class Embedding(NamedTuple):
    """One picture or text, on the CPU, of unit length."""

    cls: Tensor  # [H]
    parts: Tensor  # [N, D] of patches, or [M, D] of valid tokens


class PaddedTexts(NamedTuple):
    cls: Tensor  # [t, H]
    tokens: Tensor  # [t, M, D]
    token_mask: Tensor  # bool [t, M], False for padding


@dataclass
class PictureFiles:
    """Pictures that are no data set's, each with a caption or another label."""

    view: View
    rows: list[tuple[Any, Any]]  # picture, a path or as `View` takes it, and caption of each pair

    def image(self, row: int) -> Tensor:
        picture, _ = self.rows[row]
        return self.view(picture)

    def name(self, row: int) -> str:
        return self.rows[row][0].name


EvalSet = EvalPairs | Scenes | PictureFiles


@dataclass
class Evaluator:
    """A model, and how it embeds and scores."""

    model: Objective | hf.CMLIModel
    tokenizer: CaptionTokenizer
    device: torch.device
    batch_size: int = 50
    workers: int = 0
    # Called before every batch and block, equally often on all ranks, so that it may be collective.
    heartbeat: Callable[[], None] = lambda: None
    worker_init: Callable[[int], None] | None = None
    trained: bool = True  # False: temperatures are untrained, so no scores are combined

    def __post_init__(self) -> None:
        one_attention_on_all_gpus()  # as in training
        self.student = self.model.student
        self.precision = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        # 1/temperature of each kind of scores that the losses compare.
        self.scales = score_scales(self.model.scales())  # collective under ZeRO-3
        self.kinds = ["global"]
        if "cmli" in self.scales:
            self.kinds += ["cmli", "combined"] if self.trained else ["cmli"]

    def images(
        self, pictures: Any, numbers: list[int]
    ) -> Iterator[tuple[list[int], Tensor, Tensor, Reasons]]:
        """Embed `pictures.image(number)` for each number, batch by batch.

        All ranks give equally many numbers. Yields the numbers of usable pictures, their class
        tokens [B, H] and patches [B, N, D], and `Reasons` of the others.
        """

        def collate(batch: list[int]) -> tuple[Tensor, list[int], Reasons]:
            images = {number: black(pictures.view.size) for number in batch}
            reasons = Reasons()
            for number in batch:
                try:
                    if number != FILLER:
                        images[number] = pictures.image(number)
                except UserError:
                    raise
                except Exception as error:  # decoders raise nearly any for damaged files
                    reasons[number] = reason_of(error)
            return torch.stack([images[number] for number in batch]), batch, reasons

        workers = min(self.workers, -(-len(numbers) // self.batch_size))
        loading = collate, workers, self.worker_init
        for images, batch, reasons in loader(numbers, *loading, batch_size=self.batch_size):
            self.heartbeat()
            cls, patches = self.student.image_embeddings(images.to(self.device, non_blocking=True))
            # By row of the batch, as the features are.
            usable = [number != FILLER and number not in reasons for number in batch]
            yield [*compress(batch, usable)], cls[usable], patches[usable], reasons

    def texts(
        self, texts: Mapping[int, str], max_texts: int
    ) -> tuple[dict[int, Embedding], Reasons]:
        """Embed texts by number, and return also why others cannot be used.

        max_texts: the number of texts of the rank that has most; every rank runs as many batches.
        """
        samples: list[Sample] = []
        reasons = Reasons()
        for number, text in texts.items():
            is_unicode = text.encode(errors="ignore").decode() == text
            sample = Sample(black(0), self.tokenizer(text if is_unicode else ""), number, 0)
            if any(sample.tokens.valid):
                samples.append(sample)
            else:
                reasons[number] = NO_TOKEN if is_unicode else "caption that is no Unicode"
        samples += [Sample(black(0), self.tokenizer("a"), FILLER, 0)] * (max_texts - len(samples))
        embedded: dict[int, Embedding] = {}
        for start in range(0, max_texts, self.batch_size):
            self.heartbeat()
            batch = Collate(self.tokenizer)(samples[start : start + self.batch_size])
            inputs = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
            cls, tokens = (x.cpu() for x in self.student.text_embeddings(*inputs))  # CPU-GPU sync
            for row, number in enumerate(batch.index.tolist()):
                embedded[number] = Embedding(cls[row], tokens[row, batch.token_mask[row]])
        embedded.pop(FILLER, None)
        return embedded, reasons

    def scores(self, images: Sequence[Embedding], texts: PaddedTexts) -> dict[str, DirectionScores]:
        """Return each of `kinds` for all pictures and texts, fp32 [I, J] each, on the device."""
        image_cls, patches = (torch.stack(x).to(self.device) for x in zip(*images, strict=True))
        text_cls, tokens, token_mask = (tensor.to(self.device) for tensor in texts)
        cmli = cmli_scores(patches, tokens, token_mask) if "cmli" in self.kinds else None
        kinds = all_kinds(image_cls @ text_cls.t(), cmli, self.scales)
        return {kind: kinds[kind] for kind in self.kinds}


def load_evaluator(
    source: ModelSource, device: torch.device, precision: str | None, ema: bool = False, **size: Any
) -> tuple[Config, Evaluator]:
    """Return a model's settings and its evaluator.

    Args:
        source: a run, one of its files of weights, or a model that training starts from.
        precision: None is that of a run's training, and of other models fp32.
        size: arguments of `Evaluator`.

    Raises `UserError`.
    """
    if source.is_run:
        file = source.local_folder / RUN
        config = load_config(file, "--checkpoint")
        ds_config = DeepSpeedConfig(read_json(file).get("deepspeed", {}))
        precision = precision or ds_config.precision
    else:
        config = evaluation_config(source)
    tokenizer = tokenizer_of(config.data)
    trained = source.is_run or source.is_ds_cmli
    if trained:
        weights = hf.AVERAGE if ema else source.weights or hf.WEIGHTS
        model: Any = hf.load_model(source.local_folder, weights)
    else:
        model, _ = build_models(config, tokenizer.vocab_size, pad_id=tokenizer.pad_id)
    dtype = DTYPES[precision or "fp32"]
    cast_buffers(model.student.image, dtype)  # as in training, by engine.build
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = model.to(device).eval()
    return config, Evaluator(model, tokenizer, device, trained=trained, **size)


def pad_texts(texts: Sequence[Embedding]) -> PaddedTexts:
    """Stack texts, and pad their tokens with zeros to the longest one."""
    cls, tokens = zip(*texts, strict=True)
    lengths = torch.tensor([len(text) for text in tokens])
    token_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return PaddedTexts(torch.stack(cls), pad_sequence(list(tokens), batch_first=True), token_mask)


def share_of_rank(numbers: list[int]) -> list[int]:
    """Return this rank's share of the numbers, filled up with `FILLER` to as many as rank 0's."""
    num_ranks = distributed.world_size()
    own_numbers = numbers[distributed.rank() :: num_ranks]
    return [*own_numbers, FILLER][: len(numbers[::num_ranks])]


def pictures_of(pairs: EvalSet) -> list[int]:
    """Return each caption's picture, whose number is that of its first caption."""
    first: dict[object, int] = {}
    return [first.setdefault(image, row) for row, (image, _) in enumerate(pairs.rows)]


@dataclass
class Embedded:
    """The usable pictures of this rank and their usable captions, by number."""

    pairs: EvalSet
    image_of: list[int]  # as `pictures_of`
    images: dict[int, Embedding]
    texts: dict[int, Embedding]
    captions: list[int]  # the usable ones of all ranks, sorted
    counts: Metrics  # `pairs`, `pictures`; `left_out` and `left_out_first`, names, if any were


@torch.no_grad()
def embed(evaluator: Evaluator, pairs: EvalSet) -> Embedded:
    """Embed every picture and every caption once, on one of the ranks. Collective.

    A caption belongs to the rank of its picture.
    """
    image_of = pictures_of(pairs)
    own_pictures = share_of_rank([*dict.fromkeys(image_of)])
    images: dict[int, Embedding] = {}
    bad: list[Bad] = []
    for numbers, cls, patches, reasons in evaluator.images(pairs, own_pictures):
        embeddings = map(Embedding, cls.cpu(), patches.cpu())  # CPU-GPU sync
        images |= zip(numbers, embeddings, strict=True)
        bad += [(pairs.name(number), reason) for number, reason in reasons.items()]
    is_own = {*own_pictures}
    own_rows = [row for row, picture in enumerate(image_of) if picture in is_own]
    max_texts = max(distributed.gather_objects(len(own_rows)))  # collective
    texts, reasons = evaluator.texts({row: pairs.rows[row][1] for row in own_rows}, max_texts)
    bad += [(pairs.name(row), reason) for row, reason in reasons.items()]
    texts = {row: text for row, text in texts.items() if image_of[row] in images}
    images = {number: images[number] for number in sorted({image_of[row] for row in texts})}
    gathered = distributed.gather_objects((list(texts), bad))  # collective
    rows_of_ranks, bad_of_ranks = zip(*gathered, strict=True)
    captions = sorted(chain(*rows_of_ranks))
    bad_at_load = list(getattr(pairs, "bad", ()))
    bad = [*bad_at_load, *chain(*bad_of_ranks)]
    num_pictures = len({image_of[caption] for caption in captions})
    num_left_out = len(image_of) - len(captions) + len(bad_at_load)
    counts = {"pairs": len(captions), "pictures": num_pictures}
    counts |= left_out(num_left_out, bad, num_pictures)
    return Embedded(pairs, image_of, images, texts, captions, counts)


def left_out(count: int, bad: list[Bad], num_used: int) -> Metrics:
    """Return how many cannot be used, and the names of some. Raises `UserError` if none can."""
    if not num_used:
        raise UserError("no picture can be used, for instance " + ", ".join(bad_texts(bad)))
    return {"left_out": count, "left_out_first": bad_texts(bad)} if bad else {}
