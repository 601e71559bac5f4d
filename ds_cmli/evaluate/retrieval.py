"""Recall of retrieval over all ranks, and all metrics of one held-out split.

No rank ever holds a whole row of the score matrix. Each keeps its own pictures, and scores them
against the captions of all ranks, which are gathered block by block.

K kinds of scores, r pictures and t captions of a block, M tokens, H hidden size, D embedding
dimension.
"""

from collections import defaultdict
from itertools import starmap

import torch
from torch import Tensor

from ds_cmli.data.scenes import Scenes
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate import measures
from ds_cmli.evaluate.embed import Embedded, EvalSet, Evaluator, PaddedTexts, embed, pad_texts
from ds_cmli.evaluate.pointing_game import pointing_game, scene_regions
from ds_cmli.evaluate.summary import Metrics, prefixed

MAX_PICTURES = 128  # of a block, which also holds all captions of its pictures
MAX_GATHERED = 512  # pictures whose captions are on a rank at a time


@torch.no_grad()
def evaluate_split(evaluator: Evaluator, pairs: EvalSet) -> tuple[Metrics, Embedded]:
    """Return the metrics of a split, the same on every rank, and this rank's embeddings.

    They are `<score>/<direction>_r<k>`, `<score>/mean_recall`, `chance/...`, `pointing_game` of
    scenes, and `Embedded.counts`. Collective.
    """
    was_training = evaluator.model.training
    evaluator.model.eval()
    embedded = embed(evaluator, pairs)  # collective
    evaluator.model.train(was_training)
    pictures = torch.tensor([embedded.image_of[caption] for caption in embedded.captions])
    metrics = embedded.counts | prefixed("chance/", measures.chance_recalls(pictures))
    for kind, values in recalls_of_kinds(evaluator, embedded).items():  # collective
        metrics |= prefixed(f"{kind}/", values)
    if isinstance(pairs, Scenes):
        game = pointing_game(embedded, scene_regions, evaluator.student.grid)  # collective
        metrics["pointing_game"] = game["pointing_game"]
    return metrics, embedded


def recalls_of_kinds(evaluator: Evaluator, embedded: Embedded) -> dict[str, dict[str, float]]:
    """Return the recalls of each kind of scores over all ranks' pictures and captions. Collective.

    A picture's counts are complete on its rank; a caption's are the sum over all ranks.
    """
    num_ranks = distributed.world_size()
    image_of = torch.tensor(embedded.image_of)
    block_size = max(1, min(MAX_PICTURES, MAX_GATHERED // num_ranks))
    pictures_of_rank = list(embedded.images)
    # Every rank has as many blocks; the last ones may be empty.
    max_pictures = -(-len(image_of.unique()) // num_ranks)
    blocks = [pictures_of_rank[i : i + block_size] for i in range(0, max_pictures, block_size)]
    captions_of_picture: dict[int, list[int]] = defaultdict(list)
    for caption in embedded.texts:
        captions_of_picture[embedded.image_of[caption]].append(caption)

    def score(pictures: list[int], captions: Tensor, *texts: Tensor) -> tuple[Tensor, ...]:
        """Return i2t and t2i, [K, r, t], and which pairs are right, bool [r, t]. CPU-GPU sync."""
        images = [embedded.images[picture] for picture in pictures]
        kinds = evaluator.scores(images, PaddedTexts(*texts)).values()
        i2t, t2i = (torch.stack(scores).cpu() for scores in zip(*kinds, strict=True))
        return i2t, t2i, torch.tensor(pictures)[:, None] == image_of[captions]

    # Find each query's best right candidate first, in the blocks in which all pairs are scored
    # below: so its score there is bitwise equal.
    best_captions = torch.zeros(len(evaluator.kinds), len(image_of), 1)  # by picture
    own_blocks: list[list[Tensor]] = []  # captions, int64 [t], best scores, [K, 1, t], and texts
    for pictures in blocks:
        own_block: list[Tensor] = []
        if pictures:
            numbers = [caption for picture in pictures for caption in captions_of_picture[picture]]
            captions = torch.tensor(numbers)
            texts = pad_texts([embedded.texts[number] for number in numbers])
            scores = score(pictures, captions, *texts)
            best_captions[:, pictures], best_images = measures.best_of_right_pairs(*scores)
            own_block = [captions, best_images, *texts]
        own_blocks.append(own_block)
    i2t_counts, t2i_counts = torch.zeros(2, *best_captions.shape[:2], 3, dtype=torch.float64)
    for own_block in own_blocks:
        for block in distributed.gather_tensors(own_block):  # collective
            for pictures in blocks:
                evaluator.heartbeat()  # collective at times
                if not block or not pictures:
                    continue
                captions, best_images, *text_tensors = block
                i2t, t2i, is_right = score(pictures, captions, *text_tensors)
                best = best_captions[:, pictures]
                i2t_counts[:, pictures] += measures.count_candidates(i2t, best, is_right, 2)
                t2i_counts[:, captions] += measures.count_candidates(t2i, best_images, is_right, 1)
    distributed.sum_over_ranks(i2t_counts)  # collective
    distributed.sum_over_ranks(t2i_counts)  # collective
    i2t_counts = i2t_counts[:, image_of[embedded.captions].unique()]
    counts_of_kinds = zip(i2t_counts, t2i_counts[:, embedded.captions], strict=True)
    recalls = starmap(measures.mean_recalls, counts_of_kinds)
    return dict(zip(evaluator.kinds, recalls, strict=True))
