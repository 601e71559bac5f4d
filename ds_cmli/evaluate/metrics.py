"""The metrics of evaluations as functions of tensors, their table, and a run's best result.

K kinds of scores, I images, J captions, C classes; N patches, M tokens, F phrases of a caption.
"""

from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, Any]  # numbers by name, and `left_out_first`, the names of samples
RECALLS, TOP = (1, 5, 10), (1, 5)
SCORES = ("combined", "cmli", "global")
COUNTS = ("pairs", "choices", "phrases", "pictures", "classes")


def expected_hits(counts: Tensor, k: int) -> Tensor:
    """The probability that one of the best right candidates, as `count`s, is among the first k."""
    above, tied, right = counts.unbind(-1)
    miss = torch.ones_like(above)
    for i in range(k):  # the places after `above` go one by one to tied candidates, drawn at random
        drawn = (tied - i).clamp(min=0) / (tied + right - i).clamp(min=1)
        miss = torch.where(above + i < k, miss * drawn, miss)
    return torch.where(right > 0, 1 - miss, 0.0)


def count(scores: Tensor, best: Tensor, right: Tensor, axis: int) -> Tensor:
    """Compare the candidates along an axis with the best right one: float64 [K, queries, 3].

    The wrong ones above it, which NaN counts as, the wrong ones and the right ones equal to it.
    """
    equal = scores == best
    above = (~(scores <= best) & ~right).sum(axis)
    return torch.stack([above, (equal & ~right).sum(axis), (equal & right).sum(axis)], -1).double()


