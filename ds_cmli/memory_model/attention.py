"""Which kernel CUDA's attention takes, of those that a program has on.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (`select_sdp_backend`) of PyTorch. On
the GPUs where cuDNN's comes first, it keeps what flash attention keeps.
"""

import torch
from torch import Tensor
from torch.backends import cuda

from ds_cmli.memory_model.gpus import Limits

FLASH, EFFICIENT, MATH = "flash", "efficient", "math"
HALF = (torch.float16, torch.bfloat16)
SMALL = ((8, 6), (8, 9), (12, 0))  # compute capabilities with less shared memory than others have


def chosen(
    query: Tensor,  # [B, H, S, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, E]
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    grouped: bool,  # `enable_gqa`, by which heads of the query share one of key and value
    gpu: Limits,
) -> str:
    inputs = query, key, value
    widths, dtypes = {x.shape[-1] for x in inputs}, {x.dtype for x in inputs}
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    heads, of_keys = query.shape[-3:-2], key.shape[-3:-2] == value.shape[-3:-2]
    fused = all(x.dim() == 4 and x.stride(-1) == 1 and x.numel() for x in inputs)
    fused &= len(dtypes) == len({x.shape[0] for x in inputs}) == 1
    equal = fused and len({x.shape[1] for x in inputs}) == 1
    shared = equal or (fused and grouped and of_keys and not heads[0] % key.shape[1])
    ampere, half, width = gpu.capability >= (8, 0), query.dtype in HALF, query.shape[-1]

    backward = width <= 192 or (width > 224 and not dropout)
    narrow = (
        len(widths) == 1
        and width <= 256
        and (backward or not trained or gpu.capability not in SMALL)
    )
    square = not causal or query.shape[-2] == key.shape[-2]
    if (
        cuda.flash_sdp_enabled()
        and shared
        and ampere
        and half
        and mask is None
        and narrow
        and square
    ):
        return FLASH
    multiple = 8 if half else 4 if ampere else 1
    whole = not any(size % multiple for size in widths) and key.shape[-1] == width
    whole &= not ampere or not any(x.storage_offset() % multiple for x in inputs)
    known = query.dtype in (torch.float16, torch.float32) or (
        ampere and query.dtype == torch.bfloat16
    )
    rows = mask is None or mask.stride(-1) == 1
    if cuda.mem_efficient_sdp_enabled() and equal and known and whole and rows:
        return EFFICIENT
    return MATH
