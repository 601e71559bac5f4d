"""Wav2Vec2 with the CTC loss, its usual loop: transformers 5.24.0."""

import torch
from torch.utils.data import DataLoader
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, get_linear_schedule_with_warmup

config = Wav2Vec2Config(num_hidden_layers=4, layerdrop=0.0, ctc_loss_reduction="mean")
model = Wav2Vec2ForCTC(config).to("cuda")
model.freeze_feature_encoder()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
schedule = get_linear_schedule_with_warmup(optimizer, 10, 100)
data = [(torch.randn(48_000), torch.randint(1, 32, (40,))) for _ in range(32)]
model.train()
for waves, labels in DataLoader(data, 4, shuffle=True):
    loss = model(waves.to("cuda"), labels=labels.to("cuda")).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(loss.item())