def best_right(i2t: Tensor, t2i: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The best scores of right pairs, of which the block has the picture of each caption.

    [K, I, J] twice, bool [I, J] -> each image's with a caption of its own, minus infinity without
    any, [K, I, 1]; each caption's with its picture, [K, 1, J].
    """
    best = i2t.masked_fill(~right, -torch.inf).amax(2, keepdim=True)
    return best, t2i.gather(1, right.int().argmax(0).expand(len(t2i), 1, -1))


def mean_recalls(i2t: Tensor, t2i: Tensor) -> dict[str, float]:
    """`i2t_r1` ... `t2i_r10` and their mean, from counts [queries, 3] each way."""
    values: dict[str, float] = {}
    for way, counts in (("i2t", i2t), ("t2i", t2i)):
        values |= {f"{way}_r{k}": expected_hits(counts, k).mean().item() for k in RECALLS}
    return {**values, "mean_recall": sum(values.values()) / len(values)}


def recalls(i2t: Tensor, t2i: Tensor, image_of: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, `i2t_r1` ... `t2i_r10`, and their mean, `mean_recall`.

    Captions are ranked by a row of `i2t`, [I, J], images by a column of `t2i`, [I, J]. `image_of`,
    int64 [J], is each caption's image. Ties get the expected random rank, and NaN never helps.
    """
    right = torch.arange(len(i2t), device=i2t.device)[:, None] == image_of.to(i2t.device)
    best_images, best_captions = best_right(i2t[None], t2i[None], right)
    of_images = count(i2t[None], best_images, right, 2)[0, image_of.unique()]
    return mean_recalls(of_images, count(t2i[None], best_captions, right, 1)[0])


def chance(image_of: Tensor) -> dict[str, float]:
    """The recalls of uninformative scores. `image_of`: int64 [J], each caption's picture."""
    captions = image_of.unique(return_counts=True)[1].double()  # [I], of each picture
    i2t = torch.stack([torch.zeros_like(captions), len(image_of) - captions, captions], 1)
    return mean_recalls(i2t, torch.tensor([[0.0, len(captions) - 1, 1]], dtype=torch.float64))


def top_hits(scores: Tensor, target: Tensor) -> Tensor:
    """Whether the right class is among the first of `TOP`: [K, I, C], int64 [I] -> [2, K, I]."""
    right = torch.arange(scores.shape[2], device=scores.device) == target[:, None]  # [I, C]
    counts = count(scores, scores.gather(2, target.expand(len(scores), -1)[:, :, None]), right, 2)
    return torch.stack([expected_hits(counts, k) for k in TOP])


def accuracies(scores: Tensor, target: Tensor) -> dict[str, float]:
    """`mean_hits` of scores [I, C] and right classes, int64 [I]. Ties get the expected rank."""
    return mean_hits(top_hits(scores[None], target)[:, 0], target)


def mean_hits(hits: Tensor, target: Tensor) -> dict[str, float]:
    """`top1`, `top5`, and top 1 averaged over the classes that have pictures: [2, I], int64 [I]."""
    counts, right = target.bincount(), target.bincount(hits[0])
    means = {f"top{k}": row.mean().item() for k, row in zip(TOP, hits, strict=True)}
    return {**means, "mean_per_class": (right / counts)[counts > 0].mean().item()}


def phrase_hits(patches: Tensor, tokens: Tensor, phrase: Tensor, inside: Tensor) -> Tensor:
    """Whether the patch with the highest mean similarity to a phrase's tokens lies inside: [F].

    [N, D] and [M, D], of unit length; `phrase`, int64 [M], of each token, -1 for none; `inside`,
    bool [F, N], the patches that show what the phrase names. One without a token is no hit.
    """
    similarity = tokens.float() @ patches.float().t()  # [M, N]
    of_phrase = phrase == torch.arange(len(inside))[:, None]  # [F, M]
    mean = of_phrase.float() @ similarity / of_phrase.sum(1, keepdim=True).clamp(min=1)  # [F, N]
    return inside.gather(1, mean.argmax(1, keepdim=True))[:, 0] & of_phrase.any(1)


def patches_inside(boxes: list, view: tuple, grid: tuple[int, int]) -> Tensor:
    """Whether the centre of each patch lies in one of the boxes, borders included: bool [N].

    `boxes` and `view`, which the grid of rows and columns divides, are left, top, right, bottom.
    """
    (left, top, right, bottom), (rows, columns) = view, grid
    y = top + (torch.arange(rows).double() + 0.5) * (bottom - top) / rows
    x = left + (torch.arange(columns).double() + 0.5) * (right - left) / columns
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))
    return inside.flatten()


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def best(before: Metrics, split: str, figures: Metrics, step: int) -> Metrics:
    """The best result of a run: this one, unless `before` has another metric or a higher value."""
    score = next(score for score in SCORES if f"{score}/i2t_r1" in figures)
    ways = ((f"{kind}/i2t_r1", f"{kind}/t2i_r1") for kind in (score, "chance"))
    value, chance = ((figures[i2t] + figures[t2i]) / 2 for i2t, t2i in ways)
    metric = f"{split} {score} R@1"
    if before.get("metric", metric) != metric or value <= before.get("value", -1.0):
        return before
    size = {"pairs": figures["pairs"], "chance": chance}
    return {"metric": metric, "value": value, "step": step, **size}


def summary(figures: Metrics, precision: str, name: str = "") -> str:
    """What was measured, and a table of less than 80 columns with a row of each score."""
    heading = ", ".join(f"{figures[count]} {count}" for count in COUNTS if count in figures)
    lines = [" ".join(filter(None, (" ", name, heading))) + f", in {precision}"]
    if "left_out" in figures:
        lines[0] += f", {figures['left_out']} left out: {', '.join(figures['left_out_first'])}"
    columns = [key.removeprefix("global/") for key in figures if key.startswith("global/")]
    if columns:
        lines.append(f"{'':12}" + "".join(f"  {column:5}" for column in columns))
    for score in (*SCORES, "chance"):
        cells = [(figures.get(f"{score}/{column}"), len(column)) for column in columns]
        texts = [f"  {'' if x is None else f'{x:.3f}':{max(5, width)}}" for x, width in cells]
        if any(map(str.strip, texts)):
            lines.append(f"    {score:8}{''.join(texts)}".rstrip())
    if (accuracy := figures.get("pointing_game")) is not None:
        chance = figures.get("chance/pointing_game", 0.25)  # of scenes, with pictures in quarters
        lines.append(f"    pointing-game accuracy {accuracy:.3f} (chance {chance:.3g})")
    if "visible" in figures:
        lines[-1] += f"; {figures['visible']:.0%} of the phrases are in sight"
    return "\n".join(lines)
