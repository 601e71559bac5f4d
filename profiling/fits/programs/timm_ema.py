"""ConvNeXt with a running mean of its weights, mixup and channels last, in timm's usual loop: timm 1.0.31."""

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad  # noqa: F401

model = timm.create_model("convnext_tiny", num_classes=100, drop_path_rate=0.1)
model = model.cuda().to(memory_format=torch.channels_last)
average = ModelEmaV3(model, decay=0.999)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
scaler, mixup, criterion = (
    NativeScaler(),
    Mixup(0.8, 1.0, num_classes=100),
    SoftTargetCrossEntropy(),
)
for step in range(10):
    pictures = (
        torch.rand(16, 3, 224, 224)
        .cuda(non_blocking=True)
        .contiguous(memory_format=torch.channels_last)
    )
    pictures, labels = mixup(pictures, torch.randint(100, (16,)).cuda())
    with torch.autocast("cuda", torch.float16):
        loss = criterion(model(pictures), labels)
    scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    optimizer.zero_grad()
    average.update(model, step=step)
    torch.cuda.synchronize()
    print(step, f"{loss.item():.3f}", torch.cuda.max_memory_allocated() > 0)
