"""python -m tests.null_gpu.compare_attention [COUNT]: attention's kernel by our rules and by PyTorch.

Asks `torch._fused_sdp_choice` on a null GPU for calls that differ from a usual one in one or two respects, and for
COUNT random ones; prints one line for each that differs, and how many there were of each kernel.
"""

import itertools
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_cmli.memory_model.attention_choice import CUDNN, EFFICIENT, FLASH, MATH, Attention, chosen
from ds_cmli.memory_model.gpus import Limits

NAMES = {0: MATH, 1: FLASH, 2: EFFICIENT, 3: CUDNN}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a call can be like; the first of each is the usual one.
RESPECTS: dict[str, tuple[object, ...]] = {
    "width": (64, 1, 2, 4, 8, 12, 40, 65, 80, 96, 128, 136, 160, 192, 200, 224, 232, 256, 264, 512),
    "value width": (None, 1, 4, 8, 32, 100, 128, 192),
    "key width": (None, 8),
    "rows": (64, 0, 1, 7, 128),
    "keys": (None, 0, 1, 7, 128),
    "batch": (2, 1),
    "key batch": (None, 1),
    "heads": (4, 1, 8),
    "key heads": (None, 1, 2, 3),
    "value heads": (None, 1),
    "dimensions": (4, 3, 2, 5),
    "layout": ("contiguous", "by rows", "packed", "by columns", "every second", "shifted"),
    "one layout": (False, True),
    "mask": (None, "2", "4", "rows", "bool", "heads", "3", "learned", "expanded", "by columns", "padded"),
    "dropout": (0.0, 0.1, 0.125, 0.5),
    "causal": (False, True),
    "grouped": (False, True),
    "trained": (True, False, "without grad"),
    "kernels": (None, "flash", "efficient", "math", "cuDNN", "no flash", "no math", "efficient first"),
    "deterministic": (False, True, "warn only"),
    "value dtype": (None, torch.float32, torch.float16),
}  # fmt: skip


def laid_out(shape: tuple[int, ...], layout: object, dtype: torch.dtype) -> Tensor:
    """A tensor [B, H, S, D], or with fewer or more dimensions."""
    last = shape[-1]
    if layout == "by rows" and len(shape) == 4:
        return torch.empty(shape[0], shape[2], shape[1], last, dtype=dtype, device="cuda").transpose(1, 2)
    if layout == "packed" and len(shape) == 4:
        packed = torch.empty(shape[0], shape[2], 3, shape[1], last, dtype=dtype, device="cuda")
        return packed[:, :, 1].transpose(1, 2)
    if layout == "by columns":
        return torch.empty(*shape[:-2], last, shape[-2], dtype=dtype, device="cuda").transpose(-1, -2)
    if layout == "every second":
        return torch.empty(*shape[:-1], 2 * last, dtype=dtype, device="cuda")[..., ::2]
    if layout == "shifted":
        return torch.empty(*shape[:-1], last + 1, dtype=dtype, device="cuda")[..., 1:]
    return torch.empty(shape, dtype=dtype, device="cuda")


