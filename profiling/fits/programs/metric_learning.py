"""Triplets that a miner chooses by their distances: pytorch-metric-learning 2.9.0."""

import torch
from pytorch_metric_learning import losses, miners

model = torch.nn.Sequential(
    torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 64)
).cuda()
miner, criterion = miners.MultiSimilarityMiner(), losses.TripletMarginLoss()
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for step in range(10):
    labels = torch.randint(10, (64,)).cuda()
    features = model(torch.rand(64, 784).cuda())
    loss = criterion(features, labels, miner(features, labels))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item(), miner.num_pos_pairs)
