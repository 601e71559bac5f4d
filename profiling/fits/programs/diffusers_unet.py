"""A denoising UNet with a running mean of its weights, by accelerate: diffusers 0.42.1, accelerate 1.15.0."""

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

accelerator = Accelerator(mixed_precision="fp16")
model = UNet2DModel(64, block_out_channels=(64, 128, 256, 256))
noise_schedule = DDPMScheduler(1000)
average = EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config)
optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
schedule = get_cosine_schedule_with_warmup(optimizer, 5, 100)
loader = torch.utils.data.DataLoader(torch.rand(64, 3, 64, 64), 8)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
average.to(accelerator.device)
for pictures in loader:
    noise = torch.randn(pictures.shape, device=pictures.device)
    times = torch.randint(0, 1000, (len(pictures),), device=pictures.device, dtype=torch.int64)
    noisy = noise_schedule.add_noise(pictures, noise, times)
    with accelerator.accumulate(model):
        loss = torch.nn.functional.mse_loss(model(noisy, times, return_dict=False)[0], noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    average.step(model.parameters())
    print(loss.detach().item())
