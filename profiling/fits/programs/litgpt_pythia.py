"""A Pythia by litgpt's model under Fabric in bf16: litgpt 0.5.9, lightning 2.6.6."""

import lightning
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy

fabric = lightning.Fabric(devices=1, precision="bf16-mixed")
fabric.launch()
with fabric.init_module(empty_init=False):
    model = GPT(Config.from_name("pythia-160m", n_layer=6))
model = fabric.setup_module(model)
optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), 3e-4, fused=True))
for step in range(10):
    tokens = torch.randint(50_000, (4, 513), device=fabric.device)
    loss = chunked_cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(step, loss.item())
