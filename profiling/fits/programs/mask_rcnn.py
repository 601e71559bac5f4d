"""Mask R-CNN, which chooses boxes by their scores: torchvision 0.28.0."""

import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).cuda().train()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.005, momentum=0.9)
for step in range(10):
    pictures = [torch.rand(3, 320, 320).cuda() for _ in range(2)]
    boxes = torch.tensor([[10.0, 10.0, 200.0, 200.0], [50.0, 60.0, 300.0, 250.0]])
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, 320, 320, dtype=torch.uint8),
    }
    targets = [{name: value.cuda() for name, value in target.items()} for _ in pictures]
    loss = sum(model(pictures, targets).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item())
