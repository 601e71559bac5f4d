"""ViT-S on images by Hugging Face's Trainer in fp16: transformers 5.24.0."""

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
data = [{"pixel_values": torch.rand(3, 224, 224), "labels": number} for number in range(64)]
arguments = TrainingArguments(
    "/tmp/fits-vit",
    per_device_train_batch_size=16,
    fp16=True,
    report_to=[],
    save_strategy="no",
    lr_scheduler_type="cosine",
    logging_steps=1,
)
Trainer(ViTForImageClassification(config), arguments, train_dataset=data).train()
