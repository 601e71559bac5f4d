"""Messages between the ranks of a real gloo group, and mistakes that all ranks raise together."""

import pytest
import torch

from ds_cmli.common import UserError
from ds_cmli.distributed import process_group as distributed
from tests.ranks import run


def messages(rank, world_size):
    refused = []
    for mistakes in ([None, "no such file"], ["no such key", "no such key"]):
        with pytest.raises(UserError) as error, distributed.raised_together():
            if mistakes[rank]:
                raise UserError(mistakes[rank])
        refused.append(str(error.value))
    with pytest.raises(KeyError if rank else UserError), distributed.raised_together():
        if rank:
            raise KeyError("unexpected")
    with distributed.raised_together():
        pass
    return {
        "objects": distributed.gather_objects({"rank": rank}),
        "broadcast": distributed.broadcast_object(f"from rank {rank}", source=1),
        "mean": distributed.mean_over_ranks(torch.tensor([1.0 + rank, 4.0])).tolist(),
        "sum": distributed.sum_over_ranks(torch.tensor([1.0 + rank, 4.0])).tolist(),
        "refused": refused,
    }


def test_messages_between_ranks():
    for entry in run(messages, 2):
        assert entry == {
            "objects": [{"rank": 0}, {"rank": 1}],
            "broadcast": "from rank 1",
            "mean": [1.5, 4.0],
            "sum": [3.0, 8.0],
            "refused": ["rank 1: no such file", "no such key"],
        }
