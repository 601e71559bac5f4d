"""A LLaMA with Liger's Triton kernels, in bf16: liger-kernel 0.8.5, transformers 5.24.0."""

import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from transformers import AutoModelForCausalLM, LlamaConfig

apply_liger_kernel_to_llama()
config = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16
)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
for step in range(10):
    tokens = torch.randint(32_000, (4, 512), device="cuda")
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
