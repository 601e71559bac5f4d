"""ResNet-50 in torchvision's usual loop, channels last and GradScaler, SGD: torchvision 0.28.0."""

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet50
from torchvision.transforms import Compose, RandomHorizontalFlip, ToTensor


def main():
    torch.backends.cudnn.benchmark = True
    data = FakeData(256, (3, 224, 224), 1000, Compose([RandomHorizontalFlip(), ToTensor()]))
    loader = DataLoader(
        data, 32, shuffle=True, num_workers=2, pin_memory=True, persistent_workers=True
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = resnet50().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scaler, total = torch.amp.GradScaler(), 0.0
    for pictures, labels in loader:
        pictures = pictures.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with torch.amp.autocast("cuda"):
            scores = model(pictures)
            loss = torch.nn.functional.cross_entropy(scores, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        top = scores.topk(5).indices.eq(labels[:, None]).any(1).float().sum().item()
        total += loss.item() * len(labels)
        print(top, total)


if __name__ == "__main__":
    main()
