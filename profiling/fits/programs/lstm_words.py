"""A language model of LSTM layers on packed sequences: torch 2.13.0."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.lstm = (
            nn.Embedding(10_000, 400),
            nn.LSTM(400, 600, 2, batch_first=True, dropout=0.2),
        )
        self.head = nn.Linear(600, 10_000)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(
            self.words(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


torch.manual_seed(0)  # the lengths below, and so the memory
model = Model().cuda()
optimizer = torch.optim.RMSprop(model.parameters())
for step in range(10):
    tokens, lengths = torch.randint(1, 10_000, (20, 71)), torch.randint(30, 70, (20,))
    lengths[0] = 70
    scores = model(tokens[:, :70].cuda(), lengths)
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten().cuda())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()
    print(step, loss.exp().item())
