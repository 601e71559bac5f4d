"""The data that a run trains and evaluates on: sources, opened, held out and mixed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Dataset

from ds_cmli.commands import noun
from ds_cmli.config.messages import check
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.held_out import AllBut, held_out_parts
from ds_cmli.data.images import View
from ds_cmli.data.opening import open_source, split_weights
from ds_cmli.data.order import FullOrder, Order, WindowedOrder
from ds_cmli.data.pairs import Collate, EvalPairs, Images, Share, TrainPairs
from ds_cmli.data.scenes import EVAL_SCENES, EVAL_SEED, TRAIN_SCENES, DemoPictures, Scenes
from ds_cmli.data.sources import MAX_FULL, Source, is_large, shard_sizes
from ds_cmli.data.sources.remote import check_cache
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.errors import UserError, nearest

DEFAULT_WINDOW = 64  # shards
FEW_HELD_OUT = 100
# By split: "seen" and "unseen" for the demo, else "val", "test" or "all".
Evals = Mapping[str, EvalPairs | Scenes]


@dataclass
class Data:
    """The data that a run trains and evaluates on."""

    train: Dataset
    order: Order  # decides which samples of `train` an epoch takes
    evals: Evals
    tokenizer: CaptionTokenizer
    summary: list[str]  # lines to print: what was read
    # Identifies the data, as JSON; must be equal when a run resumes.
    fingerprint: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def __post_init__(self):
        self.collate = Collate(self.tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.pad_id = self.tokenizer.pad_id


def build_data(config: DataConfig, seed: int) -> Data:
    """Open all data that `config` describes. Raises `UserError` for what cannot be trained on."""
    if config.source == "demo":
        for name in ("val_source", "image_root", "image_key", "caption_key", "caption_weights"):
            value = getattr(config, name)
            check(not value, f"data.{name}", value, "the demo has none, leave it out")
        return _demo(config, seed)
    names, weights = split_weights(config.source)
    opened = {name: open_source(name, config) for name in names}
    for name, (_, parts) in opened.items():
        if config.caption_weights and "train" in parts:
            check_columns(name, parts["train"], config.caption_weights)
    held_out = held_out_parts(opened, config)
    train: dict[str, Share] = {}
    fingerprint: dict[str, dict[str, object]] = {}
    summary: list[str] = []
    shares: Sequence[float | None] = weights or [None] * len(names)
    for (name, (kind, parts)), weight in zip(opened.items(), shares, strict=True):
        if "train" not in parts:
            raise UserError(f"data.source is {name!r}, which has no training part")
        source = parts["train"]
        check_left_out(name, source, config.max_bad_share)
        indices: Sequence[int] = range(len(source))
        held_out_source, held_out_indices = held_out.get(name, (None, ()))
        if held_out_source is source:
            indices = AllBut(len(source), np.asarray(held_out_indices))
        train[name] = source, indices
        weight_text = f", {weight:g} of the mixture" if weight else ""
        summary.append(f"data: {name}: {kind}, {_describe(train[name])} to train on{weight_text}")
        fingerprint[name] = {**source.fingerprint(), "images": len(indices), "weight": weight}
        if is_large(source):
            fingerprint[name]["held_out"] = "from few shards"
    for name, (source, _) in held_out.items():
        # The validation data counts too, because the best step is decided by it.
        if not any(source is train_source for train_source, _ in train.values()):
            first_name, *_ = names
            owner = name if name in fingerprint else first_name
            fingerprint[owner]["validation"] = source.fingerprint()
    summary += [f"held out: {_describe(share)} of {name}" for name, share in held_out.items()]
    num_held_out = sum(len(indices) for _, indices in held_out.values())
    if num_held_out < FEW_HELD_OUT:
        pictures = "1 picture is" if num_held_out == 1 else f"{num_held_out} pictures are"
        summary.append(
            f"only {pictures} held out: recalls of fewer than {FEW_HELD_OUT} are mostly chance "
            "(data.held_out, data.val_source)"
        )
    tokenizer = tokenizer_of(config)
    pairs = TrainPairs(Images(train), tokenizer, config, seed)
    for start in pairs.images.starts[:-1]:
        pairs[start]  # a folder without its images is an error here, not in a loading process
    order, order_line = choose_order(pairs.images, weights, config.shuffle_window)
    summary.append(order_line)
    check_cache([source for source, _ in train.values()], order, config.cache_gb)
    evals = {"val": EvalPairs(Images(held_out), config)}
    return Data(pairs, order, evals, tokenizer, summary, fingerprint)


def check_left_out(name: str, source: Source, max_share: float) -> None:
    """Raise `UserError` if more than a share of a source's images have no caption."""
    left_out = getattr(source, "left_out", 0)
    num_images = left_out + len(source)
    if left_out > max_share * num_images:
        problem = f"{left_out} of the {num_images} images of {name} have no caption"
        raise UserError(f"{problem}, more than data.max_bad_share = {max_share}")


