"""SimCLR on two views of each picture: lightly 1.6.0, torchvision 0.28.0."""

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead

backbone = torch.nn.Sequential(
    *list(torchvision.models.resnet18().children())[:-1], torch.nn.Flatten()
)
model = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).cuda()
criterion = NTXentLoss()
optimizer = torch.optim.SGD(model.parameters(), 0.06)
for step in range(10):
    views = torch.rand(2, 64, 3, 96, 96, device="cuda")
    loss = criterion(model(views[0]), model(views[1]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
