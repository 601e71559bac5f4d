"""Augmentation on the device before a small net: kornia 0.9.0, torchvision 0.28.0."""

import kornia.augmentation as K
import torch
from torchvision.models import efficientnet_b0

augment = K.AugmentationSequential(
    K.RandomHorizontalFlip(), K.RandomAffine(15.0), K.ColorJiggle(0.1, 0.1, 0.1, 0.1)
)
torch.manual_seed(0)  # the order of augmentations, and so the memory
model = efficientnet_b0(num_classes=10).cuda()
optimizer = torch.optim.NAdam(model.parameters(), 1e-3)
for step in range(10):
    pictures = augment(torch.rand(32, 3, 128, 128).cuda())
    loss = torch.nn.functional.cross_entropy(model(pictures), torch.randint(10, (32,)).cuda())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
