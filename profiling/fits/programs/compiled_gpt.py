"""A small GPT that is compiled: x-transformers 2.31.10."""

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

net = TransformerWrapper(
    num_tokens=10_000,
    max_seq_len=512,
    attn_layers=Decoder(
        dim=512, depth=6, heads=8, attn_flash=True, rotary_pos_emb=True, use_rmsnorm=True
    ),
)
model = torch.compile(AutoregressiveWrapper(net).cuda())
optimizer = torch.optim.AdamW(model.parameters(), 3e-4, foreach=True)
for step in range(10):
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(torch.randint(10_000, (8, 513), device="cuda"))
    loss.backward()
    print(step, loss.item())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