def check_columns(name: str, source: Source, weights: Mapping[str, float]) -> None:
    """Raise `UserError` if captions of a training source have no columns, or lack one of them.

    Of tars, which may be many, only the samples of the first shard are read.
    """
    images = Images({name: (source, range(len(source)))})
    num_read = int(shard_sizes(source)[0]) if hasattr(source, "shard_sizes") else len(source)
    missing = set(weights)
    for index in range(num_read):
        try:
            missing -= {column for column, _ in images.captions(index)}
        except UserError:
            raise
        except Exception:  # a bad sample, for which another one stands in
            continue
        if not missing:
            return
    columns = " and ".join(sorted(missing))
    need = "name columns of a table, or keys of the .json in tars"
    if known := {*getattr(source, "columns", ())} - missing - {""}:
        need = nearest(min(missing), known)
    raise UserError(f"data.caption_weights has {columns}, and {name} no such captions: {need}")


def choose_order(
    images: Images, weights: list[float] | None, window: int | None
) -> tuple[Order, str]:
    """Return the order of the training set by `data.shuffle_window`, and a line about it."""
    if window is None:
        sharded = [share for share in images.sources if hasattr(share[0], "shard_sizes")]
        num_images = sum(len(indices) for _, indices in sharded)
        is_remote = any(getattr(source, "is_remote", False) for source, _ in sharded)
        window = DEFAULT_WINDOW if is_remote or num_images > MAX_FULL else 0
    if not window:
        lengths = [len(indices) for _, indices in images.sources]
        return FullOrder(lengths, weights), "order: all samples are shuffled together"
    sizes = []
    for source, indices in images.sources:
        shard_lengths = shard_sizes(source)
        if isinstance(indices, AllBut):
            shards = np.searchsorted(np.cumsum(shard_lengths), indices.left_out, side="right")
            shard_lengths = shard_lengths - np.bincount(shards, minlength=len(shard_lengths))
        sizes.append(shard_lengths)
    order = WindowedOrder(sizes, window, weights, images.prefetch)
    num_shards = sum(map(len, sizes))
    part = f"{min(order.window, num_shards)} of {num_shards:,} shards at a time"
    return order, f"order: the samples of {part} are shuffled together (data.shuffle_window)"


def build_eval_data(config: DataConfig, seed: int, split: str | None) -> tuple[Evals, list[str]]:
    """Open the data that an evaluation reads; return it by split, and lines to print.

    Args:
        split: "val" or "test" for that part of `data.source`, "all" for every part (also those that
            training uses); None for what training itself evaluates.
    """
    if config.source == "demo":
        if split is not None:
            raise UserError(f"--split is {split!r}: the demo has its own two, leave it out")
        demo = _demo(config, seed)
        return demo.evals, demo.summary
    names: list[str] = []
    if split == "all" or not config.val_source:
        names, _ = split_weights(config.source)
    opened = {name: open_source(name, config) for name in names}
    shares: dict[str, Share] = {}
    if split == "all":
        for name, (_, parts) in opened.items():
            for part, source in parts.items():
                shares[f"{name} ({part})"] = source, range(len(source))
    else:
        shares = held_out_parts(opened, config, "test" if split == "test" else "validation")
    summary = [f"data: {name}: {_describe(share)} to evaluate on" for name, share in shares.items()]
    return {split or "val": EvalPairs(Images(shares), config)}, summary


def _describe(share: Share) -> str:
    source, indices = share
    left_out = getattr(source, "left_out", 0)
    number = f"{len(indices):,} {noun(len(indices), 'image')}"
    return f"{number} ({left_out:,} left out)" if left_out else number


def _demo(config: DataConfig, seed: int) -> Data:
    # Before the tokenizer, because it is the smaller download if downloads fail.
    pictures = DemoPictures(config.image_size)
    tokenizer = tokenizer_of(config)
    common = pictures, tokenizer, config.scenes
    train = Scenes("train", seed, TRAIN_SCENES, *common, View.of(config, seed))
    eval_arguments = EVAL_SEED, EVAL_SCENES, *common, View.of(config)
    evals = {split: Scenes(split, *eval_arguments) for split in ("seen", "unseen")}
    summary = [f"data: demo: {TRAIN_SCENES:,} scenes to train on, {2 * EVAL_SCENES} held out"]
    return Data(train, FullOrder([TRAIN_SCENES]), evals, tokenizer, summary)
