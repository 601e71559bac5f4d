"""Which texts a picture has in training, and which of them it has at a turn."""

import hashlib
import re

# The end of a sentence, with the blanks after it; or a line's.
END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|[\r\n]+")


def sentences(captions: list[str]) -> list[str]:
    """The sentences of captions, without blanks around them: at least one, if one is not blank."""
    return list(filter(None, map(str.strip, END.split("\n".join(captions)))))


def drawn(count: int, seed: int, turn: int, index: int) -> int:
    """Which of a picture's `count` texts it has at a turn: pseudorandom, a pure function."""
    digest = hashlib.blake2b(f"{seed} {turn} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count
