"""What CUDA's operators hold inside: figures of torch 2.13.0+cu130's own allocator on the null GPU, 2026-11-27.

`tests/null_gpu/test_operators.py` compares many more with the allocator itself.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_cmli.memory_model import attention_choice, gpus
from ds_cmli.memory_model.cuda_operators import inside
from ds_cmli.memory_model.inside import Inside

aten, bf16, fp16, fp32 = torch.ops.aten, torch.bfloat16, torch.float16, torch.float32
A100, RTX_3090, H100, T4 = (gpus.find(name).limits for name in ("A100 80GB", "RTX 3090", "H100 80GB", "T4"))


def empty(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def held(func, *args, gpu=A100, deterministic=False, **keywords) -> Inside:
    return inside(func, args, keywords, gpu, deterministic)


@pytest.mark.parametrize(
    "func, shape, arguments, blocks",
    [
        (aten.sum.dim_IntList, (4096, 1536), [[0], True], (50_331_648, 48)),
        (aten.sum.dim_IntList, (2368, 1152), [[0], True], (21_823_488, 36)),
        (aten.sum.dim_IntList, (4096, 1536), [[1], True], ()),
        (aten.sum.dim_IntList, (64, 37, 384), [[0, 1], True], (7_274_496, 12)),
        (aten.sum.default, (4096, 1536), [], (1728, 4)),
        (aten.sum.default, (), [], ()),
        (aten.amax.default, (4096, 1536), [[0]], (25_165_824, 48)),
        (aten.argmax.default, (4096, 1536), [0], (201_326_592, 48)),
        (aten.var.correction, (4096, 1536), [[0]], (201_326_592, 48)),
        (aten.linalg_vector_norm.default, (4096, 1536), [2.0], (1728, 4)),
    ],
)
def test_reductions_stage_their_partial_results(func, shape, arguments, blocks):
    assert held(func, empty(*shape), *arguments).after == (blocks,)


def test_how_many_blocks_share_a_reduction_depends_on_the_gpu():
    bytes_held = [held(aten.sum.default, empty(4096, 1536), gpu=gpu).after for gpu in (RTX_3090, A100, H100)]
    assert bytes_held == [((984, 4),), ((1728, 4),), ((2112, 4),)]


def test_what_is_counted_is_copied_into_integers_first():
    assert held(aten.sum.default, empty(1000, 1000, dtype=torch.bool)).after == ((8_000_000, 984, 4),)


def heads(batch: int, number: int, rows: int, width: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    """[B, H, S, D], as a projection of [B, S, H * D] gives it."""
    return empty(batch, rows, number, width, dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize(
    "shape, blocks",
    [
        ((64, 6, 37, 64), (196_608, 12_582_912)),
        ((8, 12, 197, 64), (98_304, 6_291_456)),
        ((8, 6, 64, 160), (24_576, 4_718_592)),
    ],
)
def test_flash_attention_s_backward(shape, blocks):
    x = heads(*shape)
    bytes_held = held(aten._scaled_dot_product_flash_attention_backward.default, x, x, x, x, x)
    assert bytes_held == Inside(((),), (blocks,))


def test_heads_that_share_keys_have_gradients_of_their_own():
    x, key = heads(8, 6, 64, 64), heads(8, 2, 64, 64)
    bytes_held = held(aten._scaled_dot_product_flash_attention_backward.default, x, x, key, key, x)
    assert bytes_held == Inside(((),), ((24_576, 1_572_864, 393_216, 393_216),))


def test_a_gradient_of_another_layout_is_copied():
    x, grad = heads(8, 6, 64, 64), empty(8, 6, 64, 64)
    bytes_held = held(aten._scaled_dot_product_flash_attention_backward.default, grad, x, x, x, x)
    assert bytes_held == Inside(((393_216,),), ((393_216, 24_576, 1_572_864),))


@pytest.mark.parametrize(
    "gpu, shape, dtype, blocks",
    [
        (A100, (64, 6, 64, 64), bf16, [(98_304, 6_297_600)]),
        (A100, (8, 12, 197, 64), fp16, [(75_648, 6_297_600)]),
        (A100, (8, 6, 64, 128), bf16, [(12_288, 3_146_496)]),
        (RTX_3090, (8, 6, 64, 128), bf16, [(12_288, 4_720_128)]),
        (RTX_3090, (8, 6, 64, 96), bf16, [(12_288, 3_147_264)]),
        (RTX_3090, (1, 6, 256, 128), bf16, [(6_144, 2_360_064)]),
        (T4, (8, 6, 64, 128), fp16, [(12_288, 3_147_264)]),
        (A100, (8, 6, 64, 160), bf16, [(12_288, 11_012_352)]),
        (A100, (8, 6, 64, 96), fp32, [(1_179_648, 12_288, 12_288), (12_288, 3_147_264)]),
        (RTX_3090, (8, 6, 64, 96), fp32, [(1_179_648, 12_288, 12_288), (12_288, 1_574_400)]),
    ],
)
def test_memory_efficient_attention_s_backward(gpu, shape, dtype, blocks):
    x = heads(*shape, dtype=dtype)
    bytes_held = held(
        aten._scaled_dot_product_efficient_attention_backward.default, x, x, x, x, *[None] * 5, 0.0, gpu=gpu
    )
    assert bytes_held == Inside(((),), tuple(blocks))


@pytest.fixture(autouse=True)
def cudnn_attention():
    """As a process begins; a training turns it off for the rest of its process."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


