"""The ways to compute what E1 to E3 and E5 are about, as code that runs and is measured.

`broadcast` stores every product of every dot product, as the document counts. `materialised` stores
one number per dot product, by a matrix product. `ours` is what this project trains with. One
process stands for one rank: where a rank would gather the other ranks' texts, they are given as
inputs. The other ranks' images are given too in the first two of E1, and in "broadcast" and
"materialised, all" of E2.

`run` measures an implementation. `predict` runs the same code on tensors without data.

Shapes: B pairs per rank, P ranks, G = B * P, I images (B or G), N image patches, M text positions,
H hidden size, D embedding dimension.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_cmli.cmli import cmli_scores
from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.fake_cuda.streams import Stream
from ds_cmli.losses.target_cmli import match_patches
from profiling.memory.estimates import SPECIAL_TOKENS, Setting
from profiling.speed.op import broadcast_dots, broadcast_scores, cpu_sizes, materialised_scores

SMALL = Setting(B=2, P=1, N=4, M=4, H=8, D=8)


def loss_of(s_i2t: Tensor, s_t2i: Tensor, logit_scale: Tensor) -> Tensor:
    """The contrastive loss of scores [I, G], of which the first I columns are the images' own."""
    rows, columns = logit_scale.exp() * s_i2t, logit_scale.exp() * s_t2i
    of_rows, of_columns = rows.logsumexp(1), columns.logsumexp(0)[: len(columns)]
    return (of_rows + of_columns - rows.diagonal() - columns.diagonal()).mean() / 2


def global_loss(
    dots: Callable[[Tensor, Tensor], Tensor], image: Tensor, text: Tensor, logit_scale: Tensor
) -> Tensor:
    scores = dots(image, text)
    return loss_of(scores, scores, logit_scale)


def cmli_loss(
    scores: Callable, image: Tensor, text: Tensor, token_mask: Tensor, logit_scale: Tensor
) -> Tensor:
    s_i2t, s_t2i = scores(image, text, token_mask)
    return loss_of(s_i2t, s_t2i, logit_scale)


def broadcast_match(tokens: Tensor, patches: Tensor) -> Tensor:
    """[B, M, D], [B, N, D] -> the best patch of each token, int64 [B, M]. Stores [B, N, M, D]."""
    return broadcast_dots(patches[:, :, None], tokens[:, None]).argmax(1)


def materialised_match(tokens: Tensor, patches: Tensor) -> Tensor:
    """The same as `broadcast_match`, but stores [B, N, M]."""
    return (patches @ tokens.transpose(1, 2)).argmax(1)


def unit_rows(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype)


def global_inputs(images: int, s: Setting, device: str) -> tuple[Tensor, ...]:
    rows = partial(unit_rows, dtype=torch.float32, device=device)
    return rows(images, s.H).requires_grad_(), rows(s.G, s.H).requires_grad_(), _logit_scale(device)


def cmli_inputs(images: int, tokens: int, s: Setting, device: str) -> tuple[Tensor, ...]:
    rows = partial(unit_rows, dtype=torch.float32, device=device)
    image, text = rows(images, s.N, s.D).requires_grad_(), rows(s.G, tokens, s.D).requires_grad_()
    mask = torch.ones(s.G, tokens, dtype=torch.bool, device=device)
    return image, text, mask, _logit_scale(device)


def match_inputs(tokens: int, s: Setting, device: str) -> tuple[Tensor, ...]:
    # They need no gradient, as none passes through an index.
    rows = partial(unit_rows, dtype=torch.float16, device=device)
    return rows(s.B, tokens, s.D), rows(s.B, s.N, s.D)


def _logit_scale(device: str) -> Tensor:
    return torch.zeros(1, device=device, requires_grad=True)


@dataclass(frozen=True)
class Implementation:
    inputs: Callable[[str], tuple[Tensor, ...]]  # device -> arguments of `forward`
    forward: Callable[..., Tensor]  # returns a scalar loss, or indices, which have no gradient
    op: bool = False  # whether it runs the all-pairs operator


