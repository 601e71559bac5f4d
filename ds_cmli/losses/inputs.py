"""What losses are computed from: the features of a batch, and the scores of its pairs.

Shapes: B images per rank, each with W texts of its own; C = B * W texts, image by image; P ranks,
G = C * P texts; N patches, M text positions, H student width, H_t teacher width, D embedding
dimension.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import Own, upcast
from ds_cmli.cmli.cut import Cut, as_loss
from ds_cmli.cmli.inputs import full_precision
from ds_cmli.cmli.loss import l2_normalize, score_global_batch
from ds_cmli.cmli.ring import Score
from ds_cmli.cmli.token_keep import select
from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import LossConfig
from ds_cmli.data.batch import ABSENT, Batch
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses import functions, own_texts
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Targets


@dataclass
class Features:
    """The student's features of a batch, not normalised, in the model's precision."""

    image_cls: Tensor  # [B, H]
    patches: Tensor  # [B, N, H]
    text_cls: Tensor  # [C, H]
    tokens: Tensor  # [C, M, H], padding and special tokens included
    # int64 [B, N], where these patches are in the image; None: they are all.
    places: Tensor | None = None
    # bool [B, N], the patches that pictures of any aspect have; None: all.
    patch_mask: Tensor | None = None


class WidthHead(nn.Linear):
    """A linear map from the student's to the teacher's width, for widths that differ.

    It is initialised orthonormal.
    """

    def __init__(self, width: int, teacher_width: int):
        super().__init__(width, teacher_width, bias=False)
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """[.., H] -> [.., H_t].

        `back`: the reverse, by the transpose, the pseudo-inverse of an orthonormal map.
        """
        return F.linear(x, self.weight.t() if back else self.weight)


class PairInputs(ABC):
    """The inputs of a loss that compares pairs: a tile, R images of this rank and T texts.

    Without gradient caching these are all G texts. With it such a loss is computed tile by tile and
    summed, so it must be a sum over pairs of an image and a text, apart from `row_logsumexp` and
    `column_logsumexp`. The pair scores are computed once and shared by all losses that compare
    them.
    """

    config: LossConfig
    # What `cmli.cut` asks of the losses that compare the CMLI scores; None: no pair is left out.
    units: Tensor | None

    def with_units(self, loss: Tensor, logit_scale: Tensor) -> Tensor:
        """A loss over CMLI scores, whose backward also tells what a weight of 1 is there."""
        if self.units is None:
            return loss
        return loss + as_loss(self.units, logit_scale, len(self.cmli_scores[0]))

    @property
    @abstractmethod
    def own(self) -> Own:
        """The columns of the pair scores that are the rows' own texts."""

    @property
    def first(self) -> int:
        """`own` of one text for each image: the column of row 0's. Raises `UserError` of more."""
        if self.own.texts > 1:
            raise UserError(
                f"data.captions is {self.own.texts}: a loss here knows one caption of an image "
                "(PairInputs.first): give 1, or let it take PairInputs.own"
            )
        return self.own.first

    @property
    @abstractmethod
    def ids(self) -> tuple[Tensor, Tensor]:
        """Hashes of the images and of the texts, as `duplicates` takes them. Collective."""

    @cached_property
    def duplicates(self) -> Tensor | None:
        """The pairs of image and text that are no negatives, without own ones: the same picture, or
        the text is one of the image's.

        bool [R, T]; None: the texts of all other pairs are negatives. Collective.
        """
        if self.config.duplicates == "keep":
            return None
        return functions.duplicates(*self.ids, self.own)  # collective

    @cached_property
    def left_out(self) -> Tensor | None:
        """The wrong captions that do not count for an image: bool [R, T]; None: no text is wrong.

        Collective.
        """
        if not self.own.wrong:
            return None
        images, texts = self.ids  # collective
        absent, everywhere = texts[:, 1] == ABSENT, self.config.negatives == "all"
        return own_texts.left_out(absent, self.own, len(images), everywhere)

    @property
    @abstractmethod
    def global_scores(self) -> Tensor:
        """Cosine similarities of the class tokens: [R, T] fp32 (fp64). Collective."""

    @property
    @abstractmethod
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        """The CMLI scores s_i2t and s_t2i, each [R, T] fp32 (fp64). Collective."""

    @abstractmethod
    def row_logsumexp(self, logits: Tensor) -> Tensor:
        """log(sum(exp)) of each row over all texts of the batch, not only these T: [R, T] -> [R].

        A loss must be linear in it, as cross entropy is: gradient caching needs its gradient before
        it knows the value.
        """

    @abstractmethod
    def column_logsumexp(self, logits: Tensor) -> Tensor:
        """The same of each column over all images of the batch: [R, T] -> [T]. Collective."""


