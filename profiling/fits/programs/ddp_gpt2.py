"""GPT-2 by DistributedDataParallel, one of two ranks, in bf16: torch 2.13.0, transformers 5.24.0."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

dist.init_process_group("nccl")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
torch.manual_seed(0)
data = torch.randint(50_257, (64, 512))
loader = DataLoader(data, 4, sampler=DistributedSampler(data), pin_memory=True)
model = DistributedDataParallel(
    GPT2LMHeadModel(GPT2Config(n_layer=6)).to(device), device_ids=[device.index]
)
optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
for tokens in loader:
    tokens = tokens.to(device, non_blocking=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss.detach(), op=dist.ReduceOp.AVG)
    if dist.get_rank() == 0:
        print(loss.item())
dist.destroy_process_group()
