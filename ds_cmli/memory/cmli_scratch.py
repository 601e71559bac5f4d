"""What the all-pairs operator holds inside, where no dispatch mode sees it.

Shapes: I images, J texts, N patches, M text positions, D embedding dimension.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ds_cmli.cmli.peak_memory import cmli_peak_bytes


def cmli_scratch_bytes(
    func: Any, args: tuple, text_lengths: list[int] | None, first_text: int
) -> int:
    """Bytes that the operator `func` holds at its peak beyond what it returns. CPU-GPU sync on real tensors.

    Args:
        args: those of the call.
        text_lengths: the number of valid tokens of each text of all ranks, or of the first ones if they repeat; used
            where the mask is fake. None: the most that any lengths need.
        first_text: the place of the first text of `args` among those of all ranks.
    """
    forward = func is torch.ops.ds_cmli.cmli_forward.default
    image, text, token_mask, image_mask = args[:4] if forward else args[2:6]
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    backend, scratch_bytes = args[4:6] if forward else args[8:10]
    fake = isinstance(token_mask, FakeTensor)
    lengths = None
    if text_lengths:
        lengths = [text_lengths[(first_text + j) % len(text_lengths)] for j in range(J)]
    peak = cmli_peak_bytes(
        I, J, N, M, D, image.dtype,
        backend=backend,
        recompute=not args[6] if forward else not args[6].numel(),
        scratch_bytes=scratch_bytes,
        text_lengths=lengths if fake else token_mask.sum(1).tolist(),  # CPU-GPU sync
        image_lengths=None if image_mask is None or fake else image_mask.sum(1).tolist(),
    )  # fmt: skip
    if forward:
        return peak.forward - peak.saved - 2 * I * J * max(4, image.dtype.itemsize)
    return peak.backward - peak.gradients
