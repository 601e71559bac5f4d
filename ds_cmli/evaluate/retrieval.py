"""Recall of retrieval over all ranks, and all metrics of one held-out split.

No rank ever holds a whole row of the score matrix. Each keeps its own pictures and their captions.
Captions are communicated: each block of them is broadcast from its rank to all others, which score
it against their own pictures, block by block. K kinds of scores, r pictures, b captions of a block.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_cmli.data.scenes import Scenes
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Embedded, Evaluator, HeldOut, block, embed
from ds_cmli.evaluate.metrics import Metrics, best_right, chance, count, mean_recalls, prefixed
from ds_cmli.evaluate.pointing_game import pointing_game, quarters

PICTURES = 128  # per block, which has as many captions as they have


@torch.no_grad()
def evaluate_split(model: Evaluator, pairs: HeldOut) -> tuple[Metrics, Embedded]:
    """All metrics of a split, the same on every rank, and this rank's embeddings. Collective.

    `<score>/<way>_r<k>`, `<score>/mean_recall`, `chance/...`, `pointing_game` of scenes, and
    `Embedded.counts`.
    """
    was_training = model.module.training
    model.module.eval()
    own = embed(model, pairs)  # collective
    model.module.train(was_training)
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
    image_of, here, kinds = torch.tensor(own.image_of), list(own.images), len(model.kinds)
    most = -(-len(image_of.unique()) // distributed.world_size())  # as many blocks on all ranks
    blocks = [here[start : start + PICTURES] for start in range(0, most, PICTURES)]
    captions_of = defaultdict[int, list[int]](list)
    for row in own.texts:
        captions_of[own.image_of[row]].append(row)

    def scores(numbers: list[int], captions: list[int], texts: Sequence) -> tuple[Tensor, ...]:
        """i2t and t2i, [K, r, b], and whether the caption is one of the picture's. CPU-GPU sync."""
        ways = model.scores([own.images[number] for number in numbers], texts).values()
        i2t, t2i = (torch.stack(way).cpu() for way in zip(*ways, strict=True))
        return i2t, t2i, torch.tensor(numbers)[:, None] == image_of[captions]

    # The right pairs first, in the blocks with the pictures of their captions: computed as again
    # below, so that a score is bitwise equal to itself.
    best = torch.full((kinds, len(image_of), 1), -torch.inf)
    sent: list[tuple | None] = []  # captions, their scores with their pictures, their embeddings
    for numbers in blocks:
        captions = [caption for number in numbers for caption in captions_of[number]]
        if not captions:
            sent.append(None)
            continue
        texts = block([own.texts[caption] for caption in captions])
        best[:, numbers], of_captions = best_right(*scores(numbers, captions, texts))
        sent.append((captions, of_captions, texts))

    i2t_counts, t2i_counts = torch.zeros(2, kinds, len(image_of), 3, dtype=torch.float64)
    for source in range(distributed.world_size()):
        for mine in sent:
            part = distributed.broadcast_object(mine, source)  # collective
            for numbers in blocks:
                model.heartbeat()
                if part and numbers:
                    captions, of_captions, texts = part
                    i2t, t2i, right = scores(numbers, captions, texts)
                    i2t_counts[:, numbers] += count(i2t, best[:, numbers], right, 2)
                    t2i_counts[:, captions] += count(t2i, of_captions, right, 1)
    distributed.sum_over_ranks(i2t_counts)  # collective
    distributed.sum_over_ranks(t2i_counts)  # collective
    pictures = image_of[own.captions].unique()
    ways = zip(i2t_counts[:, pictures], t2i_counts[:, own.captions], strict=True)
    return {kind: mean_recalls(*way) for kind, way in zip(model.kinds, ways, strict=True)}