FITTING, OTHERS = (8, 12, 197, 64), (8, 12, 50, 64)
MASK = empty(8, 1, 1, 197)


@pytest.mark.parametrize(
    "gpu, dtype, query, key, other, kernel",
    [
        (A100, bf16, FITTING, FITTING, {}, "flash"),
        (A100, bf16, FITTING, FITTING, {"mask": MASK}, "efficient"),
        (A100, bf16, FITTING, FITTING, {"mask": MASK.expand(8, 1, 197, 197).mT}, "math"),
        (A100, fp32, FITTING, FITTING, {}, "efficient"),
        (A100, fp32, (8, 12, 197, 62), (8, 12, 197, 62), {}, "math"),
        (A100, fp16, (8, 12, 197, 12), (8, 12, 197, 12), {"mask": MASK}, "math"),
        (A100, fp16, (8, 12, 197, 264), (8, 12, 197, 264), {}, "efficient"),
        (A100, fp16, (96, 197, 64), (96, 197, 64), {}, "math"),
        (A100, fp16, FITTING, (1, 12, 197, 64), {}, "math"),
        (A100, fp16, FITTING, OTHERS, {}, "flash"),
        (A100, fp16, FITTING, OTHERS, {"causal": True}, "efficient"),
        (A100, fp16, FITTING, (8, 4, 197, 64), {}, "math"),
        (A100, fp16, FITTING, (8, 4, 197, 64), {"grouped": True}, "flash"),
        (A100, fp32, FITTING, (8, 4, 197, 64), {"grouped": True}, "math"),
        (A100, fp16, FITTING, FITTING, {"value": empty(8, 12, 197, 32, dtype=fp16)}, "efficient"),
        (A100, fp16, FITTING, FITTING, {"value": empty(8, 12, 64, 197, dtype=fp16).mT}, "math"),
        (A100, fp16, FITTING, FITTING, {"value": empty(8, 12, 197, 64, dtype=fp32)}, "math"),
        (H100, fp16, FITTING, FITTING, {}, "cuDNN"),
        (H100, fp16, FITTING, FITTING, {"dropout": 0.1}, "flash"),
        (RTX_3090, fp16, (8, 12, 197, 208), (8, 12, 197, 208), {}, "efficient"),
        (T4, fp16, FITTING, FITTING, {}, "efficient"),
        (T4, bf16, FITTING, FITTING, {}, "math"),
        (T4, bf16, FITTING, FITTING, {"mask": MASK}, "math"),
        (T4, fp32, FITTING, FITTING, {"mask": MASK}, "efficient"),
    ],
)
def test_which_attention_a_gpu_chooses(gpu, dtype, query, key, other, kernel):
    """`python -m tests.null_gpu.compare_attention` compares some ten thousand calls with PyTorch's own choice."""
    inputs = [empty(*shape, dtype=dtype).requires_grad_() for shape in (query, key, key)]
    other = {"value": inputs[2], **other}
    call = attention_choice.Attention(*inputs[:2], **other)
    assert attention_choice.chosen(call, gpu) == kernel


