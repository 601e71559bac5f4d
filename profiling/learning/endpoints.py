"""python -m profiling.learning.endpoints RUN [NAME ...]

Measures the endpoints of an experiment that training itself does not: `endpoints.json` in the run's
folder. All scenes are the same for every run.

Shapes: n scenes, C concepts, K classes, H hidden size.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.contrastive import upcast
from ds_cmli.config import plugins
from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.scenes import EVAL_SEED, Scenes
from ds_cmli.evaluate.embed import EmbedSettings, Share, embed_share
from ds_cmli.evaluate.held_out import HeldOut
from ds_cmli.evaluate.metrics import RECALLS, pictures_of_patches
from ds_cmli.evaluate.model import EvaluatedModel
from ds_cmli.evaluate.retrieval import kinds, pair_scores
from ds_cmli.evaluate.suites.class_texts import class_vectors
from ds_cmli.evaluate.suites.dense import areas
from ds_cmli.evaluate.suites.masks import IGNORED
from ds_cmli.inference import Model
from ds_cmli.losses.functions import match_patches
from profiling.learning import records
from profiling.learning.drawings import redrawn
from profiling.learning.linked import COLOURS, PERSONS, LinkedScenes
from profiling.learning.plan import AFTERWARDS, PLUGIN

SCENES = 600  # of the split "unseen", on which the primary endpoint is measured
FEWER = 300  # of the other splits
PAIRS = 150  # of linked scenes
BATCH = 50
PROBED = 2  # the probe is fitted to every second training concept
RIDGE = 0.1  # of the probe, with features of unit length


@dataclass(frozen=True)
class Retrieval:
    """Mean recall of a split's scenes."""

    mean_recall: float
    # How many of R@1, R@5 and R@10, from image to text and from text to image, each scene hits: a
    # digit a scene. Their mean over 6 is the mean recall.
    hits: str


