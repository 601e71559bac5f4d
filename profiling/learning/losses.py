"""Two losses of the experiment alone, which say what a match is worth: an oracle's, and a shuffled one.

Both are equation (9), `losses.distillation.TargetText`, with another match of tokens and patches.
Shapes: B pairs, M text positions, N patches.
"""

import torch
from torch import Tensor

from ds_cmli.evaluate.metrics import pictures_of_patches
from ds_cmli.losses.distillation import TargetText
from ds_cmli.losses.inputs import LossInputs

POSITIONS = 2**16  # more than a text has (`data.context_length`)


class OracleText(TargetText):
    """Matches each token with patches of the picture that it names, which a scene knows.

    Tokens that name none are not counted; on data without places, that is all of them.
    """

    def similarities(self, inputs: LossInputs) -> Tensor:
        named = self._named(inputs)
        # A token that is not counted may match any patch.
        elsewhere = ~named & named.any(2, keepdim=True)
        return super().similarities(inputs).masked_fill(elsewhere, -torch.inf)

    def counted(self, inputs: LossInputs) -> Tensor:
        return super().counted(inputs) & self._named(inputs).any(2)

    @staticmethod
    def _named(inputs: LossInputs) -> Tensor:
        """Whether a patch lies in the picture that a token names: bool [B, M, N]."""
        batch = inputs.batch
        shown = pictures_of_patches(batch.cell_picture, inputs.student.grid)  # [B, N]
        token = batch.token_picture[:, :, None]
        shown = shown.repeat_interleave(len(token) // len(shown), 0)  # of each text's image
        return (token >= 0) & (token == shown[:, None])


class ShuffledText(TargetText):
    """Gives each token the match of another valid token of its text.

    The order depends on the pairs' indices in the data set alone.
    """

    def similarities(self, inputs: LossInputs) -> Tensor:
        similarity = super().similarities(inputs)
        index, mask = inputs.batch.index, inputs.batch.token_mask
        other = others(index.repeat_interleave(len(mask) // len(index)), mask)
        return similarity.gather(1, other[:, :, None].expand_as(similarity))


def others(index: Tensor, token_mask: Tensor) -> Tensor:
    """Another valid token of the same text for each valid token, itself for the other positions.

    Each valid token is another one's; a text's only token is its own.

    Args:
        index: int64 [B], from which the choice is drawn.
        token_mask: bool [B, M].

    Returns:
        int64 [B, M]: in each row a pseudorandom cycle over the valid tokens.
    """
    places = torch.arange(token_mask.shape[1], device=index.device).expand_as(token_mask)
    drawn = scrambled(index[:, None] * POSITIONS + places)
    order = drawn.masked_fill(~token_mask, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    count = token_mask.sum(1, keepdim=True)
    following = torch.where(places < count, (places + 1) % count.clamp(min=1), places)
    return torch.empty_like(order).scatter_(1, order, order.gather(1, following))


def scrambled(x: Tensor) -> Tensor:
    """A pseudorandom number, int64 from 0 to 2**63 - 1, for each int64: the mixer of SplitMix64.

    A generator (Steele, Lea and Flood, 2014) whose state is a number, so that it needs no order.
    """

    def without_sign(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = x * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15; int64 wraps
    x = (x ^ without_sign(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ without_sign(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return (x ^ without_sign(x, 31)) & torch.iinfo(torch.int64).max
