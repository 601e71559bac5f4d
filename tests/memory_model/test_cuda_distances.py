"""What CUDA's distances hold inside: figures of torch 2.13.0+cu130's own allocator on the null GPU, 2026-11-30."""

import torch

from ds_cmli.memory_model import gpus
from ds_cmli.memory_model.cuda_operators import inside, returned
from ds_cmli.memory_model.inside import Inside

aten, A100 = torch.ops.aten, gpus.find("A100 80GB").limits


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def held(func, *args) -> Inside:
    return inside(func, args, None, A100, False)


def test_the_gradients_of_all_pairs():
    pairs = empty(19_900)
    assert held(aten._pdist_backward.default, pairs, empty(200, 512), 2.0, pairs) == Inside(after=((81_510_400,),))
    grad = empty(3, 40, 50)
    x, y = empty(3, 40, 16), empty(3, 50, 16)
    assert held(aten._cdist_backward.default, grad, x, y, 1.0, grad).after == ((384_000,),)
    assert held(aten._euclidean_dist.default, x, y).before[-1] == (8640, 10_800)


def test_unfolded_images():
    x, shape = empty(8, 32, 96, 96), ([3, 3], [1, 1], [1, 1], [1, 1])
    assert held(aten.im2col.default, x, *shape) == Inside(((9_437_184,),), ((9_437_184,),))
    columns = empty(8, 288, 9216)
    folded = aten.col2im.default, (columns, [96, 96], *shape)
    assert held(folded[0], *folded[1]) == Inside(after=((),))
    assert returned(*folded, x).untyped_storage().nbytes() == 84_934_656
