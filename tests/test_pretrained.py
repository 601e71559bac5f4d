import time
from contextlib import nullcontext

import pytest
from huggingface_hub import constants

from ds_cmli import pretrained
from ds_cmli.config.source import ModelSource
from ds_cmli.errors import UserError
from ds_cmli.models.dual import load_transformers
from tests import ranks


def load_each_once(rank, world_size, folder):
    """Load a tokenizer and a model on each rank, and return for which of them this rank might not ask the hub."""
    pretrained._answers = lambda url: True
    offline = []
    for name in ("tokenizer", "model"):
        with pretrained.loading(hub=True, name=name):
            if not constants.HF_HUB_OFFLINE:
                (folder / f"{name} by {rank}").touch()
                time.sleep(0.2)  # others come meanwhile
            offline.append(constants.HF_HUB_OFFLINE)
            assert len(list(folder.glob(f"{name}*"))) == 1
    return offline


def test_one_rank_of_a_node_asks_the_hub_for_each_name_and_the_others_read_what_it_fetched(tmp_path):
    results = ranks.run(load_each_once, 3, tmp_path)
    for offline_of_ranks in zip(*results, strict=True):
        assert sorted(offline_of_ranks) == [False, True, True]


def test_the_json_and_the_weights_of_a_source_are_fetched_apart(monkeypatch):
    names = []
    # With what another rank has fetched, this one asks no hub.
    monkeypatch.setattr(pretrained, "fetched_on_this_node", lambda name: names.append(name) or nullcontext(True))
    source = ModelSource("no-such-owner/model")
    for fetch in (lambda: source.json_folder, lambda: load_transformers(source)):
        with pytest.raises(UserError):
            fetch()
    assert len(set(names)) == 2
