"""Whisper's smallest size by Hugging Face's Seq2SeqTrainer in bf16, checkpointed: transformers 5.24.0."""

import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

data = [
    {"input_features": torch.rand(80, 3000), "labels": torch.randint(50_000, (48,))}
    for _ in range(32)
]
arguments = Seq2SeqTrainingArguments(
    "/tmp/fits-whisper",
    per_device_train_batch_size=8,
    bf16=True,
    gradient_checkpointing=True,
    report_to=[],
    save_strategy="no",
)
Seq2SeqTrainer(
    WhisperForConditionalGeneration(WhisperConfig()), arguments, train_dataset=data
).train()
