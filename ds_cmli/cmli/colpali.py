"""The late-interaction losses of colpali-engine with `maxsim`, across ranks by our exchange.

Shapes: B queries of L_q tokens and B documents of L_d on this rank, K negatives of each query,
D features.
"""

import functools
import sys
from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import Unpack

from ds_cmli.cmli import collectives
from ds_cmli.cmli.across_ranks import maxsim_across_ranks
from ds_cmli.cmli.loss import ScorerOptions
from ds_cmli.cmli.op import maxsim
from ds_cmli.cmli.ring import Scorer
from ds_cmli.common.patches import PATCHES, patched_each

SCORES, TRAINER = "colpali_engine: scores", "colpali_engine: gather"


class MaxSimLoss(nn.Module):
    """A loss of colpali-engine as it is, whose scores `maxsim` computes.

        loss_func = MaxSimLoss(ColbertLoss(temperature=0.02))

    is called, and given to `ColModelTrainingConfig` or `ContrastiveTrainer`, as the loss itself.
    Value and gradients are the library's, but where it divides a gradient between equal maxima:
    here the lowest index has all of it. Padding, which the library marks by zeros, is not computed;
    its gradient is 0. In 16 bits scores are summed in fp32. In its trainer on several ranks
    documents come by `maxsim_across_ranks` in place of its gather.

    Args:
        loss: ColbertLoss, ColbertNegativeCELoss, ColbertPairwiseCELoss,
            ColbertPairwiseNegativeCELoss or ColbertSigmoidLoss, with any options but
            `use_smooth_max`.
        options: of `ring.Scorer`: `exchange`, `gather_bytes`, and `backend`, `scratch_bytes` and
            `recompute` of `maxsim`.

    Raises:
        TypeError: `loss` is none of these.
        ValueError: `use_smooth_max`, or an option does not fit.
        RuntimeError: the library is older than 0.3.17.
    """

    def __init__(self, loss: nn.Module, **options: Unpack[ScorerOptions]):
        super().__init__()
        library = sys.modules.get("colpali_engine.loss.late_interaction_losses")
        if library is None or not isinstance(loss, library.ColbertModule):
            raise TypeError(
                "MaxSimLoss takes a late-interaction loss of colpali-engine, as ColbertLoss(), not "
                f"{type(loss).__name__}"
            )
        if not hasattr(library, "maxsim_kd"):
            raise RuntimeError(
                "MaxSimLoss needs colpali-engine 0.3.17 or later, whose losses share their scores: "
                "pip install -U colpali-engine"
            )
        if getattr(loss, "use_smooth_max", False):
            raise ValueError(
                "use_smooth_max=True sums over all similarities, and MaxSimLoss takes maxima "
                "alone: leave it False, or give the trainer the loss itself"
            )
        self.loss, self.options = loss, options
        self.of_op = Scorer(**options).of_op
        _exchange_in_trainer()

    def forward(self, *arguments: Tensor, **named: Tensor | int) -> Tensor:
        """The library's loss of its arguments, a scalar."""
        return self._loss(self._scores, *arguments, **named)

    def of_all_ranks(self, *arguments: Tensor) -> Tensor:
        """The mean loss of this rank's queries, with the documents of all ranks. Collective.

        Args:
            arguments: this rank's query embeddings [B, L_q, D], document embeddings [B, L_d, D]
                and, if the loss takes them, those of negatives [B, K, L_d, D]. L_q and L_d may
                differ between ranks.

        Raises:
            ValueError: the loss is a ColbertSigmoidLoss, which compares one rank's batch alone.
        """
        if type(self.loss).__name__ == "ColbertSigmoidLoss" and collectives.world_size() > 1:
            raise ValueError(
                "ColbertSigmoidLoss labels as many documents as queries, so it does not take those "
                "of other ranks: use ColbertLoss, or train on one rank"
            )
        return self._loss(self._scores_of_all, *arguments)

    def _loss(
        self, scores: Callable[..., Tensor], *arguments: Tensor, **named: Tensor | int
    ) -> Tensor:
        _exchange_in_trainer()  # from the second step on, if it was imported after this was made
        functions = {"maxsim_inbatch": scores, "maxsim_kd": self._scores}
        with patched_each(SCORES, functions):
            return self.loss(*arguments, **named)

    def _scores(self, queries: Tensor, documents: Tensor) -> Tensor:
        return maxsim(queries, documents, *_masks(queries, documents), **self.of_op)

    def _scores_of_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        masks = _masks(queries, documents)
        return maxsim_across_ranks(queries, documents, *masks, **self.options)  # collective


def _masks(queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that are not padding; of a document's padding one, with which all are compared."""
    padding = ~documents.detach().any(-1)
    return queries.detach().any(-1), ~padding | (padding.cumsum(-1) == 1)


def _exchange_in_trainer() -> None:
    """Let the trainer, if it is imported, leave its gather to a MaxSimLoss."""
    if "colpali_engine.trainer.contrastive_trainer" not in sys.modules:
        return
    for owner, name in PATCHES[TRAINER].targets():
        gathers = getattr(owner, name)
        if not hasattr(gathers, "__wrapped__"):
            setattr(owner, name, _by_exchange(gathers))


def _by_exchange(gathers: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(gathers)
    def compute(trainer, queries, documents, negatives=None):
        accelerator, loss = trainer.accelerator, trainer.loss_func
        # As it does, in the last of micro-batches that are accumulated.
        gathered = accelerator.num_processes > 1 and accelerator.sync_gradients
        if not gathered or not isinstance(loss, MaxSimLoss):
            return gathers(trainer, queries, documents, negatives)
        arguments = (queries, documents) if negatives is None else (queries, documents, negatives)
        return loss.of_all_ranks(*arguments)  # collective

    return compute
