"""A convolutional net in accelerate's loop with accumulated gradients, bf16: accelerate 1.15.0, torchvision 0.28.0."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v3_small

accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
data = TensorDataset(torch.rand(256, 3, 96, 96), torch.randint(10, (256,)))
model = mobilenet_v3_small(num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=100)
loader = DataLoader(data, 32, shuffle=True)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
for pictures, labels in loader:
    with accelerator.accumulate(model):
        loss = torch.nn.functional.cross_entropy(model(pictures), labels)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    accelerator.print(accelerator.gather(loss).mean().item())
