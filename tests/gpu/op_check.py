"""The all-pairs op on this device: how far from the fp64 reference, and how fast beside the materialised form.

Shape legend: I images, J texts, N patches, M text positions, D features.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ds_cmli.cmli.op import cmli_scores
from ds_cmli.cmli.reference import cmli_scores_reference
from profiling.speed.op import materialised_scores

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# I, J, N, M, D: the document's tile; odd sizes; sides above 256, whose argmax indices take 16 bits; a single pair.
SHAPES = [(6, 7, 196, 64, 256), (5, 9, 37, 21, 40), (3, 4, 260, 12, 64), (4, 3, 10, 270, 16), (1, 1, 1, 1, 8)]
MASKS = ("lengths", "holes")


def case(shape: tuple[int, ...], dtype: torch.dtype, masks: str, exact: bool, device: torch.device) -> tuple:
    """(image, text, token_mask, image_mask). `exact`: every product and sum is exact, so that ties are ties everywhere.

    With "holes" both sides are masked at random, with one image and one text that have nothing valid.
    """
    I, J, N, M, D = shape  # noqa: E741
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        # 1/16 of small numbers: sums of hundreds of products stay within every dtype's exact range.
        x = torch.randint(-2, 3, size, generator=g) / 4 if exact else torch.randn(size, generator=g) / D**0.5
        return x.to(dtype).to(device)

    image, text = draw(I, N, D), draw(J, M, D)
    if masks == "lengths":
        lengths = torch.randint(1, M + 1, (J,), generator=g)
        return image, text, (torch.arange(M) < lengths[:, None]).to(device), None
    token_mask, image_mask = torch.rand(J, M, generator=g) < 0.7, torch.rand(I, N, generator=g) < 0.7
    token_mask[0], image_mask[-1] = J == 1, I == 1
    return image, text, token_mask.to(device), image_mask.to(device)


def exactness(dtype_name: str, device: torch.device, backend: str) -> dict[str, float]:
    """Largest errors over all shapes and masks, against the fp64 reference on the same inputs.

    Returns:
        scores: absolute, of both directions, on random inputs. gradients: relative to the largest gradient, on inputs
        whose products are exact (elsewhere a rounding may choose another of two nearly equal maxima).
        unequal_repeats: cases whose second run differs in a single bit.
    """
    dtype = DTYPES[dtype_name]
    figures = {"scores": 0.0, "gradients": 0.0, "unequal_repeats": 0.0}
    for shape in SHAPES:
        for masks in MASKS:
            inputs = case(shape, dtype, masks, False, device)
            expected = cmli_scores_reference(*(x.double() for x in inputs[:2]), *inputs[2:])
            scores = cmli_scores(*inputs, backend=backend)
            figures["scores"] = max(figures["scores"], *map(_distance, scores, expected))
            inputs = case(shape, dtype, masks, True, device)
            ours, again = (_gradients(inputs, _backend(backend)) for _ in range(2))
            figures["unequal_repeats"] += not all(map(torch.equal, ours, again))
            wide = (inputs[0].double(), inputs[1].double(), *inputs[2:])
            for x, y in zip(ours, _gradients(wide, cmli_scores_reference), strict=True):
                error = _distance(x, y) / max(y.abs().max().item(), 1e-30)  # CPU-GPU sync
                figures["gradients"] = max(figures["gradients"], error)
    return figures


def _distance(x: Tensor, y: Tensor) -> float:
    """Infinite for NaN."""
    return (x.double() - y).abs().nan_to_num(nan=torch.inf).max().item()  # CPU-GPU sync


def _gradients(inputs: tuple, scores: Callable) -> tuple[Tensor, ...]:
    image, text = (x.clone().requires_grad_() for x in inputs[:2])
    g = torch.Generator().manual_seed(1)
    out = scores(image, text, *inputs[2:])
    weights = [torch.randn(s.shape, generator=g).to(s.device, s.dtype) for s in out]
    return torch.autograd.grad(out, (image, text), weights)


def speed(
    dtype_name: str,
    device: torch.device,
    backends: list[str],
    shape: tuple[int, ...] = (64, 128, 196, 64, 256),
    repeats: int = 10,
) -> dict[str, float]:
    """Milliseconds of forward and backward: each backend, and the materialised form by plain autograd. Medians."""
    image, text, _, _ = case(shape, DTYPES[dtype_name], "lengths", False, device)
    # All positions but [CLS] and [SEP]: no padding to skip.
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
    mask[:, 0] = mask[:, -1] = False
    contenders: dict[str, Callable] = {name: _backend(name) for name in backends}
    contenders["materialised"] = materialised_scores
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 2):  # two to warm up
        for name, scores in contenders.items():
            _finish(device)
            start = time.perf_counter()
            _gradients((image, text, mask), scores)
            _finish(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def _backend(name: str) -> Callable:
    return lambda *inputs: cmli_scores(*inputs, backend=name)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # CPU-GPU sync: the work is timed, not its launch
