"""DeepLabV3 for segmentation with dilated convolutions: torchvision 0.28.0."""

import torch
from torchvision.models.segmentation import deeplabv3_resnet50

model = deeplabv3_resnet50(
    weights=None, weights_backbone=None, num_classes=21, aux_loss=True
).cuda()
optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
for step in range(10):
    pictures, labels = torch.rand(4, 3, 256, 256).cuda(), torch.randint(21, (4, 256, 256)).cuda()
    out = model(pictures)
    loss = sum(
        torch.nn.functional.cross_entropy(head, labels, ignore_index=255) for head in out.values()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item())
