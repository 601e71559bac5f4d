"""Counting samples that cannot be used, and deciding when there are too many."""

from dataclasses import dataclass, field

from ds_cmli.common.errors import UserError
from ds_cmli.distributed.collective_flags import CollectiveFlags

Bad = tuple[str, str]  # file name, reason

SHOWN = 5
NO_TOKEN = "caption without a token"
EMPTY = "empty caption"


class Refused(ValueError):
    """Why a picture or its captions are not read, in words for the user."""


@dataclass
class BadSamples:
    """Broken images and captions without a token, met in training against the size of the data set.

    A sample counts each time it is asked for, so counts of several ranks simply add up. The share is taken of the
    whole data set, or of all samples asked for once these are more: one broken image in the first batch is one of
    `length`, not one of a batch.
    """

    max_share: float  # more than this share is too many
    length: int  # samples of the training set
    at_load: list[Bad] = field(default_factory=list)  # left out of the training set from the start
    count: int = 0
    first: list[Bad] = field(default_factory=list)

    def __post_init__(self):
        self.first.extend(self.at_load[:SHOWN])

    def add(self, bad: list[Bad]) -> None:
        self.count += len(bad)
        for item in bad:
            if len(self.first) < SHOWN and item not in self.first:
                self.first.append(item)

    def too_many(self, count: int, seen: int) -> bool:
        """`count` bad ones among `seen` samples asked for since the start, both over all ranks."""
        passes = max(1.0, seen / self.length) if self.length else 1.0
        return count + len(self.at_load) * passes > self.max_share * (self.length + len(self.at_load)) * passes

    def check(self, flags: CollectiveFlags, seen: int) -> None:
        """Raise `UserError` on every rank together where there are too many; `seen` as of `too_many`. Collective."""
        every = flags.gather((self.count, self.first))  # collective
        count = sum(n for n, _ in every)
        if self.too_many(count, seen):
            self.first = [item for _, first in every for item in first]
            raise UserError(self.message(count))

    def summary(self, flags: CollectiveFlags) -> list[str]:
        """What to tell at the end of a run, if anything. Collective."""
        skipped = sum(flags.gather(self.count))  # collective
        if not skipped and not self.at_load:
            return []
        first = ", ".join(told(self.first))
        return [f"skipped {len(self.at_load)} samples at load and {skipped} in training; the first: {first}"]

    def message(self, count: int) -> str:
        """The line for the `UserError` once `too_many` says so."""
        names = ", ".join(told(self.first))
        return (
            f"{count + len(self.at_load)} samples of {self.length + len(self.at_load)} cannot be used, more than "
            f"data.max_bad_share = {self.max_share}: mend or remove them, or raise it. The first: {names}"
        )


def told(bad: list[Bad]) -> list[str]:
    """`["2.png (no such file)", ...]`, the first few of them."""
    return [f"{name} ({reason})" for name, reason in bad[:SHOWN]]
