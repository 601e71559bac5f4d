"""All metrics of one held-out split: retrieval, and pointing-game accuracy if it is known what each token names.

Recall at 1, 5 and 10, from image to text and from text to image, is measured with three kinds of scores: the cosine
similarity of the class tokens (global), CMLI (cmli), and the sum of both logits (combined).
Shapes: n captions, m pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.data.bad import NO_TOKEN, Bad, told
from ds_cmli.data.load import EvalData
from ds_cmli.data.loaders import batches
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Images, Texts, embed_images, embed_texts, pair_positions
from ds_cmli.evaluate.held_out import FILLER, HeldOut, collate_pictures
from ds_cmli.evaluate.pointing_game import scene_hits
from ds_cmli.evaluate.retrieval import chance, competitors, names


@dataclass
class Share:
    """The embeddings of a rank's share of the pictures and of their captions."""

    images: Images
    texts: Texts
    captions: Tensor  # int64, the numbers of the usable captions of all ranks
    left_out: list[Bad]  # the samples of all ranks that cannot be used


@torch.no_grad()
def embed_share(
    student: Any, held_out: HeldOut, collate: Callable, batch_size: int, device: Any, workers: int = 0,
    heartbeat: Callable[[], None] = lambda: None, worker_init: Callable[[int], None] | None = None,
) -> Share:  # fmt: skip
    """Embed every picture and every caption once, on one of the ranks. Collective; arguments as in `evaluate_split`.

    Raises:
        UserError: on every rank, if no pair can be used.
    """
    rank, ranks = distributed.rank(), distributed.world_size()

    def loader(
        view: Callable[[list[int]], Dataset], shares: list[list[int]], collate: Callable
    ) -> Any:
        """A loader of this rank's share, padded with fillers so that all ranks have as many batches."""
        share = shares[rank] + [FILLER] * (max(map(len, shares)) - len(shares[rank]))
        return batches(view(share), batch_size, workers, collate, worker_init)

    shares = [list(range(r, held_out.images, ranks)) for r in range(ranks)]
    images = embed_images(
        student, loader(held_out.pictures, shares, collate_pictures), device, heartbeat
    )  # collective
    of_rank = held_out.image_of % ranks
    shares = [(of_rank == r).nonzero().flatten().tolist() for r in range(ranks)]
    texts, empty = embed_texts(
        student, loader(held_out.captions, shares, collate), device, heartbeat
    )  # collective

    # Broken pictures with all of their captions, and captions without a token, cannot be used.
    everywhere = distributed.gather_objects((images.broken, empty))  # collective
    broken = {number: bad for found, _ in everywhere for number, bad in found.items()}
    without = sorted(caption for _, found in everywhere for caption in found)
    keep = torch.ones(len(held_out.image_of), dtype=torch.bool)
    keep[without] = False
    keep &= ~torch.isin(held_out.image_of, torch.tensor(sorted(broken), dtype=torch.int64))
    left_out = [
        *held_out.at_load,
        *broken.values(),
        *((held_out.file(caption), NO_TOKEN) for caption in without),
    ]
    captions = keep.nonzero().flatten()
    if not len(captions):
        raise UserError(
            f"no pair of the validation set can be used, for instance {', '.join(told(left_out))}"
        )
    shown = torch.isin(images.number, held_out.image_of[captions])
    return Share(images.select(shown), texts.select(keep[texts.number]), captions, left_out)


@torch.no_grad()
def evaluate_split(
    objective: Any, dataset: Dataset, data: EvalData, batch_size: int, device: Any, workers: int = 0,
    heartbeat: Callable[[], None] = lambda: None, worker_init: Callable[[int], None] | None = None,
    fold_size: int | None = None, show: Callable[[Share, HeldOut, tuple[int, int]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure all metrics of a split, the same on every rank. Collective.

    Args:
        show: called once with this rank's share, the held-out set and the patch grid; may be collective.
        heartbeat: called for every batch and block, as often on every rank, for the detection of hangs.
        fold_size: pictures per fold; retrieval is then also measured within folds and averaged over them.

    Returns:
        `<score>/<way>_r<k>`, `<score>/mean_recall`, `chance/...`, `fold/<score>/...` and `pointing_game`; also `pairs`
        and `pictures`, the numbers that were used, and if some could not be used `left_out` (the number of pairs) and
        `left_out_first` (the names of some).

    Raises:
        UserError: on every rank, if no pair can be used, or the pictures do not make whole folds.
    """
    held_out = HeldOut(dataset)
    if fold_size is not None and held_out.images % fold_size:
        raise UserError(
            f"--fold-size is {fold_size}: the split has {held_out.images} pictures, which is no multiple"
        )
    scales = objective.score_scales()  # collective under ZeRO-3
    was_training = objective.training
    objective.eval()
    share = embed_share(
        objective.student,
        held_out,
        data.collate,
        batch_size,
        device,
        workers,
        heartbeat,
        worker_init,
    )  # collective
    objective.train(was_training)
    if show is not None:
        show(share, held_out, objective.student.grid)  # collective
    images, texts, captions, image_of = share.images, share.texts, share.captions, held_out.image_of
    pictures = image_of[captions].unique()

    out: dict[str, Any] = {"pairs": len(captions), "pictures": len(pictures)}
    if share.left_out:
        out["left_out"] = len(image_of) - len(captions) + len(held_out.at_load)
        out["left_out_first"] = told(share.left_out)
    out |= chance(image_of[captions])
    fold_of = torch.arange(held_out.images) // fold_size if fold_size is not None else None
    counted = competitors(images, texts, image_of, scales, device, fold_of, heartbeat)  # collective
    for prefix, counts in zip(("", "fold/"), counted, strict=True):
        if counts is not None:
            for score, values in zip(
                names(scales), counts.recalls(pictures, captions), strict=True
            ):
                out |= {f"{prefix}{score}/{name}": value for name, value in values.items()}
    if data.has_places:
        hits = torch.zeros(2, dtype=torch.float64)
        for image, text in pair_positions(images, texts, image_of):
            tokens = texts.tokens_of(text)
            hits += scene_hits(
                images.patches[image], texts.tokens[tokens], texts.token_picture[tokens],
                images.cell_picture[image], objective.student.grid,
            )  # fmt: skip
        hits = distributed.sum_over_ranks(hits)  # collective
        out["pointing_game"] = (hits[0] / hits[1].clamp(min=1)).item()
    return out
