"""Which text fits a picture: zero-shot classification, and choices beside misleading captions.

A class's global embedding is the normalised mean over its prompts (Radford et al., 2021, section
3.1.4). Token embeddings of different prompts have no mean, so the CMLI scores of the prompts, from
the picture's side, are averaged (FILIP, arXiv 2111.07783, section 3.1).

Choices are lines of JSON with the right caption first, and perhaps with the group of the line:
`{"image": "2.jpg", "captions": ["a dog chases a cat", "a cat chases a dog"], "group": 7}`.

K kinds of scores, B pictures, C classes, N patches, H hidden size, D embedding dimension.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import ImageFolder

from ds_cmli.cmli import cmli_scores
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import View
from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import UserError, blame
from ds_cmli.evaluate.embed import Evaluator, Files, block, embed, left_out, share
from ds_cmli.evaluate.metrics import TOP, Metrics, mean_hits, prefixed, top_hits
from ds_cmli.scores import both_ways

# Seven of OpenAI's eighty for ImageNet, which OpenAI found to work about as well as all.
TEMPLATES = """itap of a {}.
a bad photo of the {}.
a origami {}.
a photo of the large {}.
a {} in a video game.
art of the {}.
a photo of the small {}."""


class ClassPictures(Files):
    """The pictures of a folder of class folders, each with the number of its class."""

    def __init__(self, folder: str, names: str | None, templates: str | None, config: DataConfig):
        with blame(f"--zero-shot {folder}: give a folder with folders of pictures"):
            found = ImageFolder(os.path.expanduser(folder), allow_empty=True)
        if not found.samples:
            raise UserError(f"--zero-shot {folder}: its folders of classes hold no picture")
        super().__init__(View.of(config), [(Path(file), number) for file, number in found.samples])
        self.names = [place.replace("_", " ") for place in found.classes]
        self.names = _lines("--class-names", names) if names else self.names
        self.templates = _lines("--templates", templates) if templates else TEMPLATES.splitlines()
        if (count := len(self.names)) != len(found.classes):
            raise UserError(f"--class-names {names}: {count} names, {len(found.classes)} folders")
        for line in self.templates:
            if line.count("{}") != 1:
                raise UserError(f"--templates {templates}: {line!r} needs one {{}} for the name")


def _lines(option: str, file: str) -> list[str]:
    with blame(f"{option} is {file!r}, which cannot be read"):
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()] or [""]


@torch.no_grad()
def classify(model: Evaluator, pictures: ClassPictures) -> Metrics:
    """Measure `mean_hits` of each score over the pictures of all ranks. Collective."""
    classes, templates = len(pictures.names), len(pictures.templates)
    prompts = [t.replace("{}", name) for name in pictures.names for t in pictures.templates]
    texts, bad = model.texts(dict(enumerate(prompts)), len(prompts))
    for number in bad:
        raise UserError(f"{prompts[number]!r} has no token: name the class by --class-names")
    embedded = block([texts[number] for number in range(len(prompts))])
    prompt_cls, tokens, mask = (x.to(model.device) for x in embedded)  # once, for all pictures
    class_cls = F.normalize(prompt_cls.unflatten(0, (classes, templates)).mean(1), dim=-1)  # [C, H]

    def scores(cls: Tensor, patches: Tensor) -> Tensor:
        """fp32 [B, H], [B, N, D] -> fp32 [K, B, C]."""
        cmli = None
        if "cmli" in model.kinds:
            of_prompts, _ = cmli_scores(patches, tokens, mask)
            cmli = (of_prompts.unflatten(1, (classes, templates)).mean(2),) * 2
        both = both_ways(cls @ class_cls.t(), cmli, model.scales)
        return torch.stack([both[kind].i2t for kind in model.kinds])

    hits, targets, lost, own = [], [], [], share([*range(len(pictures.rows))])
    for numbers, cls, patches, broken in model.images(pictures, own):
        target = torch.tensor([pictures.rows[number][1] for number in numbers], dtype=torch.int64)
        hits.append(top_hits(scores(cls, patches).cpu(), target))  # CPU-GPU sync
        targets.append(target)
        lost += [(pictures.name(number), why) for number, why in broken.items()]
    every = distributed.gather_objects((torch.cat(hits, 2), torch.cat(targets), lost))  # collective
    all_hits, target = torch.cat([hits for hits, *_ in every], 2), torch.cat([x[1] for x in every])
    lost = [one for *_, of_rank in every for one in of_rank]
    out = {"pictures": len(target), "classes": classes, **left_out(len(lost), lost, len(target))}
    for k, kind in enumerate(model.kinds):
        out |= prefixed(f"{kind}/", mean_hits(all_hits[:, k], target))
    return out | {f"chance/top{k}": min(1.0, k / classes) for k in TOP}


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
    """The shares of lines, and of groups, whose first captions are strictly above, by the scores
    from the pictures' side. Collective."""
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