@dataclass
class LossInputs(PairInputs):
    """The inputs of a micro-batch whose negatives are the other pairs of the global micro-batch.

    An image's texts follow one another: texts b * W to b * W + W - 1 are those of image b, first
    the K right ones.
    """

    features: Features
    batch: Batch
    targets: Targets | None  # the teacher's features; None if no loss needs them
    student: Student
    width_head: WidthHead | None
    score: Score  # `cmli_scores` with its options
    config: LossConfig = field(default_factory=LossConfig)
    cut: Cut | None = None
    units: Tensor | None = None
    wrong: int = 0  # J, how many of an image's texts are wrong captions

    @property
    def right(self) -> "LossInputs":
        """The same without wrong captions."""
        return self._right if self.wrong else self  # not kept by itself, which would be a cycle

    @cached_property
    def _right(self) -> "LossInputs":
        texts, count, batch = self.own.texts, self.own.right, self.batch

        def right(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, texts))[:, :count].flatten(0, 1)

        f = self.features
        features = replace(f, text_cls=right(f.text_cls), tokens=right(f.tokens))
        batch = replace(
            batch,
            input_ids=right(batch.input_ids),
            attention_mask=right(batch.attention_mask),
            token_mask=right(batch.token_mask),
            token_picture=right(batch.token_picture),
            pair_id=batch.pair_id[:, : 1 + count],
            wrong=0,
        )
        return replace(self, features=features, batch=batch, wrong=0)

    @property
    def own(self) -> Own:
        texts = self.batch.pair_id.shape[1] - 1
        return Own(distributed.rank() * len(self.batch.index) * texts, texts, self.wrong)

    @cached_property
    def ids(self) -> tuple[Tensor, Tensor]:
        ids = self.batch.pair_id
        return ids, own_texts.ids_of_texts(collectives.gather(ids), self.wrong)  # collective

    @cached_property
    def all_text_cls(self) -> Tensor:
        """The texts' class tokens of all ranks, normalised: [G, H] fp32 (fp64). Collective."""
        text = upcast(l2_normalize(self.features.text_cls))
        return collectives.gather_with_gradient(text)

    @cached_property
    def global_scores(self) -> Tensor:
        image, text = upcast(l2_normalize(self.features.image_cls)), self.all_text_cls  # collective
        with full_precision(image.device):
            return image @ text.t()

    @cached_property
    def projected(self) -> tuple[Tensor, Tensor]:
        """The patches and tokens that CMLI compares, not normalised: [B, N, D] and [C, M, D]."""
        patches, tokens = self.features.patches, self.features.tokens
        return self.student.projection(patches), self.student.projection(tokens)

    @cached_property
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        config, (patches, tokens) = self.config, self.projected
        mask, share = self.batch.token_mask, config.cmli_token_keep
        if share < 1:
            selection = select(patches, tokens, mask, share, config.cmli_scratch_bytes)
            (patches, tokens), mask = selection.of(patches, tokens), selection.token_mask
        scores = score_global_batch(
            patches, tokens, mask, self.features.patch_mask, score=self.score
        )  # collective
        if self.cut is None:
            return scores
        s_i2t, s_t2i, self.units = self.cut.apply(*scores, self.own)  # collective in backward
        return s_i2t, s_t2i

    def row_logsumexp(self, logits: Tensor) -> Tensor:
        return logits.logsumexp(1)

    def column_logsumexp(self, logits: Tensor) -> Tensor:
        return collectives.column_logsumexp(logits)  # collective

    @property
    def teacher(self) -> Targets:
        assert self.targets is not None, "no chosen loss needs the teacher, says the registry"
        return self.targets

    def to_teacher(self, x: Tensor) -> Tensor:
        """Map the student's features to the teacher's width: [.., H] -> [.., H_t]."""
        return x if self.width_head is None else self.width_head(x)
