"""Millions of strings without a Python object for each."""

from array import array
from collections.abc import Iterable, Iterator


class Strings:
    """A list of strings that only grows, as UTF-8 in one buffer.

    Loading processes are forked and share it. A list of `str` would be copied into each of them little by little, as
    counting references writes to it.
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
