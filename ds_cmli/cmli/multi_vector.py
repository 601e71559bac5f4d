"""The multi-vector losses of sentence-transformers and PyLate, with their scores by `maxsim`.

Both libraries call a score function alike, so that one class is the place of all of theirs. Neither
is imported.

Shape legend: Q queries of L_q tokens, C groups of N documents of L_d tokens, D features.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ds_cmli.cmli.across_ranks import maxsim_across_ranks, with_empty
from ds_cmli.cmli.loss import ScorerOptions
from ds_cmli.cmli.op import maxsim
from ds_cmli.cmli.ring import DEFAULT_SCORER, Scorer

WHOLE = 2**31  # more queries than a batch has


@dataclass(frozen=True)
class MaxSimScores:
    """A score function, as the libraries call theirs.

    documents: what a query is scored with. "all": every document, [C, N, L_d, D] -> [Q, C * N], the
        groups one after the other; "own": its own ones, [Q, N, L_d, D] -> [Q, N]; "pair": one,
        [Q, L_d, D] -> [Q].
    length_normalize: divides a score by the query's valid tokens.
    masked_as_zero: a masked token of a document has similarity 0, and wins over negative ones, as
        in PyLate; otherwise it wins nothing.
    empty: the score of a document without valid tokens.
    across_ranks: "all" are the documents of all ranks, this rank's first, `maxsim_across_ranks`.
    """

    documents: str = "all"
    length_normalize: bool = False
    masked_as_zero: bool = False
    empty: float = 0.0
    across_ranks: bool = False
    scorer: Scorer = DEFAULT_SCORER

    def __post_init__(self):
        if self.documents not in ("all", "own", "pair"):
            raise ValueError(f"documents={self.documents!r} is unknown; give all, own or pair")
        if self.across_ranks and self.documents != "all":
            raise ValueError(
                f"across_ranks=True takes all documents, not documents={self.documents!r}: those "
                "of other ranks belong to no query of this one"
            )

    def __call__(
        self,
        queries_embeddings: Tensor,
        documents_embeddings: Tensor,
        queries_mask: Tensor | None = None,
        documents_mask: Tensor | None = None,
    ) -> Tensor:
        """Scores, fp32 (fp64 for fp64). Masks, of any dtype, are [Q, L_q] and as the documents
        without D; what is not 0 is valid. Collective if `across_ranks`."""
        documents, mask = documents_embeddings, _valid(documents_mask, documents_embeddings)
        tokens = _valid(queries_mask, queries_embeddings)
        if self.masked_as_zero:
            documents, mask = _zero_where_masked(documents, mask)
        if self.documents == "all":
            documents, mask = documents.flatten(0, 1), mask.flatten(0, 1)
        elif self.documents == "pair":
            documents, mask = documents[:, None], mask[:, None]
        arguments = queries_embeddings, documents, tokens, mask
        if self.across_ranks:
            scores = maxsim_across_ranks(*arguments, empty=self.empty, **vars(self.scorer))
        else:
            scores = with_empty(maxsim(*arguments, **self.scorer.of_op), mask.sum(-1), self.empty)
        if self.length_normalize:
            scores = scores / tokens.sum(1, keepdim=True).clamp(min=1)
        return scores[:, 0] if self.documents == "pair" else scores


def _valid(mask: Tensor | None, features: Tensor) -> Tensor:
    if mask is None:
        return features.new_ones(features.shape[:-1], dtype=torch.bool)
    return mask.bool()


def _zero_where_masked(documents: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for masked tokens, the first of which in each document is valid: the others would add
    nothing to it."""
    masked = ~mask
    first = masked & (masked.cumsum(-1) == 1)
    return documents.masked_fill(masked[..., None], 0), mask | first


ALL, OWN, PAIR = (MaxSimScores(documents, empty=-1e9) for documents in ("all", "own", "pair"))
OF_LIBRARIES = {
    ("sentence_transformers", "colbert_scores"): ALL,
    ("sentence_transformers", "colbert_kd_scores"): OWN,
    ("sentence_transformers", "colbert_scores_pairwise"): PAIR,
    ("sentence_transformers", "mean_colbert_scores"): replace(ALL, length_normalize=True),
    ("sentence_transformers", "mean_colbert_kd_scores"): replace(OWN, length_normalize=True),
    ("sentence_transformers", "mean_colbert_scores_pairwise"): replace(PAIR, length_normalize=True),
    ("pylate", "ColBERTScores"): MaxSimScores("all", masked_as_zero=True),
    ("pylate", "colbert_kd_scores"): MaxSimScores("own", masked_as_zero=True),
}
IGNORED = ("chunk_elements", "backend")  # how a library computes
Loss = TypeVar("Loss", bound=nn.Module)


def with_maxsim(loss: Loss, **options: Unpack[ScorerOptions]) -> Loss:
    """A multi-vector loss of sentence-transformers 6, or one of PyLate, that scores by `maxsim`.

        loss = with_maxsim(losses.CachedContrastive(model, gather_across_devices=True))

    It is the same loss, changed: its value and gradients stay, its similarities are no longer
    stored. Where it gathers across devices, `maxsim_across_ranks` takes the place of that, in one
    call for all queries, so that ranks may differ in batch and lengths. Each rank's loss is then
    the mean over its own queries: PyLate's factor for the number of ranks is gone, and the mean of
    gradients over ranks is that of one process.

    Args:
        options: of `ring.Scorer`.

    Raises:
        ValueError: it is no such loss, or scores by another function than MaxSim.
    """
    attribute = "score_metric"
    if hasattr(loss, "similarity_fct"):
        attribute = "similarity_fct"
    settings: dict[str, object] = {}
    function = getattr(loss, attribute, loss)
    if isinstance(function, partial):
        settings, function = dict(function.keywords), function.func
    name = getattr(function, "__name__", type(function).__name__)
    module = str(function.__module__)
    scores = OF_LIBRARIES.get((module.split(".")[0], name))
    normalize = settings.pop("length_normalize", None)
    others = [setting for setting in settings if setting not in IGNORED]
    if scores is None or others:
        known = ", ".join(sorted({f"{library}'s {kind}" for library, kind in OF_LIBRARIES}))
        raise ValueError(
            f"with_maxsim cannot change a {type(loss).__name__} that scores by "
            f"{' with '.join([f'{module}.{name}', *others])}: it takes the losses that score by "
            f"{known}"
        )
    if normalize is not None:
        scores = replace(scores, length_normalize=bool(normalize))
    gathers = getattr(loss, "gather_across_devices", False)
    if gathers:
        loss.gather_across_devices = False  # type: ignore[assignment]
        loss.score_mini_batch_size = WHOLE  # type: ignore[assignment]
    setattr(loss, attribute, replace(scores, across_ranks=gathers, scorer=Scorer(**options)))
    return loss
