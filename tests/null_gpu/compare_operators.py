"""python -m tests.null_gpu.compare_operators: what operators hold on a null GPU, by formula and by the allocator.

Prints one line for each operator whose highest sum of blocks differs by more than a prefix sum's few KB, and the
number of those that were compared.
"""

import itertools
import sys
from collections.abc import Iterator

import torch
from torch.utils._pytree import tree_leaves

from ds_cmli.memory_model.cuda_operators import inside
from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import Inside

aten = torch.ops.aten
CLOSE = 10_240  # bytes: what the formulas leave out
Call = tuple[object, tuple]


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def calls(limits: Limits) -> Iterator[Call]:
    yield from reductions()
    yield from attention(limits)
    yield from lookups()
    yield from layers()
    yield from distances()


def reductions() -> Iterator[Call]:
    kinds = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.var.correction)
    shapes = ((4096, 1536), (64, 37, 384), (5000, 7), (2, 20_000), (3, 100, 1000, 8))
    for dtype, shape in itertools.product((torch.float16, torch.bfloat16, torch.float32), shapes):
        x = empty(*shape, dtype=dtype)
        for tensor in (x, x.transpose(0, -1), x[..., 1:]):
            for dims in ([0], [tensor.dim() - 1], list(range(tensor.dim() - 1))):
                yield from ((kind, (tensor, dims)) for kind in kinds)
                yield aten.linalg_vector_norm.default, (tensor, 2.0, dims)
            yield aten.sum.default, (tensor,)
            yield aten.argmax.default, (tensor, 0)
    yield aten.sum.default, (empty(1000, 1000, dtype=torch.bool),)
    for dim in (0, 1):
        yield aten.logsumexp.default, (empty(256, 4096, dtype=torch.float32), [dim])


def attention(limits: Limits) -> Iterator[Call]:
    sizes = ((8, 12, 197, 64), (64, 6, 64, 32), (8, 6, 64, 96), (8, 6, 64, 128), (8, 6, 64, 160), (1, 6, 250, 128))
    for dtype, (batch, heads, rows, width) in itertools.product((torch.float16, torch.float32), sizes):
        q = empty(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
        for grad in (q, empty(batch, heads, rows, width, dtype=dtype)):
            if dtype == torch.float16 and limits.capability >= (8, 0):
                out = aten._scaled_dot_product_flash_attention(q, q, q)
                saved = (*out[:6], 0.0, False, *out[6:8])
                yield aten._scaled_dot_product_flash_attention_backward.default, (grad, q, q, q, *saved)
            mask = empty(batch, 1, 1, (rows + 7) // 8 * 8, dtype=dtype)[..., :rows].expand(batch, heads, rows, rows)
            out = aten._scaled_dot_product_efficient_attention(q, q, q, mask, True)
            saved = (*out, 0.0, [True, True, True, False])
            yield aten._scaled_dot_product_efficient_attention_backward.default, (grad, q, q, q, mask, *saved)


def lookups() -> Iterator[Call]:
    for count, rows in itertools.product((64, 4096, 16_384), (2, 512, 1837, 30_522)):
        indices = torch.zeros(count, device="cuda", dtype=torch.int64)
        yield aten.embedding_dense_backward.default, (empty(count, 384), indices, rows, -1, False)
        yield aten.index_put.default, (empty(count), [indices], empty(count), True)
    yield aten.embedding.default, (empty(2, 384), indices[:64].expand(64, 64))


def layers() -> Iterator[Call]:
    for rows, width in itertools.product((65_536, 70_000), (384, 1728)):
        x, weight = empty(rows, width), empty(width)
        _, mean, deviation = aten.native_layer_norm(x, [width], weight, weight, 1e-5)
        arguments = (x, x, [width], mean, deviation, weight, weight, [True] * 3)
        yield aten.native_layer_norm_backward.default, arguments
    for tensor, grad in itertools.product((empty(64, 100, 384), empty(64, 384, 100).transpose(1, 2)), repeat=2):
        weight = empty(384)
        norm = tensor, [384], weight, weight, 1e-5
        yield aten.native_layer_norm.default, norm
        _, mean, deviation = aten.native_layer_norm(*norm)
        arguments = (grad, tensor, [384], mean, deviation, weight, weight, [True] * 3)
        yield aten.native_layer_norm_backward.default, arguments
        yield from ((kind, (tensor, -1, False)) for kind in (aten._softmax.default, aten._log_softmax.default))
        for kind in (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default):
            yield kind, (grad, tensor, -1, tensor.dtype)
    x, weight = empty(8, 64, 56, 56), empty(64, 64, 3, 3)
    last = x.to(memory_format=torch.channels_last)
    shape = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    for tensor, grad in itertools.product((x, last), (x, last)):
        yield aten.convolution.default, (tensor, weight, None, *shape)
        yield aten.convolution_backward.default, (grad, tensor, weight, [64], *shape, [True] * 3)


def distances() -> Iterator[Call]:
    for n, m, d in ((2, 3, 8), (40, 50, 16), (300, 20, 128), (1, 700, 64)):
        x, y = empty(n, d, dtype=torch.float32), empty(m, d, dtype=torch.float32)
        both = x.expand(3, n, d).contiguous(), y.expand(3, m, d).contiguous()
        for left, right in ((x, y), both):
            yield aten._euclidean_dist.default, (left, right)
            of_pairs = empty(*left.shape[:-1], m, dtype=torch.float32)
            yield aten._cdist_backward.default, (of_pairs, left, right, 1.0, of_pairs)
        pairs = empty(n * (n - 1) // 2, dtype=torch.float32)
        yield aten._pdist_backward.default, (pairs, x, 2.0, pairs)
    image = empty(4, 32, 48, 40)
    for kernel, padding, stride in (([3, 3], [1, 1], [1, 1]), ([4, 4], [0, 0], [4, 4]), ([1, 1], [0, 0], [2, 2])):
        shape = kernel, [1, 1], padding, stride
        for x in (image, image.transpose(2, 3), image[0]):
            yield aten.im2col.default, (x, *shape)
            columns = aten.im2col(x, *shape)
            for spread in (columns, columns.mT.contiguous().mT):
                yield aten.col2im.default, (spread, list(x.shape[-2:]), *shape)


def recorded(call: Call) -> tuple[int, list[int]]:
    """The most bytes that the call allocates, and the sizes of its results."""
    function, arguments = call
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = [x for x in tree_leaves(function(*arguments)) if isinstance(x, torch.Tensor)]
    most = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    return most, [x.untyped_storage().nbytes() for x in results]


def highest(result: Inside, results: list[int]) -> int:
    """The most bytes of a call; the last stage before its results is still there when they come."""
    last = sum(result.before[-1]) if result.before else 0
    moments = [*map(sum, result.before), last + sum(results)]
    return max(moments + [sum(stage) + sum(results) for stage in result.after])


def main() -> int:
    limits = Limits.of(torch.device("cuda", 0))
    wrong = number = 0
    for function, arguments in calls(limits):
        recorded((function, arguments))  # the first call may load what is kept
        most, results = recorded((function, arguments))
        result = highest(inside(function, arguments, None, limits, False), results)
        number += 1
        if abs(result - most) > CLOSE:
            wrong += 1
            shapes = [tuple(x.shape) for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
            print(f"{function} {shapes}: {result:,} by formula, {most:,} by the allocator")
    print(f"{torch.cuda.get_device_name()}: {number} compared, {wrong} differ")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
