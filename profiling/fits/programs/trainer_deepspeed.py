"""BERT by Hugging Face's Trainer with DeepSpeed's ZeRO-2, one of two ranks: transformers 5.24.0, deepspeed 0.19.8."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
}
data = [{"input_ids": text, "labels": 1} for text in torch.randint(30_000, (64, 128))]
arguments = TrainingArguments(
    "/tmp/fits-deepspeed",
    per_device_train_batch_size=8,
    bf16=True,
    deepspeed=config,
    report_to=[],
    save_strategy="no",
)
Trainer(
    BertForSequenceClassification(BertConfig(num_hidden_layers=4)), arguments, train_dataset=data
).train()
