"""torch alone: a decoder from parts as a course has them written (CS336 of Stanford, assignment 2, "medium"): 423 million
parameters in fp32, four sequences of 256 tokens, and an AdamW of its own."""

import math

import torch
from torch import Tensor, nn

WIDTH, HIDDEN, DEPTH, HEADS, WORDS, BATCH, LENGTH = 1024, 4096, 24, 16, 10_000, 4, 256


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * x


class Linear(nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.weight = matrix(made, given)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        query = turned(query, turns)
        key = turned(key, turns)
        places = torch.arange(x.shape[1], device=x.device)
        earlier = places[:, None] >= places
        return self.out(
            attended(query, key, value, earlier).transpose(1, 2).flatten(2).contiguous()
        )


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions, of neighbouring pairs."""
    cosines, sines = turns
    one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
    new_one = cosines * one - sines * other
    new_other = sines * one + cosines * other
    return torch.stack((new_one, new_other), -1).flatten(-2)


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", query, key) / math.sqrt(query.shape[-1])
    scores = torch.where(mask, scores, float("-inf"))
    return torch.einsum("...qk,...kd->...qd", softmax(scores), value)


def softmax(x: Tensor) -> Tensor:
    x = x - torch.max(x, -1, keepdim=True)[0]
    powers = torch.exp(x)
    return powers / powers.sum(-1, keepdim=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.down, self.up = (
            Linear(WIDTH, HIDDEN),
            Linear(HIDDEN, WIDTH),
            Linear(WIDTH, HIDDEN),
        )
        self.before, self.between = Norm(), Norm()

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        attended = self.attention(self.before(x), turns)
        x = x + attended
        changed = self.changed(self.between(x))
        return x + changed

    def changed(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(gate * torch.sigmoid(gate) * self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = matrix(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = Norm(), Linear(WIDTH, WORDS)
        angles = torch.arange(LENGTH)[:, None] * 1e4 ** (
            -torch.arange(0, WIDTH // HEADS, 2) * HEADS / WIDTH
        )
        self.register_buffer("turns", torch.stack((angles.cos(), angles.sin())))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words[words]
        for block in self.blocks:
            x = block(x, self.turns)
        return self.head(self.norm(x))


class AdamW(torch.optim.Optimizer):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                rate, t = group["lr"], state.get("t", 1)
                gradient = parameter.grad.data
                parameter.data -= rate * group["weight_decay"] * parameter.data
                mean = state.get("mean", torch.zeros_like(gradient))
                square = state.get("square", torch.zeros_like(gradient))
                mean = 0.9 * mean + 0.1 * gradient
                square = 0.999 * square + 0.001 * torch.square(gradient)
                rate *= math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
                parameter.data -= rate * mean / (torch.sqrt(square) + 1e-8)
                state.update(t=t + 1, mean=mean, square=square)


def log_softmax(x: Tensor) -> Tensor:
    x = x - torch.max(x, -1, keepdim=True)[0]
    return x - torch.log(torch.sum(torch.exp(x), -1, keepdim=True))


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    surprise = -log_softmax(scores)
    return torch.mean(torch.gather(surprise, -1, targets[..., None]))


model = Model().cuda()
optimizer = AdamW(model.parameters(), dict(lr=1e-3, weight_decay=0.01))
words, targets = torch.randint(WORDS, (2, 5, BATCH, LENGTH)).cuda()
for step in range(5):
    optimizer.zero_grad()
    loss = loss_of(model(words[step]), targets[step])
    loss.backward()
    optimizer.step()
