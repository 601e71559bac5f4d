"""Which texts a picture has in training, right and wrong ones, and which of them a step takes."""

import hashlib
import random
import re
from itertools import combinations, cycle, islice

# The end of a sentence, with the blanks after it; or a line's.
END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|[\r\n]+")


def sentences(captions: list[str]) -> list[str]:
    """The sentences of captions, without blanks around them: at least one, if one is not blank."""
    return list(filter(None, map(str.strip, END.split("\n".join(captions)))))


# Words that say little: two texts that differ in their places may say the same.
SMALL = frozenset(
    """
    a an the this that these those and or but of in on at by to for from with as is are was were be
    it its his her their there here he she they we you i
    """.split()  # noqa: SIM905
)
MOST_WORDS = 32  # of a caption that are exchanged: more are drawn from


def swapped(caption: str, wanted: int, *key: int) -> list[str]:
    """The caption with two of its words exchanged: at most so many different texts, pseudorandom.

    Not with words of `SMALL`, and two words that are equal but for upper case are not exchanged. Of
    a caption of one such word there are none. NegCLIP (Yuksekgonul et al., 2023) exchanges words of
    a kind, which it takes a tagger for.
    """
    words = list(re.finditer(r"[^\W_]+(?:['’-][^\W_]+)*", caption))
    large = list(filter(lambda word: word[0].lower() not in SMALL, words))
    draw = random.Random(" ".join(map(str, key)))
    large = sorted(draw.sample(large, min(len(large), MOST_WORDS)), key=lambda word: word.start())
    pairs = list(combinations(large, 2))
    draw.shuffle(pairs)
    texts: dict[str, None] = {}
    for a, b in pairs:
        if a[0].lower() == b[0].lower():
            continue
        between = caption[a.end() : b.start()]
        texts[caption[: a.start()] + b[0] + between + a[0] + caption[b.end() :]] = None
        if len(texts) == wanted:
            break
    return list(texts)


def drawn(count: int, wanted: int, seed: int, turn: int, index: int) -> list[int]:
    """Which of a picture's `count` texts it has at a turn: pseudorandom, a pure function.

    None comes twice before all have come: with fewer than `wanted` they are repeated in their
    order.
    """
    left, order = list(range(count)), []
    for k in range(min(wanted, count)):
        key = f"{seed} {turn} {index}" + (f" {k}" if k else "")
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        order.append(left.pop(int.from_bytes(digest, "big") % len(left)))
    return list(islice(cycle(order), wanted))
