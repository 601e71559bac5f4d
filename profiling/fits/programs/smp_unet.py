"""A Unet with the Dice loss: segmentation-models-pytorch 0.6.0."""

import segmentation_models_pytorch as smp
import torch

model = smp.Unet("resnet34", encoder_weights=None, classes=1).cuda()
loss_function = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
optimizer = torch.optim.Adam(model.parameters(), 2e-4)
for step in range(10):
    pictures, masks = torch.rand(8, 3, 256, 256).cuda(), torch.randint(2, (8, 1, 256, 256)).cuda()
    scores = model(pictures)
    loss = loss_function(scores, masks)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    counted = smp.metrics.get_stats((scores.sigmoid() > 0.5).long(), masks.long(), mode="binary")
    print(step, loss.item(), smp.metrics.iou_score(*counted, reduction="micro").item())
