import time

from ds_cmli import pretrained
from tests import ranks


def load_once(rank, world_size, asked, name):
    """Load what each rank needs, and return whether this one might ask the hub."""
    from huggingface_hub import constants

    pretrained._answers = lambda url: True
    with pretrained.loading(hub=True, name=name):
        if not constants.HF_HUB_OFFLINE:
            (asked / str(rank)).touch()
            time.sleep(0.2)  # others come meanwhile
        return constants.HF_HUB_OFFLINE, len(list(asked.iterdir()))


def test_one_rank_of_a_node_asks_the_hub_and_the_others_read_what_it_fetched(tmp_path):
    results = ranks.run(load_once, 3, tmp_path, str(tmp_path))
    assert sorted(offline for offline, _ in results) == [False, True, True]
    assert all(num_asked == 1 for _, num_asked in results)
