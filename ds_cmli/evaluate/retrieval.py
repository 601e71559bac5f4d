"""Recall of retrieval over all ranks, and all metrics of one held-out split.

No rank ever holds a whole row of the score matrix. Each keeps its own pictures, and scores them
against the captions of all ranks, which are gathered block by block.

Shapes: K kinds of scores, J captions of the split, r pictures and t captions of a block. Pictures
are numbered as in `Embedded`: by their first caption.
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

MAX_PICTURES = 128  # in a block; a block also holds all captions of its pictures
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
    # All ranks have the same number of blocks; the last ones may be empty.
    max_pictures = -(-len(image_of.unique()) // num_ranks)
    blocks = [pictures_of_rank[i : i + block_size] for i in range(0, max_pictures, block_size)]
    captions_of_picture: dict[int, list[int]] = defaultdict(list)
    for caption in embedded.texts:
        captions_of_picture[embedded.image_of[caption]].append(caption)

    def score(pictures: list[int], captions: Tensor, *texts: Tensor) -> tuple[Tensor, ...]:
        """Return i2t, t2i, [K, r, t] each, and `is_right`, bool [r, t]. CPU-GPU sync."""
        images = [embedded.images[picture] for picture in pictures]
        scores = evaluator.scores(images, PaddedTexts(*texts)).values()
        i2t, t2i = (torch.stack(kinds).cpu() for kinds in zip(*scores, strict=True))
        return i2t, t2i, torch.tensor(pictures)[:, None] == image_of[captions]

    # First pass: the score of each query's best right candidate. The second pass scores the same
    # blocks again, so it meets bitwise equal scores.
    best_caption_scores = torch.zeros(len(evaluator.kinds), len(image_of), 1)  # [K, J, 1]
    # Each is the captions, int64 [t], their best images' scores, [K, 1, t], and the texts.
    local_blocks: list[list[Tensor]] = []
    for pictures in blocks:
        local_block: list[Tensor] = []
        if pictures:
            numbers = [caption for picture in pictures for caption in captions_of_picture[picture]]
            captions = torch.tensor(numbers)
            texts = pad_texts([embedded.texts[number] for number in numbers])
            best_scores = measures.best_of_right_pairs(*score(pictures, captions, *texts))
            best_caption_scores[:, pictures], best_image_scores = best_scores
            local_block = [captions, best_image_scores, *texts]
        local_blocks.append(local_block)
    # Second pass: count the candidates at or above these scores, as `count_candidates`: [K, J, 3].
    counts_shape = len(evaluator.kinds), len(image_of), 3
    i2t_counts, t2i_counts = torch.zeros(2, *counts_shape, dtype=torch.float64)
    for local_block in local_blocks:
        for block in distributed.gather_tensors(local_block):  # collective
            for pictures in blocks:
                evaluator.heartbeat()  # collective at times
                if not block or not pictures:
                    continue
                captions, best_image_scores, *text_tensors = block
                i2t, t2i, is_right = score(pictures, captions, *text_tensors)
                i2t_counts[:, pictures] += measures.count_candidates(
                    i2t, best_caption_scores[:, pictures], is_right, 2
                )
                t2i_counts[:, captions] += measures.count_candidates(
                    t2i, best_image_scores, is_right, 1
                )
    distributed.sum_over_ranks(i2t_counts)  # collective
    distributed.sum_over_ranks(t2i_counts)  # collective
    # Rows of numbers that are no usable picture or caption are left out.
    i2t_counts = i2t_counts[:, image_of[embedded.captions].unique()]
    t2i_counts = t2i_counts[:, embedded.captions]
    counts_of_kinds = zip(i2t_counts, t2i_counts, strict=True)
    recalls = starmap(measures.mean_recalls, counts_of_kinds)
    return dict(zip(evaluator.kinds, recalls, strict=True))
