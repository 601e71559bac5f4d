"""What a trained model's scores of pairs take from its losses."""

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_cmli.losses.objective import Objective


class Scoring:
    """A model in use, whose weights stay as they are."""

    objective: "Objective"

    @cached_property
    def scales(self) -> dict[str, float]:
        """1/temperature of each kind of scores that was trained: "global", "cmli"."""
        return self.objective.score_scales()
