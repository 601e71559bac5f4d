"""A Unet in three dimensions with the Dice and cross-entropy loss: monai 1.6.1."""

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

model = UNet(3, 1, 4, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2).cuda()
loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
scaler = torch.amp.GradScaler("cuda")
for step in range(10):
    volumes, labels = (
        torch.rand(2, 1, 96, 96, 96).cuda(),
        torch.randint(4, (2, 1, 96, 96, 96)).cuda(),
    )
    with torch.autocast("cuda"):
        loss = loss_function(model(volumes), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    print(step, loss.item(), scaler.get_scale())
