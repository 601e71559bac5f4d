"""A LightningModule with validation and metrics under Lightning's Trainer: lightning 2.6.6, torchmetrics 1.9.0."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(3072, 2048), nn.ReLU(inplace=True), nn.Linear(2048, 10)
        )
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch, number):
        x, y = batch
        scores = self.net(x)
        loss = nn.functional.cross_entropy(scores, y)
        self.log("accuracy", self.accuracy(scores, y), prog_bar=True)
        return loss

    def validation_step(self, batch, number):
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def main():
    loader = DataLoader(TensorDataset(torch.rand(512, 3, 32, 32), torch.randint(10, (512,))), 128)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="gpu",
        precision="16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), loader, loader)


if __name__ == "__main__":
    main()
