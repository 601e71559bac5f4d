"""FLOPs into which PyTorch's counter does not see, and those that the GPU reaches."""

import math

import torch

from ds_cmli.config.registry import compares_tokens
from ds_cmli.data.pairs import Batch
from ds_cmli.distributed.process_group import world_size
from ds_cmli.engine import TrainEngine


def all_pairs_flops(engine: TrainEngine, batch: Batch) -> int:
    """Return the FLOPs of the all-pairs kernels; 0 if PyTorch counts them.

    They are those of the similarities, and as many again for the gradient of each side.
    """
    objective = engine.objective
    seen = objective.config.cmli_backend == "torch" and not engine.caching
    if seen or not compares_tokens(objective.config.weights):
        return 0
    B, M = batch.input_ids.shape
    N = math.prod(objective.student.grid)
    D = objective.student.embed_dim
    G = B * world_size() * (engine.accumulation if engine.caching else 1)
    return 3 * 2 * B * G * N * M * D


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on this GPU, measured for half a second."""
    from torch.utils.benchmark import Timer

    x = torch.ones(4096, 4096, device=device, dtype=dtype)
    product = Timer("linear(x, x)", globals={"linear": torch.nn.functional.linear, "x": x})
    seconds = product.blocked_autorange(min_run_time=0.5).median
    del x, product
    torch.cuda.empty_cache()  # the memory of the product is no part of a step
    return 2 * 4096**3 / seconds
