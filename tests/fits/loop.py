"""A small GPT's training loop: `loop.py PRECISION [fused] [checkpoint] [values] [mistake]`.

Shapes: B sequences, T tokens, D features.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

B, T, D, HEADS, WORDS = 8, 256, 128, 2, 5000
precision, switches = sys.argv[1], sys.argv[2:]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D), nn.Dropout(0.1))

    def forward(self, x):  # [B, T, D]
        heads = self.qkv(self.norm(x)).view(B, T, 3, HEADS, D // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.layers, self.head = nn.Embedding(WORDS, D), nn.ModuleList(), nn.Linear(D, WORDS)
        self.layers.extend(Layer() for _ in range(3))

    def forward(self, tokens):  # [B, T]
        x = self.words(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if "checkpoint" in switches else layer(x)
        return self.head(x)  # [B, T, WORDS]


def read_values(loss: torch.Tensor, tokens: torch.Tensor) -> None:
    """Read in every way that loops do; what a copy from the host tells is right, and a loss is finite."""
    assert torch.isfinite(loss) and not torch.isnan(loss).any() and loss.item() == loss.detach().cpu().numpy() == 2
    places = torch.arange(T).to(tokens.device)
    assert places.max().item() == T - 1 and len(places[places > 99]) == T - 100
    assert len(places.masked_select(places > 99)) == T - 100 and len(torch.bincount(places)) == T
    assert len(tokens[tokens < 0].tolist()) == tokens.numel()  # unknown, so all may be
    print(f"loss {loss:.2f}", loss)


def main() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), fused="fused" in switches or None)
    model.to("cuda")  # the optimizer keeps its parameters
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    data = [torch.randint(WORDS, (T + 1,)) for _ in range(4 * B)]
    for texts in DataLoader(data, B, num_workers=2, pin_memory=True):
        tokens = texts.to("cuda", non_blocking=True)
        with torch.autocast("cuda", dtype, enabled=precision != "fp32"):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        if "mistake" in switches:
            raise KeyError("mine")
        if "values" in switches:
            read_values(loss, torch.randint(9, (5,), device="cuda"))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    sys.exit(7)


if __name__ == "__main__":
    main()
