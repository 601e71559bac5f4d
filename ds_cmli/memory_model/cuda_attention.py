"""What CUDA's attention holds inside, by the kernel that `attention_choice.py` finds."""

import math

from torch import Tensor

from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import HALF, Inside, Stage, ceil_to, contiguous_copies


def _copies(*gradients: Tensor) -> Stage:
    """Copies of [B, H, S, D] tensors whose [B, S, H, D] is not contiguous."""
    return contiguous_copies(*(x.transpose(1, 2) for x in gradients))


def _rounded(width: int) -> int:
    """The features of flash attention's accumulators."""
    return ceil_to(width, 32 if width <= 128 else 64)


def flash_forward(args: tuple, limits: Limits) -> Inside:
    """Source: transformers/cuda/flash_attn/flash_api.cpp (`set_params_splitkv`): where blocks of 64
    queries are few, each works on a part of the keys, whose sums and maxima are in fp32."""
    query, key = args[:2]
    if len(args) > 3 and args[3] > 0:
        return Inside(after=((16,),))  # the state of the random numbers; no parts
    batch, heads, rows, width = query.shape
    block = 64  # keys
    if width <= 64:
        block = 256
    elif width <= 128:
        block = 128
    keys = math.ceil(key.shape[2] / block)
    blocks, places = batch * heads * math.ceil(rows / 64), 2 * limits.multiprocessors
    parts = 1 if blocks >= 0.8 * places else _parts(blocks, places, keys)
    if parts == 1:
        return Inside()
    sums = parts * batch * heads * rows * 4
    return Inside(after=((sums, sums * _rounded(width)),))


def _parts(blocks: int, places: int, keys: int) -> int:
    """The fewest parts of `keys` blocks of keys that fill the places nearly as well as possible.

    Source: `num_splits_heuristic` of the same file.
    """
    filled = {}
    for parts in range(1, min(128, places, keys) + 1):
        if parts == 1 or math.ceil(keys / parts) != math.ceil(keys / (parts - 1)):
            waves = blocks * parts / places
            filled[parts] = waves / math.ceil(waves)
    return next(parts for parts in filled if filled[parts] >= 0.85 * max(filled.values()))


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, out: Tensor, limits: Limits, deterministic: bool
) -> Inside:
    """Source: transformers/cuda/flash_attn/flash_api.cpp (`mha_bwd`): the row sums of the gradient
    times the output, and the query's gradient in fp32, rounded up to tiles of 128 rows and of 32
    features, or of 64 above 128; if deterministic, one such gradient for each block that works on a
    head. Where heads share keys and values, each has gradients of its own, which are summed."""
    batch, heads, rows, width = query.shape
    sums = batch * heads * ceil_to(rows, 128) * 4
    splits = math.ceil(limits.multiprocessors / (batch * heads)) if deterministic else 1
    copies = _copies(grad, out)
    of_heads: Stage = ()
    if key.shape[1] != heads:
        of_heads = (batch * heads * key.shape[2] * width * key.dtype.itemsize,) * 2
    return Inside((copies,), ((*copies, sums, splits * sums * _rounded(width), *of_heads),))


class _Kernel:
    """The memory-efficient backward kernel that is the first to fit.

    Source: mem_eff_attention/kernels/cutlassB.h (`dispatch_cutlassB`): the order of the kernels,
    and kernel_backward.h: whether a block keeps the gradients of keys and values in registers.
    Which ones fit into the shared memory of a block was seen on the null GPU: all but those of 128
    x 128, and of 128 x 64 in fp32, fit into 64 KB.
    """

    def __init__(self, width: int, half: bool, dropout: bool, limits: Limits):
        large = limits.shared > 100 * 1024
        self.queries = self.keys = 64
        kept = 64  # the most features whose gradients stay in registers
        if width > 64 and half:
            narrow = limits.capability in ((8, 6), (8, 9)) and width <= 96 and not dropout
            if narrow or width > 128 or limits.capability < (8, 0):
                self.queries = kept = 128
            elif large:
                self.queries = self.keys = kept = 128
        elif width > 64 and large and limits.capability >= (8, 0):
            self.queries = 128
        self.staged = half and width > kept


def efficient_forward(args: tuple, limits: Limits) -> Inside:
    """Source: transformers/cuda/attention.cu (`_efficient_attention_forward`) and
    mem_eff_attention/kernel_forward.h: the output in fp32, where it does not fit into registers."""
    query, width = args[0], args[2].shape[-1]
    if query.dtype not in HALF or max(width, query.shape[-1]) <= 128:
        return Inside()
    return Inside(after=((math.prod(query.shape[:-1]) * width * 4,),))


def efficient_backward(args: tuple, limits: Limits, deterministic: bool) -> Inside:
    """Source: transformers/cuda/attention_backward.cu (`_efficient_attention_backward`) and
    mem_eff_attention/kernel_backward.h (`workspace_size`): the row sums of the gradient times the
    output, which fp32 computes by PyTorch's own operators, and partial gradients in fp32: of the
    queries always, of keys and values where they do not fit into registers.

    Args:
        args: those of `aten._scaled_dot_product_efficient_attention_backward`.
    """
    grad, query, key, value = args[:4]
    batch, heads, rows, width = query.shape
    keys, together, of_values = key.shape[2], batch * heads, value.shape[-1]
    half = query.dtype in HALF
    kernel = _Kernel(max(width, of_values), half, bool(args[9]), limits)
    splits = math.ceil(keys / kernel.keys)
    if together >= 256 and keys <= 2 * kernel.keys:
        splits = 1
    if kernel.staged:
        splits = max(1, min(splits, 200 // together))
    if deterministic:
        splits = 1
    tiles = math.ceil(rows / kernel.queries) * math.ceil(width / kernel.keys)
    elements = tiles * (4 + kernel.queries * kernel.keys)  # a lock and a counter, padded, each
    if kernel.staged:
        features = ceil_to(width, kernel.queries) + ceil_to(of_values, kernel.queries)
        elements += splits * kernel.keys * features
    sums, workspace = together * rows * 4, together * ceil_to(elements, 4) * 4
    copies = _copies(grad)
    held = (*copies, sums, workspace)
    if half:
        return Inside((copies,), (held,))
    product = grad.numel() * 4
    return Inside((copies,), ((*copies, product, sums, sums), held))


def safe_softmax(args: tuple, limits: Limits) -> Inside:
    """Source: aten/src/ATen/native/transformers/attention.cpp (`_safe_softmax`): which scores are
    -inf, whether those of a row all are, and a number."""
    scores = args[0]
    rows = scores.numel() // max(scores.shape[-1], 1)
    return Inside(after=((scores.numel(), rows, scores.dtype.itemsize),))
