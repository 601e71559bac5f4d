"""Which images are held out of training: a source's own part, or a share of it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.opening import Opened, open_source, split_weights
from ds_cmli.data.order import permutation
from ds_cmli.data.pairs import Share
from ds_cmli.data.sources import Source, is_large, shard_sizes
from ds_cmli.data.sources.lists import ListedImages
from ds_cmli.errors import UserError

HELD_OUT_SHARE = 0.05
MAX_HELD_OUT = 1000
HELD_OUT_SHARDS = 16  # of a large source


def held_out_parts(
    opened: dict[str, Opened], config: DataConfig, split: str = "validation"
) -> dict[str, Share]:
    """Return the evaluated images: `val_source`, or of each source its own part or a share."""
    if config.val_source:
        _, parts = open_source(config.val_source, config)
        source = parts.get(split) or next(iter(parts.values()))
        return {config.val_source: (source, range(len(source)))}
    shares: dict[str, Share] = {}
    for name, (_, parts) in opened.items():
        if split in parts:
            shares[name] = parts[split], range(len(parts[split]))
        elif split == "test" or "train" not in parts:
            raise UserError(f"{name} has no {split} part, but {', '.join(parts)}")
        else:
            shares[name] = parts["train"], hold_out(name, parts["train"], config.held_out)
    return shares


def hold_out(name: str, source: Source, wanted: float | None) -> np.ndarray:
    """Return the images of a source that `data.held_out` wants: int64 [n], in their order.

    They have the lowest of pseudorandom numbers that are always the same. Those of a large source
    are from few of its shards, so that an evaluation does not fetch all of them.
    """
    count = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(source))))
    if wanted is not None:
        count = max(1, round(wanted if wanted >= 1 else wanted * len(source)))
    if count >= len(source):
        problem = f"data.held_out is {wanted}, and {name} has {len(source)} images with a caption"
        raise UserError(f"{problem}: that leaves none to train on, hold out less")
    if is_large(source):
        return from_few_shards(shard_sizes(source), count)
    if isinstance(source, ListedImages):
        # Hashes of names: neither the order nor the captions of a list change the split.
        names = (source.name(index).encode(errors="surrogatepass") for index in range(len(source)))
        digests = b"".join(hashlib.sha256(name).digest()[:8] for name in names)
        numbers = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
    else:  # SplitMix64
        x = np.arange(1, len(source) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers = x ^ (x >> np.uint64(31))
    return np.sort(np.argpartition(numbers, count - 1)[:count])


def from_few_shards(sizes: np.ndarray, count: int) -> np.ndarray:
    """Return `count` images, int64 in their order, of shards of the sizes [S].

    The shards are `HELD_OUT_SHARDS` random ones, always the same, or more if these have less than
    twice as many images.
    """
    order = permutation(len(sizes), 0).numpy()
    num_enough = int(np.searchsorted(np.cumsum(sizes[order]), 2 * count)) + 1
    chosen = order[: max(HELD_OUT_SHARDS, num_enough)]
    starts = np.cumsum(sizes) - sizes
    images = np.concatenate([starts[shard] + np.arange(sizes[shard]) for shard in chosen])
    return np.sort(images[permutation(len(images), 1).numpy()[:count]])


class AllBut(Sequence[int]):
    """The numbers below `length` without those of `left_out`, which are sorted."""

    def __init__(self, length: int, left_out: np.ndarray):
        self.length = length
        self.left_out = left_out
        self.num_before = left_out - np.arange(len(left_out))  # how many stay before each

    def __len__(self) -> int:
        return self.length - len(self.left_out)

    def __getitem__(self, index: Any) -> Any:  # an int or an array of them, no slice
        return index + np.searchsorted(self.num_before, index, side="right")


def evaluation_data(config: DataConfig, name: str) -> DataConfig:
    """Return a run's configuration to evaluate on `--data NAME`.

    If `name` is a training source: its held-out part. Otherwise: the validation part of that data,
    or all of it, without the settings of the run's own data.
    """
    train_names, _ = split_weights(config.source)
    path = _real_path(name)
    is_trained_on = path in map(_real_path, train_names)
    if config.val_source or not is_trained_on:
        # An empty name is not a path: it would be the present folder.
        is_validation = config.val_source and path == _real_path(config.val_source)
        if not is_trained_on and not is_validation:
            config = replace(
                config, image_root="", image_key="", caption_key="", caption_weights=None
            )
        config = replace(config, val_source="" if name == "demo" else name, held_out=None)
    if name == "demo":
        config = replace(config, resize="crop")  # its scenes are square
    return replace(config, source=name)


def _real_path(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))
