"""A graph attention network on one graph, and a mask of its nodes: torch_geometric 2.8.1."""

import torch
from torch_geometric.data import Data
from torch_geometric.nn import GAT

graph = Data(
    x=torch.randn(5000, 128),
    edge_index=torch.randint(5000, (2, 40_000)),
    y=torch.randint(7, (5000,)),
)
graph.train_mask = torch.rand(5000) < 0.5
graph = graph.to("cuda")
model = GAT(128, 64, 3, 7, heads=4, dropout=0.5).cuda()
optimizer = torch.optim.Adam(model.parameters(), 0.005, weight_decay=5e-4)
for step in range(10):
    model.train()
    optimizer.zero_grad()
    out = model(graph.x, graph.edge_index)
    loss = torch.nn.functional.cross_entropy(out[graph.train_mask], graph.y[graph.train_mask])
    loss.backward()
    optimizer.step()
    correct = (out.argmax(-1) == graph.y)[graph.train_mask].sum()
    print(step, float(loss), int(correct) / int(graph.train_mask.sum()))
