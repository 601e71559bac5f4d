"""A mixture of experts, whose loads depend on data, in a plain loop: transformers 5.24.0."""

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

config = MixtralConfig(
    vocab_size=8000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_local_experts=8,
    output_router_logits=True,
)
model = AutoModelForCausalLM.from_config(config).cuda()
optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
for step in range(10):
    tokens = torch.randint(8000, (4, 256), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(step, loss.item())
