"""A net fitted to a function by L-BFGS, with derivatives of derivatives: torch 2.13.0."""

import torch

model = torch.nn.Sequential(
    torch.nn.Linear(1, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
).cuda()
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
x = torch.linspace(0, 1, 10_000, device="cuda")[:, None].requires_grad_()


def closure():
    optimizer.zero_grad()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    loss = (slope - torch.cos(x)).pow(2).mean()
    loss.backward()
    return loss


for step in range(5):
    print(step, optimizer.step(closure).item())
