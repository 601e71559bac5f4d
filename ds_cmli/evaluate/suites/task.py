"""The interface of a task, and its result: metrics whose samples can be drawn anew.

Shapes: n samples, C classes, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ds_cmli.evaluate.model import EvaluatedModel


@dataclass(frozen=True)
class Measure:
    """A metric: the mean over classes of the sum of `hits` over the sum of `counts`.

    An accuracy has one class, and each sample counts 1. A mean accuracy over categories has a class
    for each; so has a mean intersection over union, with a picture's pixels as `hits` and `counts`.
    Classes that no drawn sample counts for are left out.
    """

    hits: Tensor  # fp64 [n, C]
    counts: Tensor  # fp64 [n, C]

    @classmethod
    def accuracy(cls, right: Tensor, counted: Tensor | None = None) -> "Measure":
        """The share of `right`, [n] of 0 to 1, among the samples `counted`, bool [n]; None: all."""
        counts = torch.ones(len(right), 1) if counted is None else counted[:, None]
        return cls(right.double()[:, None] * counts.double(), counts.double())

    @classmethod
    def mean_of_groups(
        cls, right: Tensor, groups: Sequence[str], counted: Tensor | None = None
    ) -> "Measure":
        """The mean over groups of the share of `right`, [n], among the group's samples.

        Args:
            counted: bool [n], the samples that count; None: all.
        """
        counts = _members(groups)[1]
        if counted is not None:
            counts = counts * counted[:, None]
        return cls(right.double()[:, None] * counts, counts)

    @classmethod
    def mean(cls, measures: "Sequence[Measure]") -> "Measure":
        """The mean of metrics of the same samples."""
        hits = torch.cat(list(map(attrgetter("hits"), measures)), 1)
        return cls(hits, torch.cat(list(map(attrgetter("counts"), measures)), 1))

    @classmethod
    def by_group(cls, right: Tensor, groups: Sequence[str]) -> "dict[str, Measure]":
        """The share of `right`, [n], in each group."""
        out = {}
        names, members = _members(groups)
        for name, member in zip(names, members.t(), strict=True):
            out[name] = cls.accuracy(right, member)
        return out

    @property
    def value(self) -> float:
        return self.resampled(torch.ones(len(self.hits), 1, dtype=torch.float64)).item()

    def resampled(self, times: Tensor) -> Tensor:
        """The metric where each sample was drawn `times`, fp64 [n, R]: fp64 [R]."""
        hits, counts = self.hits.t() @ times, self.counts.t() @ times  # [C, R]
        shown = counts > 0
        ratios = torch.where(shown, hits / counts.clamp(min=1e-300), 0.0)
        return ratios.sum(0) / shown.sum(0).clamp(min=1)


def _members(groups: Sequence[str]) -> tuple[list[str], Tensor]:
    """The names of the groups, and which samples they have: fp64 [n, C]."""
    names, number = np.unique(groups, return_inverse=True)
    return names.tolist(), torch.from_numpy(np.eye(len(names))[number])


@dataclass
class Measured:
    """What one model did on one task."""

    samples: int  # n, equal for all measures
    measures: dict[str, Measure]  # by "<score>/<metric>"
    # Further numbers, such as "chance/<metric>" and `truncated`, the captions that were.
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # lines for the user


class Task(Protocol):
    """A frozen dataclass of settings, checked when it is built.

    Settings of the type `Path` are relative to the suite's folder, and checked to be there.
    """

    def read(self) -> None:
        """Read the task's lists, before any model is loaded.

        Raises:
            UserError: one line with the file, the place and what to do.
        """

    def run(self, model: EvaluatedModel) -> Measured:
        """Measure a model. Raises `UserError` for a picture that cannot be read."""
