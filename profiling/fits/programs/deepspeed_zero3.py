"""GPT-2 by DeepSpeed's ZeRO-3, one of two ranks, in bf16: deepspeed 0.19.8, transformers 5.24.0."""

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

config = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True}},
}
deepspeed.init_distributed()
model = GPT2LMHeadModel(GPT2Config(n_layer=6))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
for step in range(10):
    tokens = torch.randint(50_257, (4, 512), device=engine.device)
    loss = engine(tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    print(step, loss.item())
