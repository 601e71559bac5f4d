"""A generator and a discriminator, an optimizer each, by the usual DCGAN loop: torch 2.13.0."""

import torch
from torch import nn


def generator():
    layers = []
    for number, (given, made) in enumerate(((100, 512), (512, 256), (256, 128), (128, 64))):
        later = number > 0
        layers += [nn.ConvTranspose2d(given, made, 4, 1 + later, int(later), bias=False)]
        layers += [nn.BatchNorm2d(made), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator():
    layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
    for given in (64, 128, 256):
        layers += [
            nn.Conv2d(given, 2 * given, 4, 2, 1),
            nn.BatchNorm2d(2 * given),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4), nn.Flatten(0))


made, judge = generator().cuda(), discriminator().cuda()
for_judge = torch.optim.Adam(judge.parameters(), 2e-4, betas=(0.5, 0.999))
for_made = torch.optim.Adam(made.parameters(), 2e-4, betas=(0.5, 0.999))
criterion = nn.BCEWithLogitsLoss()
for step in range(10):
    real = torch.rand(64, 3, 64, 64, device="cuda")
    judge.zero_grad()
    loss = criterion(judge(real), torch.full((64,), 1.0, device="cuda"))
    loss.backward()
    fake = made(torch.randn(64, 100, 1, 1, device="cuda"))
    criterion(judge(fake.detach()), torch.zeros(64, device="cuda")).backward()
    for_judge.step()
    made.zero_grad()
    criterion(judge(fake), torch.ones(64, device="cuda")).backward()
    for_made.step()
    print(step, loss.item())
