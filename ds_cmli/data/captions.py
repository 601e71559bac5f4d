"""Which texts a picture has in training, and which of them a step takes."""

import hashlib
import re
from itertools import cycle, islice

# The end of a sentence, with the blanks after it; or a line's.
END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|[\r\n]+")


def sentences(captions: list[str]) -> list[str]:
    """The sentences of captions, without blanks around them: at least one, if one is not blank."""
    return list(filter(None, map(str.strip, END.split("\n".join(captions)))))


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
