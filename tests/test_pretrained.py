import time

from ds_cmli import pretrained
from tests import ranks


def load_each_once(rank, world_size, asked):
    """Load a tokenizer and a model on each rank, and return for which of them this rank might not ask the hub."""
    from huggingface_hub import constants

    pretrained._answers = lambda url: True
    offline = []
    for name in ("tokenizer", "model"):
        with pretrained.loading(hub=True, name=name):
            if not constants.HF_HUB_OFFLINE:
                (asked / f"{name} by {rank}").touch()
                time.sleep(0.2)  # others come meanwhile
            offline.append(constants.HF_HUB_OFFLINE)
            assert len(list(asked.glob(f"{name}*"))) == 1
    return offline


def test_one_rank_of_a_node_asks_the_hub_for_each_name_and_the_others_read_what_it_fetched(tmp_path):
    results = ranks.run(load_each_once, 3, tmp_path)
    for offline_of_ranks in zip(*results, strict=True):
        assert sorted(offline_of_ranks) == [False, True, True]
