"""All metrics of one held-out split.

These are retrieval, and pointing-game accuracy if it is known what each token names. Recall at 1, 5
and 10, from image to text and from text to image, is measured with each kind of scores: the cosine
similarity of the class tokens (global), CMLI (cmli) where it is trained, and the sum of the trained
logits (combined).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.data.build import EvalData
from ds_cmli.data.pairs import told
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import EmbedSettings, Share, embed_share
from ds_cmli.evaluate.held_out import HeldOut
from ds_cmli.evaluate.metrics import chance, scene_hits
from ds_cmli.evaluate.report import Metrics, prefixed
from ds_cmli.evaluate.retrieval import kinds, rank_counts

if TYPE_CHECKING:
    from ds_cmli.losses.objective import Objective


@torch.no_grad()
def evaluate_split(
    objective: "Objective",
    dataset: Dataset,
    data: EvalData,
    how: EmbedSettings,
    fold_size: int | None = None,
    show: Callable[[Share], None] | None = None,
) -> Metrics:
    """Measure all metrics of a split, the same on every rank. Collective.

    Args:
        fold_size: pictures per fold; retrieval is then also measured within folds and averaged over
            them.
        show: called once with this rank's share; may be collective.

    Returns:
        `<score>/<way>_r<k>`, `<score>/mean_recall`, `chance/...`, `fold/<score>/...` and
        `pointing_game`; also `pairs` and `pictures`, the numbers that were used, and if some could
        not be used `left_out` (the number of pairs) and `left_out_first` (the names of some).

    Raises:
        UserError: on every rank, if no pair can be used, or the pictures do not make whole folds.
    """
    held_out = HeldOut(dataset)
    if fold_size is not None and held_out.images % fold_size:
        raise UserError(
            f"--fold-size is {fold_size}: the split has {held_out.images} pictures, which is no "
            "multiple"
        )
    scales = objective.score_scales()  # collective under ZeRO-3
    was_training = objective.training
    objective.eval()
    share = embed_share(objective.student, held_out, data.collate, how)  # collective
    objective.train(was_training)
    if show is not None:
        show(share)  # collective
    captions, image_of = share.captions, held_out.image_of
    pictures = image_of[captions].unique()

    out: Metrics = {"pairs": len(captions), "pictures": len(pictures)}
    if share.left_out:
        out["left_out"] = len(image_of) - len(captions) + len(held_out.at_load)
        out["left_out_first"] = told(share.left_out)
    out |= chance(image_of[captions])
    fold_of = None if fold_size is None else torch.arange(held_out.images) // fold_size
    counted = rank_counts(share, scales, how, fold_of)  # collective
    for prefix, counts in counted.items():
        recalls = counts.recalls(pictures, captions)
        for score, values in zip(kinds(scales), recalls, strict=True):
            out |= prefixed(f"{prefix}{score}/", values)
    if data.has_places:
        out["pointing_game"] = _pointing_game(share)  # collective
    return out


def _pointing_game(share: Share) -> float:
    """The share of the tokens of all ranks' scenes whose best patch is in their picture.

    Collective.
    """
    images, texts = share.images, share.texts
    sums = torch.zeros(2, dtype=torch.float64)
    for image, text in share.pair_rows():
        tokens = texts.tokens_of(text)
        sums += scene_hits(
            images.patches[image],
            texts.tokens[tokens],
            texts.token_picture[tokens],
            images.cell_picture[image],
            images.grid,
        )
    hits, counted = distributed.sum_over_ranks(sums)  # collective
    return (hits / counted.clamp(min=1)).item()
