"""Words to words by an encoder and a decoder, padded, in fp32: x-transformers 2.31.10."""

import torch
from x_transformers import XTransformer

model = XTransformer(
    dim=512,
    tie_token_emb=True,
    return_tgt_loss=True,
    enc_num_tokens=7000,
    enc_depth=3,
    enc_heads=8,
    enc_max_seq_len=256,
    dec_num_tokens=7000,
    dec_depth=3,
    dec_heads=8,
    dec_max_seq_len=256,
    dec_attn_dropout=0.1,
).cuda()
optimizer = torch.optim.Adam(model.parameters(), 3e-4)
for step in range(10):
    source, target = (
        torch.randint(1, 7000, (8, 256)).cuda(),
        torch.randint(1, 7000, (8, 256)).cuda(),
    )
    loss = model(source, target, mask=torch.ones_like(source).bool())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
