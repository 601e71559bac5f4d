"""Choices: does a picture fit its caption better than others that were made to mislead?

SugarCrepe, ARO, Winoground and the like, as lines of JSON, whose first caption is the right one:
`{"image": "2.jpg", "captions": ["a dog chases a cat", "a cat chases a dog"]}`. Lines of an equal
"group", which may be left out, are one question: whether all of them are right. Captions are
ranked by the scores from the picture's side.
"""

import json
from collections import defaultdict
from pathlib import Path

import torch

from ds_cmli.common import blame
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import View
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Evaluator, Files, block, embed
from ds_cmli.evaluate.report import Metrics


class Choices(Files):
    """All captions of all lines; pictures are relative to `folder`, by default that of the file."""

    def __init__(self, file: str, folder: str | None, config: DataConfig) -> None:
        super().__init__(View.of(config), [])
        self.lines: list[tuple[str, range]] = []  # the group, and the numbers of the captions
        with blame(f"--choices is {file!r}, which cannot be read"):
            for number, text in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
                line = json.loads(text)
                captions, first = line["captions"], len(self.rows)
                image = Path(folder or Path(file).parent, line["image"])
                if len(captions) < 2 or {*map(type, captions)} != {str}:
                    raise ValueError(f"line {number}: give two captions or more, as texts")
                self.rows += [(image, caption) for caption in captions]
                group = str(line.get("group", f"line {number}"))
                self.lines.append((group, range(first, len(self.rows))))


@torch.no_grad()
def choose(model: Evaluator, choices: Choices) -> Metrics:
    """The shares of lines, and of groups, whose first captions are strictly above. Collective."""
    own = embed(model, choices)  # collective
    right: list[tuple[str, int, list[bool]]] = []  # group, captions, and of each kind of scores
    for group, rows in choices.lines:
        if not all(row in own.texts for row in rows):
            continue  # another rank has the line, or it cannot be used as a whole
        image = own.images[own.image_of[rows[0]]]
        scores = model.scores([image], block([own.texts[row] for row in rows]))
        i2t = torch.stack([both.i2t[0] for both in scores.values()])  # [K, captions]
        above = (i2t[:, :1] > i2t[:, 1:]).all(1).tolist()  # CPU-GPU sync
        first, *others = (model.tokenizer(choices.rows[row][1]).input_ids for row in rows)
        # Where the model reads two captions alike, their scores may still differ by rounding.
        right.append((group, len(rows), [one and first not in others for one in above]))
    every = [one for of_rank in distributed.gather_objects(right) for one in of_rank]  # collective
    groups: dict[str, list[list[bool]]] = defaultdict(list)
    for group, _, values in every:
        groups[group].append(values)
    out, number = {**own.counts, "choices": len(every)}, max(len(every), 1)
    out["chance/accuracy"] = sum(1 / captions for _, captions, _ in every) / number
    for k, kind in enumerate(model.kinds):
        whole = [all(values[k] for values in of_group) for of_group in groups.values()]
        out[f"{kind}/accuracy"] = sum(values[k] for _, _, values in every) / number
        out[f"{kind}/group"] = sum(whole) / max(len(whole), 1)
    return out
