"""Which ranks can need the most memory.

With ZeRO-1 and 2 each rank keeps the reduced gradients of its own share of the parameters from the
moment in which backward computes them. The last rank has the parameters that come last, whose
gradients are computed first, while most activations are still stored. With the other stages all
ranks need the same.
"""


def candidates(stage: int, world_size: int) -> list[int]:
    """The ranks of which one needs the most, the likeliest first: a few of ZeRO-1 and 2, otherwise rank 0 for all."""
    return list(dict.fromkeys([world_size - 1, 0, world_size // 2])) if stage in (1, 2) else [0]


def likeliest(stage: int, world_size: int) -> int:
    """The rank that needs the most, where predicting several would take too long."""
    return candidates(stage, world_size)[0]
