"""Batches of molecules' graphs with pooling: torch_geometric 2.8.1."""

import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, global_add_pool

graphs = [
    Data(x=torch.randn(30, 16), edge_index=torch.randint(30, (2, 64)), y=torch.randint(2, (1,)))
    for _ in range(512)
]
model = GIN(16, 256, 5, 2).cuda()
optimizer = torch.optim.Adam(model.parameters(), 0.01)
for batch in DataLoader(graphs, 64, shuffle=True):
    batch = batch.to("cuda")
    out = global_add_pool(model(batch.x, batch.edge_index), batch.batch)
    loss = torch.nn.functional.cross_entropy(out, batch.y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(float(loss) * batch.num_graphs)
