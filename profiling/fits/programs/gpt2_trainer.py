"""GPT-2 by Hugging Face's Trainer, with its collator and accumulated gradients, in bf16: transformers 5.24.0."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

texts = torch.randint(50_257, (64, 512))
data = [{"input_ids": text, "labels": text} for text in texts]
arguments = TrainingArguments(
    "/tmp/fits-gpt2",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    bf16=True,
    report_to=[],
    save_strategy="no",
    dataloader_num_workers=2,
)
model = GPT2LMHeadModel(GPT2Config())
Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()