class Endpoints:
    """What is measured of a trained student."""

    def __init__(self, run: Path):
        self.model = Model.load(run)
        self.pictures = DemoPictures(self.model.config.data.image_size)
        self.scales = self.model.objective.score_scales()
        self.kind = kinds(self.scales)[-1]  # the sum of all scores where several are trained

    def retrieval(self, share: Share) -> Retrieval:
        hits = torch.zeros(len(share.texts.number), dtype=torch.int64)
        for scores in self.scores(share):  # each scene's query is a row
            own = scores.diagonal()[:, None]
            # A tie is no hit; NaN never is.
            rank = (~(scores < own)).sum(1) - 1
            for k in RECALLS:
                hits += rank < k
        digits = "".join(map(str, hits.tolist()))
        return Retrieval(hits.sum().item() / (records.HITS * len(hits)), digits)

    def linked(self, kind: str) -> tuple[float, float]:
        """How often a picture prefers its own caption, and a caption its own picture."""
        scenes = LinkedScenes(kind, PAIRS, self.pictures, self.model.tokenizer)
        of_pictures, of_captions = self.scores(self.embedded(scenes))
        return own_preferred(of_pictures), own_preferred(of_captions)

    def matches(self) -> dict[str, float]:
        """The share of tokens whose best patch lies in their picture, by the class of their word.

        On the scenes of the primary endpoint.
        """
        share, scenes = self.unseen, self.scenes("unseen", self.pictures, SCENES)
        by_word: dict[str, list[bool]] = {}
        images, texts = share.images, share.texts
        shown = pictures_of_patches(images.cell_picture, images.square)  # [n, N]
        for image, text in share.pair_rows():
            tokens, words = texts.tokens_of(text), word_classes(scenes, text)
            owners = texts.token_picture[tokens]
            match = match_patches(texts.tokens[None, tokens], images.patches[image, None])[0]
            hits = shown[image][match] == owners
            for word, hit, owner in zip(words, hits.tolist(), owners.tolist(), strict=True):
                if owner >= 0:
                    by_word.setdefault(word, []).append(hit)
                    by_word.setdefault("all", []).append(hit)
        return {word: sum(hits) / len(hits) for word, hits in by_word.items()}

    def segmentation(self) -> float:
        """Mean intersection over union of patches: each is of the name, of all C, that fits best.

        On the scenes of the primary endpoint; patches of empty quarters do not count.
        """
        scenes, concepts = self.scenes("unseen", self.pictures, SCENES), self.pictures.held_out
        images, how = self.unseen.images, EmbedSettings(BATCH, self.model.device)
        objective, tokenizer = self.model.objective, self.model.tokenizer
        model = EvaluatedModel("", self.model.config, objective, tokenizer, how)
        names = [self.pictures.names[concept] for concept in concepts]
        vectors = class_vectors(model, names, ["{}"])
        of_kind = vectors.get("cmli", vectors["global"])  # [C, D]
        number = torch.full((len(self.pictures.names),), IGNORED)
        number[concepts] = torch.arange(len(concepts))
        shown = pictures_of_patches(images.cell_picture, images.square)  # [n, N]
        total = torch.zeros(3, len(concepts), dtype=torch.int64)
        for scene, row in enumerate(shown):
            drawn = torch.tensor([*(concept for concept, _ in scenes.layout(scene)), -1])
            mask = torch.where(row < 0, IGNORED, number[drawn[row]])
            best = (upcast(images.patches_of(scene)) @ of_kind.t()).argmax(1)
            total += areas(best, mask, len(concepts))
        both, ours, theirs = total.double()
        union = ours + theirs - both
        return (both / union)[union > 0].mean().item()

    def probe(self) -> float:
        """Accuracy of a linear probe for the category of concepts that the student never saw.

        A ridge regression of the categories on the image class tokens of single pictures, fitted to
        the training concepts.
        """
        train, test = self.pictures.training[::PROBED], self.pictures.held_out
        concepts = [*train, *test]
        cells = torch.from_numpy(self.pictures.images[concepts])  # [C, 3, side, side]
        size, side = self.pictures.size, self.pictures.cell
        images = torch.full((len(cells), 3, size, size), 255, dtype=torch.uint8)
        start = (size - side) // 2
        images[:, :, start : start + side, start : start + side] = cells
        with torch.no_grad():
            parts = [self._class_tokens(part) for part in images.split(BATCH)]
        classes = torch.tensor([self.pictures.categories[concept] for concept in concepts])
        return probe_accuracy(torch.cat(parts).double(), classes, len(train))

    def _class_tokens(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, H] on the CPU."""
        return self.student.image_embeddings(images.to(self.model.device))[0].cpu()

    @property
    def student(self):
        return self.model.objective.student

    @cached_property
    def unseen(self) -> Share:
        return self.embedded(self.scenes("unseen", self.pictures, SCENES))

    def scenes(self, split: str, pictures: DemoPictures, count: int) -> Scenes:
        how = self.model.config.data.scenes
        return Scenes(split, EVAL_SEED, count, pictures, self.model.tokenizer, how)

    def embedded(self, scenes: Scenes) -> Share:
        how = EmbedSettings(BATCH, self.model.device)
        share = embed_share(self.student, HeldOut(scenes), self.model.collate, how)
        assert torch.equal(share.held_out.image_of, torch.arange(len(scenes)))
        return share

    def scores(self, share: Share) -> tuple[Tensor, Tensor]:
        """[n, n] from the pictures' side, and from the captions', whose rows are captions."""
        captions = share.texts.block(torch.arange(len(share.texts.number)))
        flair = self.model.flair
        device = torch.device("cpu")
        both = pair_scores(share.images, slice(None), captions, self.scales, device, flair)
        i2t, t2i = both[self.kind]
        return i2t, t2i.t()


def own_preferred(scores: Tensor) -> float:
    """How often a row prefers its own column to its pair's, a tie being half: [n, n] -> 0 to 1."""
    rows = torch.arange(len(scores))
    own, other = scores[rows, rows], scores[rows, rows ^ 1]
    return ((own > other).double() + (own == other).double() / 2).mean().item()


