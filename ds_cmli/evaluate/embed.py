"""Embeds pictures and captions with a model, each once on one of the ranks, and scores them.

t texts, B pictures of a batch, N patches, M tokens, H hidden size, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_cmli.cmli import cmli_scores
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import score_scales
from ds_cmli.config.schema import Config, load_config
from ds_cmli.config.source import RUN, ModelSource, evaluation_config
from ds_cmli.data.images import View, black, read_image_file
from ds_cmli.data.pairs import NO_TOKEN, Bad, Collate, EvalPairs, Sample, described, loader, told
from ds_cmli.data.scenes import Scenes
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import DTYPES, build_models
from ds_cmli.engine.blocks import cast_buffers
from ds_cmli.errors import UserError
from ds_cmli.evaluate.metrics import Metrics
from ds_cmli.files import read_json
from ds_cmli.hardware import one_attention_on_all_gpus
from ds_cmli.losses.objective import Objective
from ds_cmli.models import hf
from ds_cmli.scores import BothWays, both_ways

FILLER = -1  # the number of an item that only pads a rank's share to the same number of batches
Embedding = tuple[Tensor, Tensor]  # class token [H]; patches [N, D] or valid tokens [M, D]
Broken = dict[int, str]  # why pictures or texts cannot be used, by number


@dataclass
class Files:
    view: View
    rows: list[tuple[Path, Any]]  # picture and text of each caption

    def image(self, row: int) -> Tensor:
        return self.view(read_image_file(self.rows[row][0]))

    def name(self, row: int) -> str:
        return self.rows[row][0].name


HeldOut = EvalPairs | Scenes | Files


@dataclass
class Evaluator:
    """A model, and how it embeds and scores."""

    module: Objective | hf.CMLIModel
    tokenizer: CaptionTokenizer
    device: torch.device
    batch_size: int = 50
    workers: int = 0
    # Called for every batch and block, as often on every rank: it may be collective.
    heartbeat: Callable[[], None] = lambda: None
    worker_init: Callable[[int], None] | None = None
    trained: bool = True  # whether the temperatures are; else no kinds of scores are combined

    def __post_init__(self) -> None:
        one_attention_on_all_gpus()  # as in training
        self.student = self.module.student
        self.precision = str(next(self.module.parameters()).dtype).removeprefix("torch.")
        # 1/temperature of each kind of scores that the losses compare.
        self.scales = score_scales(self.module.scales())  # collective under ZeRO-3
        both = ["global", "cmli", "combined"] if self.trained else ["global", "cmli"]
        self.kinds = both if "cmli" in self.scales else ["global"]

    def images(self, pictures: Any, numbers: list[int]) -> Iterator[tuple]:
        """Embed `pictures.image(number)` of as many numbers on every rank, batch by batch.

        Yields numbers, class tokens [B, H], patches [B, N, D], and `Broken` of the others.
        """

        def collate(batch: list[int]) -> tuple[Tensor, list[int], Broken]:
            images, broken = [], Broken()
            for number in batch:
                images.append(black(pictures.view.size))
                try:
                    images[-1] = images[-1] if number == FILLER else pictures.image(number)
                except Exception as error:  # decoders raise nearly any for damaged files
                    broken[number] = described(error)
            return torch.stack(images), batch, broken

        workers = min(self.workers, -(-len(numbers) // self.batch_size))
        how = collate, workers, self.worker_init
        for images, batch, broken in loader(numbers, *how, batch_size=self.batch_size):
            self.heartbeat()
            cls, patches = self.student.image_embeddings(images.to(self.device, non_blocking=True))
            usable = [number != FILLER and number not in broken for number in batch]
            yield [*compress(batch, usable)], cls[usable], patches[usable], broken

    def texts(self, texts: Mapping[int, str], count: int) -> tuple[dict[int, Embedding], Broken]:
        """Embed texts, in as many batches as `count` of them take, the same on every rank."""
        samples, bad, out = list[Sample](), Broken(), dict[int, Embedding]()
        for number, text in texts.items():
            unicode = text.encode(errors="ignore").decode() == text
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


def load(
    source: ModelSource,
    device: torch.device,
    precision: str | None,
    ema: bool = False,
    **batches: Any,
) -> tuple[Config, Evaluator]:
    """A run, one of its files of weights, or what training starts from; and its settings.

    By default in the training's precision. `batches`: as of `Evaluator`. Raises `UserError`.
    """
    if source.has_own_data:
        config = load_config(source.path / RUN, "--checkpoint")
        ds_config = DeepSpeedConfig(read_json(source.path / RUN).get("deepspeed", {}))
        precision = precision or ds_config.precision
    else:
        config = evaluation_config(source)
    words, trained = tokenizer_of(config.data), source.has_own_data or source.is_run
    if trained:
        file = hf.AVERAGE if ema else source.weights or hf.WEIGHTS
        model: Any = hf.load_model(source.path, file)
    else:
        model, _ = build_models(config, words.vocab_size, pad_id=words.pad_id)
    dtype = DTYPES[precision or "fp32"]
    cast_buffers(model.student.image, dtype)  # as in training, by engine.build
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = model.to(device).eval()
    return config, Evaluator(model, words, device, trained=trained, **batches)


def block(texts: Sequence[Embedding]) -> tuple[Tensor, Tensor, Tensor]:
    """Class tokens [t, H], padded tokens [t, M, D], and bool [t, M], False for the padding."""
    cls, tokens = zip(*texts, strict=True)
    length = torch.tensor([len(one) for one in tokens])
    mask = torch.arange(int(length.max())) < length[:, None]
    return torch.stack(cls), pad_sequence(list(tokens), batch_first=True), mask


def share(numbers: list[int]) -> list[int]:
    """This rank's of all numbers, with fillers to be as many as rank 0's."""
    rank, ranks = distributed.rank(), distributed.world_size()
    return [*numbers[rank::ranks], FILLER][: len(numbers[::ranks])]


def pictures_of(pairs: HeldOut) -> list[int]:
    """Each caption's picture, whose number is that of its first caption."""
    first: dict[object, int] = {}
    return [first.setdefault(image, row) for row, (image, _) in enumerate(pairs.rows)]


