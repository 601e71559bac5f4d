"""The choice between captions of a picture, and between pictures of a caption.

Shapes: n questions, I pictures and J captions of each.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor

from ds_cmli.cmli.pair_scores import BothWays
from ds_cmli.evaluate.model import EvaluatedModel, PictureFile
from ds_cmli.evaluate.report import prefixed
from ds_cmli.evaluate.suites.task import Measure, Measured

AT_A_TIME = 256  # questions whose embeddings are in memory


@dataclass(frozen=True)
class Question:
    """Pictures and captions that are compared with one another, as many in each of a task's."""

    pictures: tuple[PictureFile, ...]
    captions: tuple[str, ...]
    group: str = ""  # the category of the question


class Choices:
    """A task of questions: `suites.task.Task`."""

    chance: ClassVar[dict[str, float]]  # of random scores, by metric

    @property
    def groups(self) -> list[str]:
        return list(map(attrgetter("group"), self.questions))

    @cached_property
    @abstractmethod
    def questions(self) -> list[Question]:
        """The questions of the task's lists. Raises `UserError`."""

    @abstractmethod
    def measures(self, i2t: Tensor, t2i: Tensor) -> dict[str, Measure]:
        """The metrics by one kind of scores, [n, I, J]: for captions `i2t`, for pictures `t2i`."""

    def read(self) -> None:
        assert self.questions

    def run(self, model: EvaluatedModel) -> Measured:
        out: dict[str, Measure] = {}
        for kind, (i2t, t2i) in question_scores(model, self.questions).items():
            out |= prefixed(f"{kind}/", self.measures(i2t, t2i))
        return Measured(len(self.questions), out, prefixed("chance/", self.chance))


def question_scores(model: EvaluatedModel, questions: Sequence[Question]) -> dict[str, BothWays]:
    """Each kind of scores of the questions' pictures with their captions, fp32 [n, I, J]."""
    out: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for start in range(0, len(questions), AT_A_TIME):
        part = questions[start : start + AT_A_TIME]
        of_file: dict[PictureFile, int] = {}  # the row of each
        of_ids: dict[tuple[int, ...], int] = {}  # captions that the model reads alike have one row
        row: dict[str, int] = {}  # of each caption
        for question in part:
            for file in question.pictures:
                of_file.setdefault(file, len(of_file))
            for text in question.captions:
                ids = tuple(model.tokenizer(text).input_ids)
                row[text] = of_ids.setdefault(ids, len(of_ids))
        images = model.images(list(of_file))
        texts = model.texts(list({number: text for text, number in row.items()}.values()))
        for question in part:
            rows = torch.tensor([of_file[file] for file in question.pictures])
            columns = torch.tensor([row[text] for text in question.captions])
            # Equal columns of a matrix product need not be bit-equal: each is computed once.
            columns, place = columns.unique(return_inverse=True)
            for kind, scores in model.scores(images, rows, texts, columns).items():
                for stack, way in zip(out.setdefault(kind, ([], [])), scores, strict=True):
                    stack.append(way[:, place])
    return {kind: BothWays(*map(torch.stack, ways)) for kind, ways in out.items()}


def first_is_best(scores: Tensor) -> Tensor:
    """Whether the first of [n, J] is strictly higher than all others: bool [n]; NaN never is."""
    return (scores[:, :1] > scores[:, 1:]).all(1)
