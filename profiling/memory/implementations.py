"""The ways to compute what E1, E2, E3 and E5 are about, as code that is measured, and predicted.

"broadcast" stores every product of every dot product, as the document counts; "materialised" one
number per dot product, by a matrix product; "ours" is what this project trains with. One process
stands for one rank: the other ranks' texts are inputs, and where I is G their images too.

Shapes: as in `estimates.py`; I images, B or G.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_cmli.cmli import cmli_scores
from ds_cmli.fake_cuda.device import fake_cuda
from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.fake_cuda.streams import Stream
from ds_cmli.losses.target_cmli import match_patches
from ds_cmli.memory_model.gpus import Gpu
from profiling.memory.estimates import SPECIAL_TOKENS, Setting
from profiling.speed.op import cmli_from, cpu_sizes, materialised_scores, upcast


def contrastive_loss(
    scores: Callable, image: Tensor, text: Tensor, token_mask: Tensor, logit_scale: Tensor
) -> Tensor:
    """Return the loss of both scores [I, G], whose first I columns are the images' positives."""
    s_i2t, s_t2i = scores(image, text, token_mask)
    logits_i2t = logit_scale.exp() * s_i2t
    logits_t2i = logit_scale.exp() * s_t2i
    row_lse = logits_i2t.logsumexp(1)
    column_lse = logits_t2i.logsumexp(0)[: len(logits_t2i)]
    return (row_lse + column_lse - logits_i2t.diagonal() - logits_t2i.diagonal()).mean() / 2


def broadcast_dots(x: Tensor, y: Tensor) -> Tensor:
    """Dot products over the last dimension of broadcast tensors, with every product stored."""
    return (x * y).sum(-1)


