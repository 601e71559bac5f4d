"""LoRA on a LLaMA in bf16 by peft and Hugging Face's Trainer: peft 0.21.2, transformers 5.24.0."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

config = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model = get_peft_model(
    model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
)
model.print_trainable_parameters()
texts = torch.randint(32_000, (32, 512))
data = [{"input_ids": text, "labels": text} for text in texts]
arguments = TrainingArguments(
    "/tmp/fits-lora", per_device_train_batch_size=4, bf16=True, report_to=[], save_strategy="no"
)
Trainer(model, arguments, train_dataset=data).train()
