"""Held-out images of a large source: from few shards, the same on every start, and no array of all the others."""

import numpy as np

from ds_cmli.data.build import choose_order
from ds_cmli.data.held_out import AllBut, from_few_shards, hold_out
from ds_cmli.data.pairs import Images
from ds_cmli.data.sources import is_large, shard_sizes


class InShards:
    def __init__(self, sizes, is_remote=True):
        self.shard_sizes = np.asarray(sizes)
        self.is_remote = is_remote

    def __len__(self):
        return int(self.shard_sizes.sum())


def test_few_shards_have_what_is_held_out_of_many():
    sizes = np.full(10_000, 9_000)
    held_out = hold_out("bucket", InShards(sizes), None)
    assert len(set(held_out.tolist())) == 1000 and (np.diff(held_out) > 0).all()
    assert len(set((held_out // 9_000).tolist())) == 16
    assert hold_out("bucket", InShards(sizes), 1000).tolist() == held_out.tolist()  # no start has others
    assert len(set((from_few_shards(np.full(50, 10), 200) // 10).tolist())) == 40  # 16 shards have only 160


def test_held_out_images_are_in_no_order_and_all_others_in_each():
    source = InShards([3, 40, 25, 2, 30])
    held_out = hold_out("bucket", source, 12)
    images = Images({"bucket": (source, AllBut(len(source), held_out))})
    order, line = choose_order(images, None, 2)
    assert line == "order: the samples of 2 of 5 shards at a time are shuffled together (data.shuffle_window)"
    indices = [images.locate(int(index)) for index in order.samples(np.arange(88), 0, 0).indices]
    assert sorted({place for _, place in indices} | set(held_out.tolist())) == list(range(100))
    shards = np.searchsorted(np.cumsum(shard_sizes(source)), [place for _, place in indices], side="right")
    assert max(len(set(shards[start : start + 2])) for start in range(0, 88, 2)) <= 2


def test_the_split_and_the_order_by_the_size_and_place_of_the_data():
    def order(source, window=None):
        images = Images({"source": (source, range(len(source)))})
        return choose_order(images, None, window)[0].window

    assert hold_out("array", range(40), 5).tolist() == [2, 4, 6, 32, 33], "without names, the split is by the index"
    local = hold_out("tars", InShards([500] * 40, is_remote=False), 100)  # the split of small local tars stays
    assert local[:5].tolist() == [254, 366, 410, 503, 821]
    sizes = 10_000_000, 10_000_001  # of all images together
    assert [is_large(InShards([size], is_remote=False)) for size in sizes] == [False, True]
    assert order(InShards([10] * 100)) == 64
    assert order(InShards([10] * 100, is_remote=False)) == 0
    assert order(InShards([10_000] * 1001, is_remote=False)) == 64
    assert order(InShards([10_000] * 1001, is_remote=False), 500) == 500
