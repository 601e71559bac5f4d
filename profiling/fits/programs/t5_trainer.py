"""T5 by Hugging Face's Seq2SeqTrainer with Adafactor: transformers 5.24.0."""

import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

data = [
    {"input_ids": torch.randint(1, 32_000, (256,)), "labels": torch.randint(1, 32_000, (64,))}
    for _ in range(32)
]
arguments = Seq2SeqTrainingArguments(
    "/tmp/fits-t5",
    per_device_train_batch_size=8,
    optim="adafactor",
    report_to=[],
    save_strategy="no",
)
model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))
Seq2SeqTrainer(model, arguments, train_dataset=data).train()