def global_broadcast(image: Tensor, text: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """[I, H], [G, H] -> cosines [I, G], twice. Stores [I, G, H]."""
    cosines = broadcast_dots(image[:, None], text)
    return cosines, cosines


def global_materialised(image: Tensor, text: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    cosines = image @ text.t()
    return cosines, cosines


def broadcast_scores(image: Tensor, text: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """CMLI of all pairs as the document counts it: [I, N, G, M, D] is stored."""
    similarities = broadcast_dots(upcast(image)[:, :, None, None], upcast(text))
    return cmli_from(similarities.masked_fill_(~token_mask, -torch.inf), token_mask)


def broadcast_match(tokens: Tensor, patches: Tensor) -> Tensor:
    """[B, M, D], [B, N, D] -> the best patch of each token, int64 [B, M]. Stores [B, N, M, D]."""
    return broadcast_dots(patches[:, :, None], tokens[:, None]).argmax(1)


def materialised_match(tokens: Tensor, patches: Tensor) -> Tensor:
    """Match as `broadcast_match` does, but store [B, N, M]."""
    return (patches @ tokens.transpose(1, 2)).argmax(1)


@dataclass(frozen=True)
class Implementation:
    image: tuple[int, ...]  # shapes of the features
    text: tuple[int, ...]
    function: Callable  # gives the scores of a contrastive loss, or
    matches: bool = False  # the best patches of tokens, in 16 bit; no gradient passes an index

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        image, text = (
            F.normalize(torch.randn(shape, device=device), dim=-1)
            for shape in (self.image, self.text)
        )
        if self.matches:
            return text.half(), image.half()
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
        logit_scale = torch.zeros(1, device=device, requires_grad=True)
        return image.requires_grad_(), text.requires_grad_(), mask, logit_scale

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the loss, or indices."""
        if self.matches:
            return self.function(*inputs)
        return contrastive_loss(self.function, *inputs)


def implementations(s: Setting, backend: str = "auto") -> dict[tuple[str, str], Implementation]:
    """(claim's id, name) -> the implementation in the setting `s`, by the keys of `Claim.stored`.

    `backend`: of the all-pairs op.
    """
    kept = s.M - SPECIAL_TOKENS
    dots = (s.G, s.H)
    local_images = (s.B, s.N, s.D)
    all_images = (s.G, s.N, s.D)
    text = (s.G, s.M, s.D)
    match = partial(Implementation, local_images, (s.B, s.M, s.D), matches=True)
    shorter = f"materialised, {kept} of {s.M}"
    return {
        ("E1", "broadcast"): Implementation(dots, dots, global_broadcast),
        ("E1", "materialised"): Implementation(dots, dots, global_materialised),
        ("E1", "ours"): Implementation((s.B, s.H), dots, global_materialised),
        ("E2", "broadcast"): Implementation(all_images, text, broadcast_scores),
        ("E2", "materialised"): Implementation(local_images, text, materialised_scores),
        ("E2", "ours"): Implementation(local_images, text, partial(cmli_scores, backend=backend)),
        ("E2", "materialised, all"): Implementation(all_images, text, materialised_scores),
        ("E3", "broadcast"): match(broadcast_match),
        ("E3", "materialised"): match(materialised_match),
        ("E3", "ours"): match(match_patches),
        ("E5", f"E2 {shorter}"): Implementation(
            local_images, (s.G, kept, s.D), materialised_scores
        ),
        ("E5", f"E3 {shorter}"): Implementation(
            local_images, (s.B, kept, s.D), materialised_match, True
        ),
    }


@dataclass(frozen=True)
class Allocations:
    largest: int  # bytes of the largest single allocation of forward
    peak: int  # the most bytes held at once above what was live before, over the passes that ran
    passes: str  # "forward", or "forward and backward"

    @classmethod
    def of(cls, forward: list[int], backward: list[int] | None = None) -> "Allocations":
        """Sum up the bytes of allocations (positive) and frees (negative), in order."""
        peak = max(accumulate([*forward, *(backward or ())]), default=0)
        passes = "forward" if backward is None else "forward and backward"
        return cls(max(forward, default=0), max(peak, 0), passes)


def run(implementation: Implementation, device: str, backward: bool) -> Iterator[Allocations]:
    """Measure forward as in training; then backward too, if it is requested and there is a gradient."""
    observe = cuda_sizes if device == "cuda" else cpu_sizes
    inputs = implementation.inputs(device)
    out: list[Tensor] = []
    forward = observe(lambda: out.append(implementation.forward(*inputs)))
    yield Allocations.of(forward)
    if backward and out[0].requires_grad:
        yield Allocations.of(forward, observe(out.pop().backward))


def cuda_sizes(call: Callable[[], object]) -> list[int]:
    """Return the requested bytes of `call` in CUDA's allocator: allocations positive, frees negative."""
    history = torch.cuda.memory
    history._record_memory_history(context=None, stacks="python", max_entries=10**6)
    call()
    torch.cuda.synchronize()  # CPU-GPU sync
    trace = history._snapshot()["device_traces"][torch.cuda.current_device()]
    history._record_memory_history(enabled=None)
    sign = {"alloc": 1, "free_requested": -1}
    return [sign[entry["action"]] * entry["size"] for entry in trace if entry["action"] in sign]


def predict(
    implementation: Implementation, gpu: Gpu | None = None
) -> tuple[Allocations, Allocations]:
    """Predict forward, and all passes, by the same code on tensors without data.

    They are on the CPU, or on `gpu`.
    """
    recorder = Recorder("cpu") if gpu is None else Recorder("cuda", gpu)
    with ExitStack() as stack:
        if gpu is None:
            Stream.begin()
            stack.enter_context(FakeTensorMode())
            stack.enter_context(recorder)
        else:
            stack.enter_context(fake_cuda(recorder, gpu))
        inputs = implementation.inputs(recorder.device)
        num_inputs_logged = len(recorder.log)
        out = implementation.forward(*inputs)
        num_forward_logged = len(recorder.log)
        if out.requires_grad:
            recorder.phase = "backward"
            out.backward()
        sizes = [event.bytes for event in recorder.events()]
    forward_sizes = sizes[num_inputs_logged:num_forward_logged]
    backward_sizes = sizes[num_forward_logged:] if out.requires_grad else None
    return Allocations.of(forward_sizes), Allocations.of(forward_sizes, backward_sizes)
