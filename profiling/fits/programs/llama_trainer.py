"""A LLaMA by Hugging Face's Trainer, bf16 weights, checkpointed, fused AdamW: transformers 5.24.0."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

config = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
)
texts = torch.randint(32_000, (32, 1024))
data = [{"input_ids": text, "labels": text} for text in texts]
arguments = TrainingArguments(
    "/tmp/fits-llama",
    per_device_train_batch_size=2,
    gradient_checkpointing=True,
    bf16=True,
    optim="adamw_torch_fused",
    report_to=[],
    save_strategy="no",
)
Trainer(
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), arguments, train_dataset=data
).train()