def word_classes(scenes: Scenes, index: int) -> list[str]:
    """The class of each valid token's word: "attribute", "head", the last of a name, or "other"."""
    caption, spans = scenes.caption(index)
    tokens = scenes.pair(index).tokens
    out = []
    for end, valid in zip(tokens.ends, tokens.valid, strict=True):
        if not valid:
            continue
        last = next((stop for first, stop in spans if first < end <= stop), None)
        start = caption.rfind(" ", 0, end - 1) + 1
        stop = caption.find(" ", end - 1)
        word = caption[start : stop if stop >= 0 else None]
        if word in (*COLOURS, *PERSONS):
            out.append("attribute")
        else:
            out.append("head" if stop in (-1, last) else "other")
    return out


def probe_accuracy(features: Tensor, classes: Tensor, train: int) -> float:
    """Fit a ridge regression of classes to the first rows, and return its accuracy on the others.

    Args:
        features: fp64 [C, H].
        classes: int64 [C].
        train: number of rows to fit to.
    """
    one = torch.ones(len(features), 1, dtype=features.dtype)
    x = torch.cat([features, one], 1)
    y = F.one_hot(classes).to(features.dtype)  # [C, K]
    square = x[:train].t() @ x[:train] + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(square, x[:train].t() @ y[:train])
    return ((x[train:] @ weights).argmax(1) == classes[train:]).double().mean().item()


Found = dict[str, float | str]


def _recall(name: str, retrieval: Retrieval) -> Found:
    return {f"{name}/mean_recall": retrieval.mean_recall, f"{name}/hits": retrieval.hits}


def _unseen(endpoints: Endpoints) -> Found:
    return _recall("unseen", endpoints.retrieval(endpoints.unseen))


def _seen(endpoints: Endpoints) -> Found:
    scenes = endpoints.scenes("seen", endpoints.pictures, FEWER)
    return _recall("seen", endpoints.retrieval(endpoints.embedded(scenes)))


def _redrawn(endpoints: Endpoints, name: str, drawings: str) -> Found:
    scenes = endpoints.scenes("seen", redrawn(endpoints.pictures, drawings), FEWER)
    return _recall(name, endpoints.retrieval(endpoints.embedded(scenes)))


def _linked(endpoints: Endpoints, kind: str) -> Found:
    of_pictures, of_captions = endpoints.linked(kind)
    return {f"{kind}/captions": of_pictures, f"{kind}/pictures": of_captions}


def _matches(endpoints: Endpoints) -> Found:
    return {f"match/{name}": value for name, value in endpoints.matches().items()}


def _segmentation(endpoints: Endpoints) -> Found:
    return {"segmentation/miou": endpoints.segmentation()}


def _probe(endpoints: Endpoints) -> Found:
    return {"probe/accuracy": endpoints.probe()}


# What is measured, by the part of an endpoint's name before "/".
MEASURES: dict[str, Callable[[Endpoints], Found]] = {
    "unseen": _unseen,
    "seen": _seen,
    "style": partial(_redrawn, name="style", drawings="noto"),
    "kept_aside": partial(_redrawn, name="kept_aside", drawings="openmoji"),  # of no plan
    "one_name": partial(_linked, kind="one_name"),
    "swap": partial(_linked, kind="swap"),
    "match": _matches,
    "probe": _probe,
    "segmentation": _segmentation,
}


def measure(run: Path, wanted: list[str]) -> Found:
    """Measure the wanted endpoints, with what is measured along with them."""
    endpoints = Endpoints(run)
    out: Found = {}
    for name in dict.fromkeys(endpoint.partition("/")[0] for endpoint in wanted):
        out |= MEASURES[name](endpoints)
    return out


if __name__ == "__main__":
    plugins.load(PLUGIN)
    folder = Path(sys.argv[1])
    file = folder / records.MEASURED
    known = json.loads(file.read_text()) if file.is_file() else {}
    known |= measure(folder, sys.argv[2:] or list(AFTERWARDS))
    file.write_text(json.dumps(known, indent=1) + "\n")
