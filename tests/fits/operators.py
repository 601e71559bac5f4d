"""Prints as JSON the bytes that functions hold at most beside what was there: forward, and forward and backward.

Of tensors of [1024, 1024] fp32 (4 MiB), as they lie, by columns, or channels last.
"""

import json

import torch
import torch.nn.functional as F
from torch import nn

W = 1024
rows = torch.empty(8, W // 8, W, device="cuda", requires_grad=True)
columns = torch.empty(8, W, W // 8, device="cuda", requires_grad=True)
pictures = torch.empty(16, 64, 32, 32, device="cuda", requires_grad=True)
last = torch.empty(16, 32, 32, 64, device="cuda", requires_grad=True)
layers = nn.ModuleDict({"linear": nn.Linear(W, W), "layer norm": nn.LayerNorm(W), "RMS norm": nn.RMSNorm(W)})
layers["batch norm"] = nn.BatchNorm2d(64)
layers.cuda()
softmax, log_softmax = nn.Softmax(-1), nn.LogSoftmax(-1)
places = torch.arange(8, device="cuda")


def attention_of_groups(x: torch.Tensor) -> torch.Tensor:
    """16 heads that share the keys and values of 4, cast to bf16 for the operator."""
    query, key = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in (x, x[..., :256]))
    with torch.autocast("cuda", torch.bfloat16):
        return F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)


def attention_of_three_dimensions(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def attention_of_few_blocks(x: torch.Tensor) -> torch.Tensor:
    """8 blocks of 64 queries, which share the keys."""
    query = x[:1].to(torch.bfloat16).unflatten(-1, (4, 256)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, query, query)


functions = {
    "attention of three dimensions": (attention_of_three_dimensions, rows),
    "attention of few blocks": (attention_of_few_blocks, rows),
    "index_select": (lambda x: x.index_select(0, places), rows),
    "index": (lambda x: x[places], rows),
    "index by a mask": (lambda x: x[places > 3], rows),
    "sum of two linear": (lambda x: layers["linear"](x) + layers["linear"](x), rows),
    "attention of groups": (attention_of_groups, rows),
    "silu": (F.silu, rows),
    "mish": (F.mish, rows),
    "softmax": (softmax, rows),
    "softmax by columns": (lambda x: softmax(x.transpose(1, 2)), columns),
    "log softmax by columns": (lambda x: log_softmax(x.transpose(1, 2)), columns),
    "batch norm": (layers["batch norm"], pictures),
    "batch norm, channels last": (lambda x: layers["batch norm"](x.permute(0, 3, 1, 2)), last),
    "batch norm, then channels last": (
        lambda x: layers["batch norm"](x).to(memory_format=torch.channels_last),
        pictures,
    ),
}
other = torch.empty_like(rows)
for loss in (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits):
    functions[loss.__name__] = lambda x, loss=loss: loss(x, other), rows
functions["mse_loss of each"] = lambda x: F.mse_loss(x, other, reduction="none"), rows
for name in ("linear", "layer norm", "RMS norm"):
    functions[name] = layers[name], rows
    functions[f"{name} by columns"] = lambda x, layer=layers[name]: layer(x.transpose(1, 2)), columns


def most(function, x: torch.Tensor, backward: bool) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    y = function(x)
    if backward:
        y.backward(torch.empty_like(y))
    bytes_at_most = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    x.grad = None
    layers.zero_grad()
    return bytes_at_most


optimizer = torch.optim.SGD(layers.parameters(), 0.1)
layers["linear"](rows).sum().backward()  # cuBLAS takes what it keeps
print(json.dumps({name: [most(*call, backward) for backward in (False, True)] for name, call in functions.items()}))
for _ in range(2):
    layers["linear"](rows).sum().backward()
    optimizer.step()
