"""A masked autoencoder: vit-pytorch 1.26.11."""

import torch
from vit_pytorch import MAE, ViT

encoder = ViT(
    image_size=224, patch_size=16, num_classes=1000, dim=512, depth=6, heads=8, mlp_dim=2048
)
model = MAE(encoder=encoder, masking_ratio=0.75, decoder_dim=512, decoder_depth=3).cuda()
optimizer = torch.optim.AdamW(model.parameters(), 1.5e-4, betas=(0.9, 0.95))
for step in range(10):
    loss = model(torch.rand(16, 3, 224, 224, device="cuda"))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
