"""What the benchmark times: inputs in the document's sizes, a step over them, and the bare product as floor.

Shapes: image [I, N, D], text [J, M, D]; scores [I, J].
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

N, M, D = 196, 64, 256
SETTINGS = ("full", "captions", "mixed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Scores = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def text_lengths(setting: str, B: int) -> Tensor:
    """Valid tokens of each text: all 62; as in captions (mean about 12, one of 62); evenly from 8 to 62."""
    g = torch.Generator().manual_seed(1)
    if setting == "full":
        return torch.full((B,), 62)
    if setting == "mixed":
        return torch.randint(8, 63, (B,), generator=g)
    lengths = torch.empty(B).log_normal_(2.35, 0.5, generator=g).round().clamp(3, 62).long()
    lengths[0] = 62
    return lengths


class Problem:
    """Inputs, upstream gradients and what is timed: I images against J texts."""

    def __init__(self, setting: str, I: int, J: int, dtype: torch.dtype, device: str):  # noqa: E741
        g = torch.Generator().manual_seed(0)
        lengths = text_lengths(setting, J)
        self.tokens = int(lengths.sum())
        self.mask = (torch.arange(M) < lengths[:, None]).to(device)
        self.image, self.text = (
            F.normalize(torch.randn(n, p, D, generator=g), dim=-1).to(device, dtype).requires_grad_()
            for n, p in ((I, N), (J, M))
        )
        self.grads = [(torch.randn(I, J, generator=g) / J).to(device) for _ in range(2)]
        self.device = device

    def forward(self, scores: Scores) -> None:
        with torch.no_grad():
            scores(self.image, self.text, self.mask)

    def step(self, scores: Scores) -> None:
        torch.autograd.grad(scores(self.image, self.text, self.mask), (self.image, self.text), self.grads)

    def floor(self) -> Callable[[], None]:
        valid = self.text.detach()[self.mask].float()
        patches = self.image.detach().float().flatten(0, 1)
        out = valid.new_empty(len(valid), 16 * N)

        def product() -> None:
            for block in patches.split(16 * N):
                torch.mm(valid, block.t(), out=out.view(-1)[: len(valid) * len(block)].view(len(valid), len(block)))

        return product

    def seconds(self, call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
