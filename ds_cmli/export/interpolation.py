"""Weights between those that training started from and those that it ended with.

This is WiSE-FT (Wortsman et al., 2022, arXiv 2109.01903): of a fine-tuned model and the model it
began as, (1 - share) * source + share * trained, parameter by parameter. Temperatures are
parameters too.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import Config
from ds_cmli.config.sources import Source, applied
from ds_cmli.losses.objective import Objective

if TYPE_CHECKING:
    from ds_cmli.data.tokens import CaptionTokenizer

SOURCE = "student.source"


@dataclass
class Ends:
    """The weights of both ends, by name: fp32, on the CPU."""

    source: dict[str, Tensor]
    trained: dict[str, Tensor]

    def put_between(self, objective: Objective, share: float) -> None:
        """Set the weights of `objective`; at a share of 0 and of 1 they are an end's to the bit."""
        between = {}
        for name, trained in self.trained.items():
            source = self.source.get(name)
            if source is None or share == 1 or not trained.is_floating_point():
                between[name] = trained
            else:
                between[name] = source.lerp(trained, share)
        objective.load_state_dict(between)


def check(config: Config) -> None:
    """Raise `UserError` unless the student of a run began as a whole model that is still there."""
    source = Source(config.student.source)
    if not source.name:
        raise UserError(
            f"--interpolate has no effect: the run has no {SOURCE}, between which and the "
            "trained weights it would be: leave it out"
        )
    applied({"student": {"source": source.name}}, {})  # it can be read


def ends(config: Config, objective: Objective, vocabulary: "CaptionTokenizer") -> Ends:
    """The weights that a run started from and those of `objective`, which it ended with.

    The source is read again, from where it was. Adapters of LoRA are merged in the trained weights,
    and the source has none.

    Raises:
        UserError: the source is gone, or does not fit.
    """
    from ds_cmli.engine import build_models

    student = replace(config.student, lora={}, freeze_image=0, freeze_text=0)
    loss = replace(config.loss, weights=dict.fromkeys(objective.losses, 1.0), start={})
    optim = replace(config.optim, negatives="micro_batch")
    begun, _ = build_models(
        replace(config, student=student, loss=loss, optim=optim),
        vocabulary.vocab_size,
        special=vocabulary.special,
    )
    trained = {name: value.cpu().clone() for name, value in objective.state_dict().items()}
    source = begun.state_dict()
    return Ends(source, trained)
