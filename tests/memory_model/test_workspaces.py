"""Memory inside CUDA's operators: figures of torch 2.13.0+cu130's own allocator on the null GPU, 2026-11-27."""

import pytest
import torch

from ds_cmli.memory_model import gpus, workspaces
from ds_cmli.memory_model.workspaces import FORMULAS, Scratch, cuda_result

aten = torch.ops.aten
bf16 = torch.bfloat16
fp16 = torch.float16
fp32 = torch.float32
A100, RTX_3090, H100, T4 = (gpus.find(name) for name in ("A100 80GB", "RTX 3090", "H100 80GB", "T4"))
FLASH = aten._scaled_dot_product_flash_attention_backward.default
EFFICIENT = aten._scaled_dot_product_efficient_attention_backward.default


def empty(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(batch: int, number: int, rows: int, width: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    """[B, H, S, D], as a projection of [B, S, H * D] gives it."""
    return empty(batch, rows, number, width, dtype=dtype).transpose(1, 2)


def held(func, *args, gpu=A100) -> Scratch:
    return FORMULAS[func](gpu, *args)


X = heads(8, 6, 64, 64)
KEY = heads(8, 2, 64, 64)
OTHER_LAYOUT = empty(8, 6, 64, 64)
FITTING = (8, 12, 197, 64)
SHORTER = (8, 12, 50, 64)
MASK = empty(8, 1, 1, 197)


@pytest.mark.parametrize(
    "shape, dims, blocks",
    [
        ((4096, 1536), [0], (50_331_648, 48)),
        ((4096, 1536), [1], None),
        ((64, 37, 384), [0, 1], (7_274_496, 12)),
        ((1000, 1536), [0], ()),
    ],
)
def test_sums_over_rows_stage_their_partial_results(shape, dims, blocks):
    assert held(aten.sum.dim_IntList, empty(*shape), dims, True).after == (() if blocks is None else (blocks,))


@pytest.mark.parametrize(
    "args, copies, blocks",
    [
        ([heads(64, 6, 37, 64)] * 5, (), (196_608, 12_582_912)),
        ([heads(8, 6, 64, 160)] * 5, (), (24_576, 4_718_592)),
        ([X, X, KEY, KEY, X], (), (24_576, 1_572_864, 393_216, 393_216)),  # heads that share keys
        ([OTHER_LAYOUT, X, X, X, X], (393_216,), (393_216, 24_576, 1_572_864)),  # the gradient is copied
    ],
)
def test_flash_attention_s_backward(args, copies, blocks):
    assert held(FLASH, *args) == Scratch((copies,), (blocks,))


@pytest.mark.parametrize(
    "gpu, shape, dtype, blocks",
    [
        (A100, (64, 6, 64, 64), bf16, [(98_304, 6_297_600)]),
        (A100, (8, 12, 197, 64), fp16, [(75_648, 6_297_600)]),
        (RTX_3090, (8, 6, 64, 128), bf16, [(12_288, 4_720_128)]),
        (T4, (8, 6, 64, 128), fp16, [(12_288, 3_147_264)]),
        (A100, (8, 6, 64, 160), bf16, [(12_288, 11_012_352)]),
        (A100, (8, 6, 64, 96), fp32, [(1_179_648, 12_288, 12_288), (12_288, 3_147_264)]),
    ],
)
def test_memory_efficient_attention_s_backward(gpu, shape, dtype, blocks):
    x = heads(*shape, dtype=dtype)
    assert held(EFFICIENT, x, x, x, x, *[None] * 5, 0.0, gpu=gpu) == Scratch(((),), tuple(blocks))


@pytest.mark.parametrize(
    "gpu, dtype, query, key, options, kernel",
    [
        (A100, bf16, FITTING, FITTING, {}, "flash"),
        (A100, bf16, FITTING, FITTING, {"mask": MASK.expand(8, 1, 197, 197).mT}, "math"),
        (A100, fp32, FITTING, FITTING, {}, "efficient"),
        (A100, fp32, (8, 12, 197, 62), (8, 12, 197, 62), {}, "math"),
        (A100, fp16, (8, 12, 197, 12), (8, 12, 197, 12), {"mask": MASK}, "math"),
        (A100, fp16, (8, 12, 197, 264), (8, 12, 197, 264), {}, "efficient"),
        (A100, fp16, FITTING, SHORTER, {"causal": True}, "efficient"),
        (A100, fp16, FITTING, (8, 4, 197, 64), {}, "math"),
        (A100, fp16, FITTING, (8, 4, 197, 64), {"grouped": True}, "flash"),
        (A100, fp16, FITTING, FITTING, {"value": empty(8, 12, 197, 32, dtype=fp16)}, "efficient"),
        (RTX_3090, fp16, (8, 12, 197, 208), (8, 12, 197, 208), {}, "efficient"),
        (A100, fp32, FITTING, FITTING, {"value": empty(8 * 12 * 197 * 64 + 1, dtype=fp32)[1:].view(FITTING)}, "math"),
        (T4, fp16, FITTING, FITTING, {}, "efficient"),
        (T4, bf16, FITTING, FITTING, {}, "math"),
    ],
)
def test_which_attention_a_gpu_chooses(gpu, dtype, query, key, options, kernel):
    """The kernel is PyTorch's own choice on the null GPU, but for cuDNN's, which training turns off."""
    query, key, value = (empty(*shape, dtype=dtype).requires_grad_() for shape in (query, key, key))
    arguments = {"value": value, "mask": None, "dropout": 0.0, "causal": False, "grouped": False, **options}
    assert workspaces.attention_kernel(query, key, *arguments.values(), gpu) == kernel


def test_the_embedding_s_backward():
    arguments = empty(4096, 384), empty(4096, dtype=torch.int64), 1837, -1, False
    bytes_held = held(aten.embedding_dense_backward.default, *arguments)
    assert bytes_held.before == ((32_768, 32_768, 32_768, 72_191), (32_768, 32_768))
    assert bytes_held.after[-1] == (32_768, 32_768, 32_768, 8, 14_696, 14_696, 8, 17_968, 3_449_856)
    sorting = held(aten.embedding_dense_backward.default, *arguments, gpu=H100).before[0]
    assert sorting == (32_768, 32_768, 32_768, 71_167)
    # A block sorts 3,840 keys, so 7,681 take three.
    arguments = empty(7681, 384), empty(7681, dtype=torch.int64), 255, -1, False
    sorting = held(aten.embedding_dense_backward.default, *arguments).before[0]
    assert sorting[-1] == 256 * 8 + 3 * 1024 + 256 + 255


def test_many_short_rows_of_a_layer_norm():
    rows = empty(70_000, 1, dtype=fp32)
    weight = empty(768)
    sums = (2_096_640, 2_096_640)
    gradient_blocks = (*sums, 1536, 8_650_752, 24)
    for count, inside in ((70_000, (gradient_blocks, sums, gradient_blocks)), (65_536, ((),))):
        x = empty(count, 768)
        arguments = x, x, [768], rows, rows, weight, weight, [True] * 3
        assert held(aten.native_layer_norm_backward.default, *arguments).after == inside


def test_convolutions_copy_a_gradient_and_keep_channels_last():
    grad = empty(64, 36, 384, dtype=fp32).transpose(1, 2).unflatten(2, (6, 6))
    x = empty(64, 3, 84, 84, dtype=fp32)
    weight = empty(384, 3, 14, 14, dtype=fp32)
    shape = [384], [14, 14], [0, 0], [1, 1], False, [0, 0], 1, [False, True, True]
    bytes_held = held(aten.convolution_backward.default, grad, x, weight, *shape)
    assert bytes_held == Scratch(((3_538_944,), (3_538_944,)), ((3_538_944,),))
    x = torch.empty(2, 8, 4, 4)
    weight = torch.empty(8, 8, 3, 3)
    options = [None, [1, 1], [1, 1], [1, 1], False, [0, 0]]
    for layout in (torch.contiguous_format, torch.channels_last):
        args = x, weight.to(memory_format=layout), *options, 1
        assert cuda_result(aten.convolution.default, args, x.clone()).is_contiguous(memory_format=layout)
    apart = x, torch.empty(8, 1, 3, 3).to(memory_format=torch.channels_last), *options, 8  # a kernel of PyTorch's own
    assert cuda_result(aten.convolution.default, apart, x.clone()).is_contiguous()
