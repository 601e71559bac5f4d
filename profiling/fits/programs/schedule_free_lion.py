"""Optimizers of other packages on a small ViT: schedulefree 1.4.1, lion-pytorch 0.2.5."""

import timm
import torch
from lion_pytorch import Lion
from schedulefree import AdamWScheduleFree

model = timm.create_model("vit_tiny_patch16_224", num_classes=10).cuda()
head = list(model.head.parameters())
rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("head")]
first, second = AdamWScheduleFree(rest, 1e-3, warmup_steps=5), Lion(head, 1e-4)
first.train()
for step in range(10):
    loss = torch.nn.functional.cross_entropy(
        model(torch.rand(32, 3, 224, 224, device="cuda")), torch.randint(10, (32,), device="cuda")
    )
    loss.backward()
    for optimizer in (first, second):
        optimizer.step()
        optimizer.zero_grad()
    print(step, loss.item())
