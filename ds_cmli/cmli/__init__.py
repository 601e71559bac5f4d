"""All-pairs Cross-Modal Late Interaction (CMLI): exact scores of every image with every text, and
the loss on them. Imports torch alone: the folder can be copied into any project."""

from .loss import CMLILoss, PairLoss
from .op import cmli_scores

__all__ = ["CMLILoss", "PairLoss", "cmli_scores"]
