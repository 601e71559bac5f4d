"""A transformer of PyTorch's own layers on spectra, with masks of padding, in bf16: torch 2.13.0."""

import torch
from torch import nn

layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.1, batch_first=True, norm_first=True)
model = nn.ModuleList(
    [nn.Conv1d(80, 256, 3, 2, 1), nn.TransformerEncoder(layer, 6), nn.Linear(256, 500)]
).cuda()
optimizer = torch.optim.Adamax(model.parameters(), 1e-3)
criterion = nn.CTCLoss(zero_infinity=True)
for step in range(10):
    spectra, lengths = torch.rand(8, 80, 800).cuda(), torch.randint(200, 400, (8,))
    padding = torch.arange(400)[None] >= lengths[:, None]
    with torch.autocast("cuda", torch.bfloat16):
        x = model[0](spectra).transpose(1, 2)
        x = model[2](model[1](x, src_key_padding_mask=padding.cuda()))
    scores = x.float().log_softmax(-1).transpose(0, 1)
    loss = criterion(scores, torch.randint(1, 500, (8, 30)).cuda(), lengths, torch.full((8,), 30))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item())
