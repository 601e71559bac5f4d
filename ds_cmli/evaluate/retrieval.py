"""Recall of retrieval over all ranks, and all metrics of one held-out split.

No rank ever holds a whole row of the score matrix. Each keeps its own pictures and their captions.
Captions are communicated: each block of them is broadcast from its rank to all others, which score
it against their own pictures, block by block.

Shapes: K kinds of scores, r pictures and b captions of a block.
"""

import torch
from torch import Tensor

from ds_cmli.data.scenes import Scenes
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Embedded, Evaluator, HeldOut, block, embed
from ds_cmli.evaluate.metrics import best_right, chance, count, mean_recalls
from ds_cmli.evaluate.pointing_game import pointing_game, quarters
from ds_cmli.evaluate.report import Metrics, prefixed

PICTURES, CAPTIONS = 128, 512  # the most per block


@torch.no_grad()
def evaluate_split(model: Evaluator, pairs: HeldOut) -> tuple[Metrics, Embedded]:
    """Measure all metrics of a split, the same on every rank. Collective.

    Returns:
        `<score>/<way>_r<k>`, `<score>/mean_recall`, `chance/...`, of scenes `pointing_game`, and
        `Embedded.counts`; and this rank's embeddings.

    Raises:
        UserError: on every rank, if no pair can be used.
    """
    was_training = model.objective.training
    model.objective.eval()
    own = embed(model, pairs)  # collective
    model.objective.train(was_training)
    pictures = torch.tensor([own.image_of[caption] for caption in own.captions])
    out = own.counts | prefixed("chance/", chance(pictures))
    for kind, values in rank(model, own).items():  # collective
        out |= prefixed(f"{kind}/", values)
    if isinstance(pairs, Scenes):
        game = pointing_game(own, quarters, model.student.grid)  # collective
        out["pointing_game"] = game["pointing_game"]
    return out, own


def rank(model: Evaluator, own: Embedded) -> dict[str, dict[str, float]]:
    """The recalls of each kind of scores over all ranks' pictures and captions. Collective."""
    image_of, here = torch.tensor(own.image_of), list(own.images)
    pictures, kinds = int(image_of.max()) + 1, len(model.kinds)
    most = -(-pictures // distributed.world_size())  # of a rank: the same on all of them
    blocks = [here[start : start + PICTURES] for start in range(0, most, PICTURES)]

    def scores(numbers: list[int], captions: list[int], texts: tuple) -> tuple[Tensor, ...]:
        """i2t and t2i, [K, r, b], and whether the caption is one of the picture's. CPU-GPU sync."""
        ways = model.scores([own.images[number] for number in numbers], texts).values()
        i2t, t2i = (torch.stack(way).cpu() for way in zip(*ways, strict=True))
        return i2t, t2i, torch.tensor(numbers)[:, None] == image_of[captions]

    # The right pairs first, in the blocks with the pictures of their captions: computed as again
    # below, so that a score is bitwise equal to itself.
    best = torch.full((kinds, pictures, 1), -torch.inf)
    parts = []  # this rank's captions, and their scores with their pictures
    for numbers in blocks:
        inside = {*numbers}
        rows = [caption for caption in own.texts if own.image_of[caption] in inside]
        for captions in (rows[start : start + CAPTIONS] for start in range(0, len(rows), CAPTIONS)):
            pairs = scores(numbers, captions, block([own.texts[caption] for caption in captions]))
            best_images, best_captions = best_right(*pairs)
            best[:, numbers] = torch.maximum(best[:, numbers], best_images)
            parts.append((captions, best_captions))

    i2t_counts = torch.zeros(kinds, pictures, 3, dtype=torch.float64)
    t2i_counts = torch.zeros(kinds, len(image_of), 3, dtype=torch.float64)
    for source, length in enumerate(distributed.gather_objects(len(parts))):  # collective
        for part in range(length):
            sent = None
            if source == distributed.rank():
                sent = *parts[part], block([own.texts[caption] for caption in parts[part][0]])
            captions, best_captions, texts = distributed.broadcast_object(
                sent, source
            )  # collective
            for numbers in blocks:
                model.heartbeat()
                if numbers:
                    i2t, t2i, right = scores(numbers, captions, texts)
                    i2t_counts[:, numbers] += count(i2t, best[:, numbers], right, 2)
                    t2i_counts[:, captions] += count(t2i, best_captions, right, 1)
    distributed.sum_over_ranks(i2t_counts)  # collective
    distributed.sum_over_ranks(t2i_counts)  # collective
    i2t_counts = i2t_counts[:, image_of[own.captions].unique()]
    ways = zip(i2t_counts, t2i_counts[:, own.captions], strict=True)
    return {kind: mean_recalls(*way) for kind, way in zip(model.kinds, ways, strict=True)}
