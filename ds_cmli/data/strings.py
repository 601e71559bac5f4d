"""A list of millions of strings without a Python object for each."""

from array import array
from collections.abc import Iterable, Iterator


class Strings:
    """An append-only list of strings, stored as UTF-8 in one buffer.

    Forked loading processes share the buffer. A list of `str` would gradually be copied into each of them, because
    reference counting writes to its objects (copy-on-write).
    """

    def __init__(self, strings: Iterable[str] = ()):
        self.text, self.ends = bytearray(), array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        self.text += string.encode()
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.text[self.ends[index] : self.ends[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