def test_a_program_s_switches_choose_its_attention():
    call = attention_choice.Attention(*[empty(*FITTING)] * 3)
    with sdpa_kernel([SDPBackend.MATH]):
        assert attention_choice.chosen(call, A100) == "math"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        assert attention_choice.chosen(call, H100) == "efficient"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), pytest.raises(RuntimeError, match="No available kernel"):
        attention_choice.chosen(call, T4)


def test_what_attention_s_forward_holds():
    """Blocks of 64 queries that fill no GPU share the keys: 2 parts of 8 heads of 256 rows, 128 features each."""
    few = empty(2, 4, 256, 128)
    assert held(aten._scaled_dot_product_flash_attention.default, few, few, few) == Inside(
        after=((2 * 2048 * 4, 2 * 2048 * 128 * 4),)
    )
    many = empty(64, 16, 256, 128)
    assert held(aten._scaled_dot_product_flash_attention.default, many, many, many) == Inside()
    wide = empty(2, 4, 256, 160)
    efficient = aten._scaled_dot_product_efficient_attention.default
    assert held(efficient, wide, wide, wide) == Inside(after=((2048 * 160 * 4,),))
    assert held(efficient, few, few, few) == Inside()
    scores = empty(8, 256, 256, dtype=fp32)
    assert held(aten._safe_softmax.default, scores, -1) == Inside(after=((8 * 256 * 256, 8 * 256, 4),))


def test_the_embedding_s_backward():
    indices, grad = torch.empty(4096, dtype=torch.int64, device="meta"), empty(4096, 384)
    arguments = grad, indices, 1837, -1, False
    bytes_held = held(aten.embedding_dense_backward.default, *arguments)
    assert bytes_held.before == ((32_768, 32_768, 32_768, 72_191), (32_768, 32_768))
    assert bytes_held.after[-1] == (32_768, 32_768, 32_768, 8, 14_696, 14_696, 8, 17_968, 3_449_856)
    sorting = held(aten.embedding_dense_backward.default, *arguments, gpu=H100).before[0]
    assert sorting == (32_768, 32_768, 32_768, 71_167)


def test_a_small_table_s_gradient_is_added_up_in_fp32():
    indices, grad = torch.empty(4096, dtype=torch.int64, device="meta"), empty(4096, 384)
    bytes_held = held(aten.embedding_dense_backward.default, grad, indices, 2, -1, False)
    assert bytes_held.after[-1][-3:] == (3_288, 3_288, 3_072)


def test_many_short_rows_of_a_layer_norm():
    x, rows = empty(70_000, 768), empty(70_000, 1, dtype=fp32)
    weight = empty(768)
    arguments = x, x, [768], rows, rows, weight, weight, [True] * 3
    sums = 2_096_640, 2_096_640
    expected = (*sums, 1536, 8_650_752, 24)
    assert held(aten.native_layer_norm_backward.default, *arguments).after == (expected, sums, expected)
    x = empty(65_536, 768)
    arguments = x, x, [768], rows, rows, weight, weight, [True] * 3
    assert held(aten.native_layer_norm_backward.default, *arguments) == Inside(((),), ((),))


def test_a_convolution_s_gradients():
    grad = empty(64, 36, 384, dtype=fp32).transpose(1, 2).unflatten(2, (6, 6))
    x, weight = empty(64, 3, 84, 84, dtype=fp32), empty(384, 3, 14, 14, dtype=fp32)
    shape = [384], [14, 14], [0, 0], [1, 1], False, [0, 0], 1, [False, True, True]
    bytes_held = held(aten.convolution_backward.default, grad, x, weight, *shape)
    assert bytes_held == Inside(((3_538_944,), (3_538_944,)), ((3_538_944,), (7_077_888, 12)))


def test_accumulated_places_are_sorted():
    x, values = empty(64, 64, dtype=fp32), empty(64, dtype=fp32).expand(64)
    indices = [torch.empty(64, dtype=torch.int64, device="meta")] * 2
    bytes_held = held(aten.index_put.default, x, indices, values, True)
    assert bytes_held.after[-1] == (512, 512, 512, 512, 1)
    assert held(aten.index_put.default, x, indices, values) == Inside()


def test_what_has_no_blocks_of_its_own():
    assert held(aten.add.Tensor, empty(4), empty(4)) == Inside()