def masked(kind: object, batch: int, heads: int, rows: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    shapes = {"2": (rows, keys), "4": (batch, heads, rows, keys), "rows": (rows, 1), "bool": (batch, 1, 1, keys)}
    shapes |= {"heads": (1, heads, 1, keys), "3": (batch, rows, keys), "learned": (1, heads, rows, keys)}
    if kind is None:
        return None
    if kind == "expanded":
        return torch.empty(batch, 1, rows, 1, dtype=dtype, device="cuda").expand(batch, 1, rows, keys)
    if kind == "by columns":
        return torch.empty(keys, rows, dtype=dtype, device="cuda").t()
    if kind == "padded":
        return torch.empty(batch, 1, rows, keys + 5, dtype=dtype, device="cuda")[..., :keys]
    mask = torch.empty(shapes[str(kind)], dtype=torch.bool if kind == "bool" else dtype, device="cuda")
    return mask.requires_grad_(kind == "learned")


def call(dtype: torch.dtype, like: dict[str, object]) -> Attention:
    of = {name: like.get(name, values[0]) for name, values in RESPECTS.items()}
    pick = lambda name, other: of[other] if of[name] is None else of[name]  # noqa: E731
    value_dtype = dtype if of["value dtype"] is None else of["value dtype"]
    sizes = [
        (of["batch"], of["heads"], of["rows"], of["width"]),
        (pick("key batch", "batch"), pick("key heads", "heads"), pick("keys", "rows"), pick("key width", "width")),
    ]
    values_heads = sizes[1][1] if of["value heads"] is None else of["value heads"]
    sizes.append((sizes[1][0], values_heads, sizes[1][2], pick("value width", "width")))
    count = int(of["dimensions"])
    shapes = [(1, *size) if count == 5 else size[4 - count :] for size in sizes]
    inputs = []
    for number, shape in enumerate(shapes):
        layout = of["layout"] if number == 1 or not of["one layout"] else "contiguous"
        inputs.append(laid_out(shape, layout, value_dtype if number == 2 else dtype))
    for x in inputs:
        x.requires_grad_(bool(of["trained"]))
    mask = masked(of["mask"], *sizes[0][:3], sizes[1][2], dtype)
    return Attention(*inputs, mask, of["dropout"], of["causal"], of["grouped"])


def cases(count: int) -> Iterator[tuple[torch.dtype, dict[str, object]]]:
    kinds = [(name, value) for name, values in RESPECTS.items() for value in values[1:]]
    for dtype in DTYPES:
        yield dtype, {}
        yield from ((dtype, {name: value}) for name, value in kinds)
        for one, other in itertools.combinations(kinds, 2):
            if one[0] != other[0]:
                yield dtype, dict((one, other))
    choose = random.Random(0)
    for _ in range(count):
        some = choose.sample(list(RESPECTS), choose.randint(3, 5))
        yield choose.choice(DTYPES), {name: choose.choice(RESPECTS[name]) for name in some}


@contextmanager
def switched(like: dict[str, object]) -> Iterator[None]:
    """Inside, the program's switches are as the case has them."""
    by_name = {name: SDPBackend(number) for number, name in NAMES.items()}
    kernels, first = like.get("kernels"), False
    allowed = [by_name[name] for name in (CUDNN, FLASH, EFFICIENT, MATH) if kernels in (None, name)]
    if kernels == "efficient first":
        allowed, first = [by_name[name] for name in (EFFICIENT, FLASH, MATH)], True
    elif str(kernels).startswith("no "):
        allowed = [by_name[name] for name in (CUDNN, FLASH, EFFICIENT, MATH) if f"no {name}" != kernels]
    deterministic = like.get("deterministic", False)
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn only")
    with torch.set_grad_enabled(like.get("trained") != "without grad"):
        if kernels is None:
            yield
        else:
            with sdpa_kernel(allowed, set_priority=first):
                yield


def refused(choice: Callable[[], str]) -> str:
    try:
        return choice()
    except RuntimeError as error:
        return str(error).split(".")[0]


def main() -> int:
    warnings.simplefilter("ignore")  # why PyTorch takes none of the kernels
    limits = Limits.of(torch.device("cuda", 0))
    numbers, wrong = Counter[str](), 0
    for dtype, like in cases(int(sys.argv[1]) if len(sys.argv) > 1 else 0):
        attention = call(dtype, like)
        query, key, value, mask, dropout, causal, grouped = attention
        choice = partial(torch._fused_sdp_choice, query, key, value, mask, dropout, causal, enable_gqa=grouped)
        with switched(like):
            theirs = refused(lambda choice=choice: NAMES[choice()])
            ours = refused(lambda attention=attention: chosen(attention, limits))
        numbers[theirs] += 1
        if ours != theirs:
            wrong += 1
            print(f"{dtype} {like}: {ours} by our rules, {theirs} by PyTorch's")
    print(f"{torch.cuda.get_device_name()}: {sum(numbers.values())} compared, {wrong} differ: {dict(numbers)}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