@dataclass
class Embedded:
    """A rank's pictures and exactly their captions, as far as they can be used, by number."""

    pairs: HeldOut
    image_of: list[int]  # as `pictures_of`
    images: dict[int, Embedding]
    texts: dict[int, Embedding]
    captions: list[int]  # the usable ones of all ranks, in their order
    counts: Metrics  # `pairs`, `pictures`; `left_out` and `left_out_first`, names, if any were


@torch.no_grad()
def embed(model: Evaluator, pairs: HeldOut) -> Embedded:
    """Embed every picture and every caption once, on one of the ranks. Collective."""
    image_of, lost = pictures_of(pairs), list[Bad]()
    images, own = dict[int, Embedding](), share([*dict.fromkeys(image_of)])
    for numbers, cls, patches, broken in model.images(pairs, own):
        images |= zip(numbers, zip(cls.cpu(), patches.cpu(), strict=True), strict=True)  # sync
        lost += [(pairs.name(number), why) for number, why in broken.items()]
    here = {*own}  # a caption belongs to the rank of its picture
    written = {row: pairs.rows[row][1] for row, picture in enumerate(image_of) if picture in here}
    most = max(distributed.gather_objects(len(written)))  # collective
    texts, bad = model.texts(written, most)
    lost += [(pairs.name(row), why) for row, why in bad.items()]
    texts = {row: text for row, text in texts.items() if image_of[row] in images}
    images = {number: images[number] for number in sorted({image_of[row] for row in texts})}
    gathered = distributed.gather_objects((list(texts), lost))  # collective
    captions = sorted(row for rows, _ in gathered for row in rows)
    at_load = list(getattr(pairs, "bad", ()))
    lost = at_load + [one for _, of_rank in gathered for one in of_rank]
    pictures = len({image_of[caption] for caption in captions})
    number = len(image_of) - len(captions) + len(at_load)
    counts = {"pairs": len(captions), "pictures": pictures, **left_out(number, lost, pictures)}
    return Embedded(pairs, image_of, images, texts, captions, counts)


def left_out(number: int, lost: list[Bad], used: int) -> Metrics:
    """How many cannot be used, and the names of some. Raises `UserError` if none can."""
    if not used:
        raise UserError("no picture can be used, for instance " + ", ".join(told(lost)))
    return {"left_out": number, "left_out_first": told(lost)} if lost else {}