def implementations(s: Setting, backend: str = "auto") -> dict[tuple[str, str], Implementation]:
    """(claim's id, name) -> the implementation in the setting `s`.

    The names are the keys of `Claim.stored`.

    `backend`: of the all-pairs op.
    """
    kept = s.M - SPECIAL_TOKENS
    blocks = {"all": partial(cmli_inputs, s.G, s.M, s), "row": partial(cmli_inputs, s.B, s.M, s)}
    global_all, global_row = (partial(global_inputs, images, s) for images in (s.G, s.B))
    match, product = partial(match_inputs, s.M, s), partial(global_loss, _product)
    broadcast = partial(global_loss, lambda x, y: broadcast_dots(x[:, None], y))
    stored = partial(cmli_loss, materialised_scores)
    ours = partial(cmli_loss, partial(cmli_scores, backend=backend))
    return {
        ("E1", "broadcast"): Implementation(global_all, broadcast),
        ("E1", "materialised"): Implementation(global_all, product),
        ("E1", "ours"): Implementation(global_row, product),
        ("E2", "broadcast"): Implementation(blocks["all"], partial(cmli_loss, broadcast_scores)),
        ("E2", "materialised"): Implementation(blocks["row"], stored),
        ("E2", "ours"): Implementation(blocks["row"], ours, op=True),
        ("E2", "materialised, all"): Implementation(blocks["all"], stored),
        ("E3", "broadcast"): Implementation(match, broadcast_match),
        ("E3", "materialised"): Implementation(match, materialised_match),
        ("E3", "ours"): Implementation(match, match_patches),
        ("E5", f"E2 materialised, {kept} of {s.M}"): Implementation(
            partial(cmli_inputs, s.B, kept, s), stored
        ),
        ("E5", f"E3 materialised, {kept} of {s.M}"): Implementation(
            partial(match_inputs, kept, s), materialised_match
        ),
    }


def _product(image: Tensor, text: Tensor) -> Tensor:
    return image @ text.t()


@dataclass(frozen=True)
class Allocations:
    largest: int  # bytes of the largest single allocation of forward
    peak: int  # the most bytes held at once above what was live before, over the passes that ran
    passes: str  # "forward", or "forward and backward"


def summarise(forward: Iterable[int], backward: Iterable[int] | None) -> Allocations:
    """Summarise the bytes of allocations (positive) and frees (negative), in order.

    `backward` None: it did not run.
    """
    forward = list(forward)
    peak = max(accumulate([*forward, *(backward or ())]), default=0)
    passes = "forward" if backward is None else "forward and backward"
    return Allocations(max(forward, default=0), max(peak, 0), passes)


def run(
    implementation: Implementation,
    device: str,
    backward: bool,
    say: Callable = lambda allocations: None,
) -> Allocations:
    """Measure forward as in training, and backward if it is requested and there is a gradient.

    `say` is called after each pass, as backward may run out of memory.
    """
    observe = cuda_sizes if device == "cuda" else cpu_sizes
    inputs = implementation.inputs(device)
    out: list[Tensor] = []
    forward = observe(lambda: out.append(implementation.forward(*inputs)))
    allocations = summarise(forward, None)
    say(allocations)
    if backward and out[0].requires_grad:
        allocations = summarise(forward, observe(out.pop().backward))
        say(allocations)
    return allocations


def cuda_sizes(call: Callable[[], object]) -> list[int]:
    """The requested bytes of `call` in CUDA's allocator: allocations positive, frees negative."""
    history = torch.cuda.memory
    history._record_memory_history(context=None, stacks="python", max_entries=10**6)
    call()
    torch.cuda.synchronize()  # CPU-GPU sync
    trace = history._snapshot()["device_traces"][torch.cuda.current_device()]
    history._record_memory_history(enabled=None)
    return trace_sizes(trace)


def trace_sizes(trace: list[dict]) -> list[int]:
    """The requested bytes of a history: allocations positive, frees negative."""
    sign = {"alloc": 1, "free_requested": -1}
    return [sign[entry["action"]] * entry["size"] for entry in trace if entry["action"] in sign]


def predict(implementation: Implementation, backward: bool = True) -> Allocations:
    """Run the same code on fake tensors, which have sizes and lifetimes but no data."""
    Stream.begin()
    recorder = Recorder("cpu")
    with FakeTensorMode():
        inputs = implementation.inputs("cpu")
        recorder.claim("data", inputs)
        known = len(recorder.log)
        with recorder:
            out = implementation.forward(*inputs)
            forward = len(recorder.log)
            if backward and out.requires_grad:
                recorder.phase = "backward"
                out.backward()
        events = recorder.events()
    first, rest = events[known:forward], events[forward:]
    return summarise((e.bytes for e in first), (e.bytes for e in rest) if rest else None)
