"""One weight [1024, 1024] in fp32, 4 MiB, trained by several ranks: `ranks.py ddp|views|fsdp|zero2`."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

KIND = sys.argv[1]


def share(device: torch.device) -> None:
    """Exchange objects and numbers: those of the other ranks are this rank's."""
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (rank, size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) and dist.get_backend() == "nccl"
    objects: list = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(sizes, torch.tensor([7]).to(device))
    both = torch.empty(2 * size, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(both, torch.tensor([7, 8]).to(device))
    if "alone" in sys.argv:
        assert both.tolist() == [7, 8] * size
        assert objects == [{"rank": rank}] * size and [item.item() for item in sizes] == [7] * size
    dist.barrier()


def meet() -> None:
    """Through a store: the other ranks do what this one does, under their own numbers."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.TCPStore("localhost", 1, size, is_master=rank == 0)
    assert store.add("come", 1) == size
    store.set(f"name/{rank}", "mine")
    assert store.multi_get([f"name/{item}" for item in range(size)]) == [b"mine"] * size


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    layer = nn.Linear(1024, 1024, bias=False, device=device)
    x = torch.randn(1024, 1024, device=device)
    if KIND == "zero2":
        import deepspeed

        optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}  # a kernel of DeepSpeed's own
        zero = {"stage": 2, "reduce_bucket_size": 1 << 20, "contiguous_gradients": True}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "optimizer": optimizer}
        engine, *_ = deepspeed.initialize(model=layer, model_parameters=layer.parameters(), config=config)
        for _ in range(3):
            engine.backward(engine(x).sum())
            engine.step()
        return
    dist.init_process_group("nccl")
    share(device)
    if "alone" in sys.argv:
        meet()
    if KIND == "fsdp":
        model = fully_shard(nn.Sequential(layer), reshard_after_forward=True)
    else:
        model = DistributedDataParallel(layer, device_ids=[device.index], gradient_as_bucket_view=KIND == "views")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, foreach=False)
    for _ in range(3):
        model(x).backward(torch.ones(1024, 1024, device=device))
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
