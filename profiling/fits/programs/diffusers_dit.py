"""A diffusion transformer in bf16, checkpointed, with a generator of the device: diffusers 0.42.1."""

import torch
from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel(
    num_attention_heads=6, attention_head_dim=64, num_layers=8, sample_size=32
).cuda()
model.enable_gradient_checkpointing()
optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
generator = torch.Generator("cuda").manual_seed(0)
for step in range(10):
    x = torch.randn(16, 4, 32, 32, device="cuda", generator=generator)
    times = torch.randint(1000, (16,), device="cuda", generator=generator)
    labels = torch.randint(1000, (16,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = model(x, timestep=times, class_labels=labels).sample
    loss = (out[:, :4].float() - x).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item(), torch.cuda.memory_allocated())
