"""Retrieval and the pointing game of `ds-cmli-evaluate` as tasks.

Shapes: K kinds of scores, m pictures, n captions.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.utils.data import Dataset

from ds_cmli.config.schema import STRICT, DataConfig
from ds_cmli.data.bad import told
from ds_cmli.data.batch import Collate
from ds_cmli.data.load import EvalData, build_eval_data
from ds_cmli.data.opening import evaluation_data
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.evaluate.embed import Share, embed_share
from ds_cmli.evaluate.held_out import HeldOut
from ds_cmli.evaluate.metrics import RECALLS, RankCounts, chance, expected_hits
from ds_cmli.evaluate.model import EvaluatedModel
from ds_cmli.evaluate.pointing_game import Entities, phrase_sums
from ds_cmli.evaluate.report import prefixed
from ds_cmli.evaluate.retrieval import kinds, rank_counts
from ds_cmli.evaluate.suites.task import Measure, Measured


@torch.no_grad()
def recall(model: EvaluatedModel, dataset: Dataset, collate: Callable) -> Measured:
    """Recall at 1, 5 and 10 both ways; a sample is a picture with its captions.

    Args:
        dataset: a `held_out.HeldOutPairs`.

    Returns:
        `<score>/<way>_r<k>` and `<score>/mean_recall`; and `pairs`, `truncated`, the captions of
        which the model reads a part, and `left_out`, the pairs that cannot be used.

    Raises:
        UserError: no pair can be used.
    """
    held_out = HeldOut(dataset)
    share = embed_share(model.objective.student, held_out, collate, model.how)
    counts = rank_counts(share, model.scales, model.how)[""]
    out = _measured(share)
    for number, kind in enumerate(kinds(model.scales)):
        of_kind = RankCounts(counts.i2t[number], counts.t2i[number])
        out.measures |= prefixed(f"{kind}/", _recalls(of_kind, share))
    texts = [held_out.pairs.pair(row, False).tokens.text for row in held_out.rows]
    truncated = sum(map(model.tokenizer.truncates, texts))
    if truncated:
        out.notes.append(
            f"{truncated} of {len(texts)} captions have more than {model.tokenizer.positions} "
            "tokens: the rest of them is not read"
        )
    out.figures |= {"truncated": truncated, **chance(held_out.image_of[share.captions])}
    return out


def _measured(share: Share) -> Measured:
    """The numbers of pairs that were used and left out, with no metric yet."""
    out = Measured(share.held_out.images, {}, {"pairs": len(share.captions)})
    if share.left_out:
        pairs = len(share.held_out.image_of) + len(share.held_out.at_load)
        out.figures["left_out"] = pairs - len(share.captions)
        out.notes.append(f"left out: {', '.join(told(share.left_out))}")
    return out


def _recalls(counts: RankCounts, share: Share) -> dict[str, Measure]:
    """The recalls of one kind of scores, from counts [m, 3] and [n, 3]."""
    image_of = share.held_out.image_of
    captions = torch.zeros(len(image_of), dtype=torch.float64)
    captions[share.captions] = 1
    of_pictures = image_of.bincount(captions, len(counts.i2t))
    ways: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "i2t": (counts.i2t, lambda hits: hits * (of_pictures > 0)),
        "t2i": (counts.t2i, lambda hits: image_of.bincount(hits * captions, len(counts.i2t))),
    }
    out = {}
    for way, (of_queries, by_picture) in ways.items():
        queries = by_picture(torch.ones(len(of_queries), dtype=torch.float64))
        for k in RECALLS:
            above, tied, positive = of_queries.unbind(1)
            hits = by_picture(expected_hits(above, tied, positive, k))
            out[f"{way}_r{k}"] = Measure(hits[:, None], queries[:, None])
    return {**out, "mean_recall": Measure.mean(list(out.values()))}


@dataclass(config=STRICT, frozen=True)
class Retrieval:
    """Retrieval on a source of pairs, as of training: Karpathy's JSON, a folder, tars, ..."""

    data: Path
    images: Path | None = None  # the folder of the pictures that a list names
    split: Literal["val", "test", "all"] | None = None  # None: the validation part, if it has one

    def data_of(self, config: DataConfig) -> EvalData:
        """The pairs as a model with this configuration reads them. Raises `UserError`."""
        config = replace(config, source="not of this task")  # whatever the model was trained on
        config = evaluation_data(config, str(self.data))
        if self.split is not None:
            config = replace(config, val_source="")
        images = "" if self.images is None else str(self.images)
        return build_eval_data(replace(config, image_root=images), 0, self.split)

    def read(self) -> None:
        self.data_of(DataConfig(tokenizer="builtin"))

    def run(self, model: EvaluatedModel) -> Measured:
        data = self.data_of(model.config.data)
        (dataset,) = data.evals.values()
        return recall(model, dataset, data.collate)


@dataclass(config=STRICT, frozen=True)
class PointingGame:
    """The pointing game on Flickr30k Entities; a sample is a caption."""

    boxes: Path  # with Annotations/ and Sentences/
    images: Path
    split: str = "test"

    def entities(self, tokenizer: CaptionTokenizer, config: DataConfig) -> Entities:
        return Entities(str(self.boxes), str(self.images), self.split, tokenizer, config)

    def read(self) -> None:
        config = DataConfig(tokenizer="builtin")
        self.entities(tokenizer_of(config), config)

    @torch.no_grad()
    def run(self, model: EvaluatedModel) -> Measured:
        entities = self.entities(model.tokenizer, model.config.data)
        held_out = HeldOut(entities)
        collate = Collate(model.tokenizer)
        share = embed_share(model.objective.student, held_out, collate, model.how)
        sums = torch.zeros(len(held_out.image_of), 4, dtype=torch.float64)
        for caption, of_caption in phrase_sums(share, entities):
            sums[caption] = of_caption
        hits, phrases, by_chance, _ = sums.split(1, dim=1)
        out = _measured(share)
        out.samples = len(sums)
        out.measures["cmli/pointing_game"] = Measure(hits, phrases)
        out.figures["chance/pointing_game"] = Measure(by_chance, phrases).value
        return out
