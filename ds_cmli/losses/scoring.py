"""What a trained model's scores of pairs take from its losses."""

from functools import cached_property
from typing import TYPE_CHECKING

from ds_cmli.cmli.pooling import PooledScores

if TYPE_CHECKING:
    from ds_cmli.losses.objective import Objective


class Scoring:
    """A model in use, whose weights stay as they are."""

    objective: "Objective"

    @cached_property
    def scales(self) -> dict[str, float]:
        """1/temperature of each kind of scores that was trained: "global", "cmli", "flair"."""
        return self.objective.score_scales()

    @cached_property
    def flair(self) -> PooledScores | None:
        """FLAIR's scores of embeddings; None if they were not trained."""
        return self.objective.flair_scores()
