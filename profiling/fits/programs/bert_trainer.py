"""BERT on masked words by Hugging Face's Trainer: transformers 5.24.0."""

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

texts = torch.randint(30_000, (64, 128))
data = [
    {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text} for text in texts
]
model = BertForMaskedLM(BertConfig(num_hidden_layers=6))
arguments = TrainingArguments(
    "/tmp/fits-bert", per_device_train_batch_size=16, report_to=[], save_strategy="no"
)
Trainer(model, arguments, train_dataset=data).train()
