"""Results of operators that know no sizes without data, or that a CPU does not have."""

import torch
from torch import Tensor

# How many results they have, of one number for each channel.
OF_CHANNELS = {
    "aten::batch_norm_stats": 2,
    "aten::batch_norm_gather_stats_with_counts": 2,
    "aten::batch_norm_backward_reduce": 4,
}


def largest_results(operator: str, first: Tensor, *rest: object, **options: object) -> object:
    """The results of an operator for the data that make them largest; None if that is not known."""

    def places(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=first.device)

    most = first.numel()
    if operator == "aten::bincount":
        least = rest[1] if len(rest) > 1 else options.get("minlength", 0)
        return places(least or most)  # type: ignore[arg-type]
    if operator == "torchvision::nms":
        return places(len(first))
    if operator == "aten::masked_select" and isinstance(rest[0], Tensor):
        return first.new_zeros(torch.broadcast_shapes(first.shape, rest[0].shape)).flatten()
    if operator in ("aten::_unique2", "aten::unique_consecutive"):
        return first.new_zeros(most), places(*first.shape), places(most)
    if operator in ("aten::unique_dim", "aten::unique_dim_consecutive"):
        rows = first.shape[rest[0]]  # type: ignore[call-overload]
        return torch.zeros_like(first), places(rows), places(rows)
    return None


def unknown_results(operator: str, *args: Tensor) -> tuple[Tensor | None, ...] | Tensor | None:
    """The results of kernels that a CPU does not have, of recurrent cells and of normalisation over
    several ranks; None for others."""
    first = args[0]
    if operator == "aten::_thnn_fused_gru_cell":
        workspace = first.new_empty(len(first), 5 * args[2].shape[1])  # which a GPU allocates first
        return torch.empty_like(args[2]), workspace
    if operator == "aten::_thnn_fused_gru_cell_backward":
        gates = [first.new_empty(len(first), 3 * first.shape[1]) for _ in range(2)]
        biases = [first.new_empty(3 * first.shape[1]) if args[2] else None for _ in range(2)]
        return *gates, torch.empty_like(first), *biases
    if operator in ("aten::batch_norm_elemt", "aten::batch_norm_backward_elemt"):
        return torch.empty_like(first)
    if operator in OF_CHANNELS:
        moments = torch.promote_types(first.dtype, torch.float32)
        return tuple(
            first.new_empty(first.shape[1], dtype=moments) for _ in range(OF_CHANNELS[operator])
        )
    return None


def grouped_product(a: Tensor, b: Tensor, *rest: Tensor, **options: Tensor | None) -> Tensor:
    """A GPU takes other types than bf16 too, of which the operator without data knows nothing."""
    bf16 = [like(x, torch.device("meta")).to(torch.bfloat16) for x in (a, b)]
    offsets = {name: None if x is None else x.to("meta") for name, x in options.items()}
    out = torch.ops.aten._grouped_mm.default(*bf16, *(x.to("meta") for x in rest), **offsets)
    return a.new_empty_strided(out.shape, out.stride())


def like(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
