"""Choices between the right caption of a picture and misleading ones.

A file has lines of JSON with the right caption first, and perhaps with the group of the line:
`{"image": "2.jpg", "captions": ["a dog chases a cat", "a cat chases a dog"], "group": 7}`.
"""

import json
from collections import defaultdict
from pathlib import Path

import torch

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import View
from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import blame
from ds_cmli.evaluate.embed import Embedded, Evaluator, PictureFiles, embed, pad_texts
from ds_cmli.evaluate.summary import Metrics


class Choices(PictureFiles):
    """All captions of all lines; pictures are relative to `folder`, by default that of the file."""

    def __init__(self, file: str, folder: str | None, config: DataConfig) -> None:
        super().__init__(View.of(config), [])
        self.lines: list[tuple[str, range]] = []  # the group, and the numbers of the captions
        with blame(f"--choices is {file!r}, which cannot be read"):
            for number, text in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
                line = json.loads(text)
                captions = line["captions"]
                image = Path(folder or Path(file).parent, line["image"])
                if len(captions) < 2 or {*map(type, captions)} != {str}:
                    raise ValueError(f"line {number}: give two captions or more, as texts")
                rows = range(len(self.rows), len(self.rows) + len(captions))
                self.rows += [(image, caption) for caption in captions]
                self.lines.append((str(line.get("group", f"line {number}")), rows))


@torch.no_grad()
def choose(evaluator: Evaluator, choices: Choices) -> Metrics:
    """Return the shares of lines, and of groups, whose right captions score strictly the highest.

    The scores are those from the picture's side. A group counts if all its lines do. Collective.
    """
    embedded = embed(evaluator, choices)  # collective
    own_results = []  # group, number of captions, and for each kind of scores, whether it is right
    for group, rows in choices.lines:
        # A missing caption is another rank's, or the line cannot be used as a whole.
        if embedded.texts.keys() >= {*rows}:
            is_right = _is_right(evaluator, embedded, rows)  # CPU-GPU sync
            own_results.append((group, len(rows), is_right))
    gathered = distributed.gather_objects(own_results)  # collective
    results = [result for results_of_rank in gathered for result in results_of_rank]
    count = max(len(results), 1)
    groups: dict[str, list[list[bool]]] = defaultdict(list)
    for group, _, is_right in results:
        groups[group].append(is_right)
    metrics = {**embedded.counts, "choices": len(results)}
    metrics["chance/accuracy"] = sum(1 / captions for _, captions, _ in results) / count
    for k, kind in enumerate(evaluator.kinds):
        right_groups = [all(is_right[k] for is_right in group) for group in groups.values()]
        metrics[f"{kind}/accuracy"] = sum(is_right[k] for _, _, is_right in results) / count
        metrics[f"{kind}/group"] = sum(right_groups) / max(len(groups), 1)
    return metrics


def _is_right(evaluator: Evaluator, embedded: Embedded, rows: range) -> list[bool]:
    """Return for each kind of scores whether the first caption is the best. CPU-GPU sync."""
    right, *wrong = (evaluator.tokenizer(embedded.pairs.rows[row][1]).input_ids for row in rows)
    image = embedded.images[embedded.image_of[rows[0]]]
    scores = evaluator.scores([image], pad_texts([embedded.texts[row] for row in rows]))
    i2t = torch.stack([kind.i2t[0] for kind in scores.values()])  # [K, captions]
    # Two captions that the model reads alike may still differ by rounding.
    return [best and right not in wrong for best in (i2t[:, :1] > i2t[:, 1:]).all(1).tolist()]
