"""The in-batch losses of libraries that train multi-vector models, each its own, next to that of `maxsim`.

Each takes unit rows, queries [B, L_q, D] and their documents [B, L_d, D], and returns the cross-entropy of the sums of
maxima at temperature 1.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.cmli import maxsim

Loss = Callable[[Tensor, Tensor], Tensor]


class Given(nn.Module):
    """A model of sentence-transformers and of PyLate, whose features hold their embeddings."""

    skiplist, do_query_expansion = (-1,), False

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        return features


def by_features(loss: nn.Module, *sides: Tensor) -> Tensor:
    columns = []
    for x in sides:
        mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
        columns.append({"token_embeddings": x, "attention_mask": mask, "input_ids": mask})
    return loss(columns, None)


def sentence_transformers() -> Loss:
    from sentence_transformers.multi_vector_encoder import losses

    return partial(by_features, losses.MultiVectorMultipleNegativesRankingLoss(Given()))


def pylate() -> Loss:
    from pylate import losses

    return partial(by_features, losses.Contrastive(Given()))


def colpali_engine() -> Loss:
    from colpali_engine.loss import ColbertLoss

    return ColbertLoss(temperature=1.0, normalize_scores=False)


def late_interaction_kernels() -> Loss:
    from late_interaction_kernels import MaxSimScorer

    return of_scores(MaxSimScorer(normalize=False))


def of_scores(scores: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        labels = torch.arange(len(queries), device=queries.device)
        return F.cross_entropy(scores(queries, documents), labels)

    return loss


def stored(queries: Tensor, documents: Tensor) -> Tensor:
    """MaxSim with all similarities stored."""
    return torch.einsum("qld,ckd->qclk", queries, documents).max(3).values.sum(2)


LIBRARIES: dict[str, Callable[[], Loss]] = {
    "sentence-transformers": sentence_transformers,
    "pylate": pylate,
    "colpali-engine": colpali_engine,
    "late-interaction-kernels": late_interaction_kernels,
}


def losses() -> tuple[dict[str, Loss], list[str]]:
    """What runs here, by name, and a line for each library that does not."""
    out, left_out = {"einsum, max, sum": of_scores(stored)}, []
    for name, make in LIBRARIES.items():
        try:
            named = f"{name} {version(name)}"
        except PackageNotFoundError:
            left_out.append(f"{name} is not installed: left out")
            continue
        try:
            loss = make()
            loss(torch.ones(2, 2, 8), torch.ones(2, 2, 8))
            out[named] = loss
        except Exception as error:  # it is another's, with other versions than it was written for
            left_out.append(f"{named} is left out: {type(error).__name__}: {error}".splitlines()[0])
    out["maxsim"] = of_scores(maxsim)
    out["maxsim, recompute"] = of_scores(partial(maxsim, recompute=True))
    return out, left_out
