"""Scenes that come in pairs and differ in one thing: hard negatives of each other.

Scenes 2k and 2k + 1 have the same words around the names, the same quarters, and
- "one_name": the same pictures but one, so that their captions differ in one name;
- "swap": two names whose attributes are exchanged, such as "red heart" and "blue circle" against
  "blue heart" and "red circle", and otherwise the same pictures.
"""

import random
from collections.abc import Sequence
from itertools import permutations

from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.scenes import EVAL_SEED, MANY, Layout, Scenes
from ds_cmli.data.tokens import CaptionTokenizer

KINDS = ("one_name", "swap")
# First words of names that say how a thing is, and not what it is.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
PERSONS = ("man", "woman", "men", "women")
Swap = tuple[int, int, int, int]  # two concepts, and the two with their attributes exchanged


class LinkedScenes(Scenes):
    def __init__(self, kind: str, pairs: int, pictures: DemoPictures, tokenizer: CaptionTokenizer):
        """Draw the scenes: for "one_name" of held-out concepts, for "swap" of all."""
        split = "unseen" if kind == "one_name" else kind
        super().__init__(split, EVAL_SEED, 0, pictures, tokenizer, "sentences")
        if kind == "swap":
            self.concepts = sorted([*pictures.training, *pictures.held_out])
        # Half of the pairs exchange colours, half exchange who somebody is.
        self.swaps = [swaps(pictures, self.concepts, of) for of in (COLOURS, PERSONS)]
        shown: set[frozenset[tuple[int, int]]] = set()
        draw = random.Random(f"{kind} {EVAL_SEED}")
        while len(self._layouts) < 2 * pairs:
            if kind == "swap":
                both = self._swapped(draw, self.swaps[len(self._layouts) // 2 % 2])
            else:
                both = self._replaced(draw)
            scenes = {frozenset(layout) for layout in both}
            if not scenes & shown:
                shown |= scenes
                self._layouts += both
        self.length = len(self._layouts)

    def _replaced(self, draw: random.Random) -> list[Layout]:
        """A scene, and the same with another picture in the place of one of its own."""
        count = draw.choice(MANY)
        *concepts, other = draw.sample(self.concepts, count + 1)
        changed = list(concepts)
        changed[draw.randrange(count)] = other
        return _placed(draw, concepts, changed)

    def _swapped(self, draw: random.Random, of: list[Swap]) -> list[Layout]:
        first, second, *exchanged = draw.choice(of)
        others = [
            concept for concept in self.concepts if concept not in (first, second, *exchanged)
        ]
        rest = draw.sample(others, draw.choice(MANY) - 2)
        order = draw.sample(range(2 + len(rest)), 2 + len(rest))
        scenes = [first, second, *rest], [*exchanged, *rest]
        return _placed(draw, *([concepts[place] for place in order] for concepts in scenes))

    def sentence_of(self, index: int) -> int:
        return index - index % 2


def _placed(draw: random.Random, *scenes: list[int]) -> list[Layout]:
    """Put the pictures of each scene into the same quarters, in the same order."""
    cells = draw.sample(range(4), len(scenes[0]))
    return [list(zip(concepts, cells, strict=True)) for concepts in scenes]


def swaps(pictures: DemoPictures, concepts: list[int], attributes: Sequence[str]) -> list[Swap]:
    """All ways to exchange the attributes, the first words of their names, of two concepts."""
    by_thing: dict[str, dict[str, int]] = {}  # "heart" -> {"red": its concept, ...}
    for concept in concepts:
        attribute, _, thing = pictures.names[concept].partition(" ")
        if attribute in attributes and thing:
            by_thing.setdefault(thing, {})[attribute] = concept
    out = []
    for one, other in permutations(by_thing.values(), 2):
        for a, b in permutations(sorted(one.keys() & other.keys()), 2):
            out.append((one[a], other[b], one[b], other[a]))
    return out
