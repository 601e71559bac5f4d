"""Prints as JSON, for calls of attention, the bytes that are kept and held at most in forward, and in backward."""

import json

import torch
import torch.nn.functional as F

B, H = 2, 4
USUAL = {"width": 64, "value width": None, "rows": 256, "keys": 256, "key heads": H, "layout": "rows", "mask": None}
USUAL |= {"dropout": 0.0, "causal": False, "grouped": False, "dimensions": 4}
DIFFERENT = {
    "width": (1, 8, 12, 32, 40, 96, 100, 128, 160, 192, 256, 512),
    "value width": (32, 128),
    "rows": (64, 100, 1000),
    "keys": (192, 77),
    "key heads": (1,),
    "layout": ("by rows", "by columns"),
    "mask": ("bool", "padding", "full", "padded", "expanded", "learned"),
    "dropout": (0.1,),
    "causal": (True,),
    "grouped": (True,),
    "dimensions": (3, 2),
}
CASES = [{}, *({name: value} for name, values in DIFFERENT.items() for value in values)]
CASES += [
    {"mask": mask, **other}
    for mask in ("padding", "full")
    for other in (
        {"width": 40}, {"width": 160}, {"width": 12}, {"keys": 77}, {"value width": 128}, {"dropout": 0.1},
        {"key heads": 2, "grouped": True}, {"layout": "by columns"},
    )
]  # fmt: skip
CASES += [
    {"key heads": 2, "grouped": True},
    {"key heads": 1, "grouped": True},
    {"key heads": 2, "grouped": True, "width": 160},
    {"causal": True, "keys": 77},
    {"causal": True, "width": 512},
    {"dimensions": 3, "causal": True},
    {"dimensions": 3, "dropout": 0.1},
    {"layout": "by columns", "causal": True},
    *({"width": width, "value width": other} for width, other in ((160, 32), (32, 160), (512, 64), (64, 512))),
]


def made(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    if layout == "by rows":
        return torch.empty(shape[0], shape[2], shape[1], shape[3], device="cuda", dtype=dtype).transpose(1, 2)
    if layout == "by columns":
        return torch.empty(*shape[:-2], shape[-1], shape[-2], device="cuda", dtype=dtype).transpose(-1, -2)
    return torch.empty(shape, device="cuda", dtype=dtype)


def masked(kind: str | None, rows: int, keys: int, dtype: torch.dtype) -> torch.Tensor | None:
    if kind is None:
        return None
    if kind == "padded":
        return torch.empty(B, 1, rows, keys + 5, dtype=dtype, device="cuda")[..., :keys]
    if kind == "expanded":
        return torch.empty(B, 1, rows, 1, dtype=dtype, device="cuda").expand(B, 1, rows, keys)
    shape = {
        "bool": (rows, keys),
        "padding": (B, 1, 1, keys),
        "full": (B, 1, rows, keys),
        "learned": (1, H, rows, keys),
    }
    of_truth = kind in ("bool", "padding")
    mask = torch.empty(shape[kind], dtype=torch.bool if of_truth else dtype, device="cuda")
    return mask.requires_grad_(kind == "learned")


def live(kind: str) -> int:
    return torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]


def held(dtype: torch.dtype, different: dict) -> list[int]:
    of = {**USUAL, **different}
    width, rows, keys = of["width"], of["rows"], of["keys"]
    sizes = [(B, H, rows, width), (B, of["key heads"], keys, width)]
    sizes.append((*sizes[1][:3], of["value width"] or width))
    if of["dimensions"] < 4:
        sizes = [(B * H, *size[2:])[3 - of["dimensions"] :] for size in sizes]
    layouts = ("rows", of["layout"], of["layout"])
    inputs = [made(*item, dtype).requires_grad_() for item in zip(sizes, layouts, strict=True)]
    mask = masked(of["mask"], rows, keys, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = live("current")
    out = F.scaled_dot_product_attention(*inputs, mask, of["dropout"], of["causal"], enable_gqa=of["grouped"])
    forward = [live("current") - before, live("peak") - before]
    gradient = torch.empty_like(out)
    torch.cuda.reset_peak_memory_stats()
    out.backward(gradient)
    return [*forward, live("peak") - before]


weight = torch.nn.Parameter(torch.empty(64, 64, device="cuda"))
optimizer = torch.optim.SGD([weight], 0.1)
(weight @ weight).sum().backward()  # cuBLAS takes what it keeps
found = {}
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for case in CASES:
        held(dtype, case)  # the first call may load what is kept
        found[f"{dtype} {case}"] = held(dtype, case)
print(json.dumps(found))
for _ in range(2):
    (weight @ weight).sum().backward()
    optimizer.step()
