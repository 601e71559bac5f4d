"""Counting samples that cannot be used, and deciding when there are too many."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ds_cmli.common.errors import UserError
from ds_cmli.distributed.collective_flags import CollectiveFlags

if TYPE_CHECKING:
    from ds_cmli.data.bad_file import BadFile

Bad = tuple[str, str]  # file name, reason

SHOWN = 5
NO_TOKEN = "caption without a token"
EMPTY = "empty caption"


class Refused(ValueError):
    """A picture or its captions are not read; the message tells the user why."""


@dataclass
class BadSamples:
    """Counts of the broken images and captions without a token that training meets, and the limit of their share.

    A sample counts each time it is requested, so that the counts of several ranks simply add up. The share is relative
    to the whole data set until more samples than that have been requested, then to all requested samples: one broken
    image in the first batch is one of `length`, not one of a batch.
    """

    max_share: float  # the largest share that is accepted
    length: int  # number of samples in the training set
    at_load: list[Bad] = field(
        default_factory=list
    )  # samples that were left out of the training set at load
    count: int = 0  # bad samples that this rank has met in training
    first: list[Bad] = field(default_factory=list)  # the first few of all, to be shown
    of_ranks: list[Bad] = field(default_factory=list)  # `first` of all ranks at the last `gather`
    file: "BadFile | None" = None  # names all of them; only rank 0 has one
    waiting: list[Bad] = field(default_factory=list)  # met on this rank since the last `gather`

    def __post_init__(self):
        self.first.extend(self.at_load[:SHOWN])

    def add(self, bad: list[Bad]) -> None:
        self.count += len(bad)
        self.waiting += bad
        for item in bad:
            if len(self.first) < SHOWN and item not in self.first:
                self.first.append(item)

    def too_many(self, count: int, seen: int) -> bool:
        """Whether `count` bad samples of `seen` requested since the start (both over all ranks) exceed the share."""
        passes = max(1.0, seen / self.length) if self.length else 1.0
        return (
            count + len(self.at_load) * passes
            > self.max_share * (self.length + len(self.at_load)) * passes
        )

    def gather(self, flags: CollectiveFlags) -> int:
        """The count over all ranks; what they have met since the last call is written. Collective."""
        every = flags.gather((self.count, self.first, self.waiting))  # collective
        self.waiting = []
        self.of_ranks = [item for _, first, _ in every for item in first]
        if self.file is not None:
            self.file.write((item for *_, met in every for item in met), "training")
        return sum(count for count, *_ in every)

    def evaluated(self, left_out: list[Bad]) -> None:
        """Record what an evaluation has left out, the same on every rank."""
        if self.file is not None:
            self.file.write(left_out, "evaluation")

    def check(self, flags: CollectiveFlags, seen: int) -> None:
        """Raise `UserError` on all ranks together if there are too many; `seen` is that of `too_many`. Collective."""
        count = self.gather(flags)  # collective
        if self.too_many(count, seen):
            self.first = self.of_ranks
            raise UserError(self.message(count))

    def summary(self, flags: CollectiveFlags) -> list[str]:
        """The lines to print at the end of a run; none if no sample was skipped. Collective."""
        skipped = self.gather(flags)  # collective
        if not skipped and not self.at_load:
            return []
        first = ", ".join(told(self.first))
        met = f"{len(self.at_load)} samples at load and {skipped} in training"
        return [f"skipped {met}; the first: {first}{self._named()}"]

    def message(self, count: int) -> str:
        """The message of the `UserError` for too many bad samples; `count` as in `too_many`."""
        names = ", ".join(told(self.first))
        return (
            f"{count + len(self.at_load)} samples of {self.length + len(self.at_load)} cannot be used, more than "
            f"data.max_bad_share = {self.max_share}: mend or remove them, or raise it. "
            f"The first: {names}{self._named()}"
        )

    def _named(self) -> str:
        return "" if self.file is None else f"; all are in {self.file.path}"


def told(bad: list[Bad]) -> list[str]:
    """The first few bad samples as text: `["2.png (no such file)", ...]`."""
    return [f"{name} ({reason})" for name, reason in bad[:SHOWN]]
