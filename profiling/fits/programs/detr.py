"""Boxes by DETR, whose matching is computed on the host: transformers 5.24.0, scipy."""

import torch
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

config = DetrConfig(
    use_timm_backbone=False,
    use_pretrained_backbone=False,
    backbone=None,
    encoder_layers=3,
    decoder_layers=3,
    backbone_config=ResNetConfig(out_features=["stage4"]),
    num_labels=5,
)
model = DetrForObjectDetection(config).cuda()
optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
labels = [
    {"class_labels": torch.tensor([1, 2]).cuda(), "boxes": torch.rand(2, 4).cuda()}
    for _ in range(2)
]
for step in range(10):
    loss = model(pixel_values=torch.rand(2, 3, 320, 320).cuda(), labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
