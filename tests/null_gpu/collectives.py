"""Prints as JSON, on each of two ranks, what arrives of messages over NCCL."""

import json
import os

import torch
import torch.distributed as dist


def main() -> None:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    gathered: list = [None, None]
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * (10 + 3000 * rank)})
    broadcast = [None] * 3 if rank else ["a", 5, "b" * 100]
    dist.broadcast_object_list(broadcast, 0)
    summed = torch.full((5,), rank + 1, device=device, dtype=torch.half)
    dist.all_reduce(summed)
    part = torch.empty(2, device=device, dtype=torch.bfloat16)
    dist.reduce_scatter_tensor(part, torch.tensor([1, 2, 3, 4 + 2.0 * rank]).cuda().bfloat16(), op=dist.ReduceOp.AVG)
    exchanged = torch.empty(3, device=device, dtype=torch.long)
    mine = torch.full((3,), rank, device=device)
    both = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, exchanged, 1 - rank)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    group = dist.new_group([1, 0])  # split off the first communicator
    dist.barrier(group)
    by_name = {
        "gathered": [len(item["text"]) for item in gathered],
        "broadcast": broadcast,
        "summed": summed.tolist(),
        "part": part.tolist(),
        "exchanged": exchanged.tolist(),
    }
    print(json.dumps(by_name))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
