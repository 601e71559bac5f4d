"""Image-text pairs: the demo's scenes or a folder, tokenised, batched, in a resumable order.

B pairs, M text positions (padded), S image size in pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Bad, BadSamples
from ds_cmli.data.batch import Batch, Collate, Sample
from ds_cmli.data.folder import Rows, load_folder
from ds_cmli.data.pairs import FolderPairs
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.data.scenes import EVAL_SCENES, EVAL_SEED, TRAIN_SCENES, Pictures, Scenes
from ds_cmli.data.tokens import CaptionTokenizer, load_tokenizer

__all__ = ["BadSamples", "Batch", "Data", "GlobalBatchSampler", "Sample", "build_data", "eval_loader", "train_loader"]


CAPTIONS_LOOKED_AT = 5000  # of each part, for tokens unknown to the tokenizer: half a second


@dataclass
class Data:
    """What a run trains and evaluates on. Datasets are map-style and give `Sample`s."""

    train: Dataset
    evals: dict[str, Dataset]  # "seen" and "unseen" of the demo, "val" of a folder
    tokenizer: CaptionTokenizer
    collate: Collate
    bad: list[Bad]  # left out at load, to be reported
    has_places: bool  # tokens and patches of known pictures: the pointing-game accuracy can be measured
    notices: list[str] = field(default_factory=list)  # what the user should know before the run, a line each

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id


def build_data(config: DataConfig, seed: int) -> Data:
    """Everything `config` describes; demo assets it needs are fetched at first use.

    Raises:
        UserError: what `load_tokenizer`, `load_folder`, `FolderPairs` and `Pictures` say, or more than `max_bad_share`
            empty captions.
    """
    size = config.image_size
    if config.source == "demo":
        pictures = Pictures(size)  # before the tokenizer: the smaller download, and the first to fail
        tokenizer = load_tokenizer(config.tokenizer, config.context_length)
        evals: dict[str, Dataset] = {
            split: Scenes(split, EVAL_SEED, EVAL_SCENES, pictures, tokenizer, size) for split in ("seen", "unseen")
        }
        scenes = Scenes("train", seed, TRAIN_SCENES, pictures, tokenizer, size)
        return Data(scenes, evals, tokenizer, Collate(tokenizer), bad=[], has_places=True)
    train_rows, validation_rows = load_folder(config.source, config.follow_symlinks)
    for rows in (train_rows, validation_rows):
        bad = BadSamples(config.max_bad_share, len(rows.files), rows.bad)
        if bad.too_many(0, 0):
            raise UserError(bad.message(0))
    tokenizer = load_tokenizer(config.tokenizer, config.context_length)
    train, validation = FolderPairs(train_rows, tokenizer, config), FolderPairs(validation_rows, tokenizer, config)
    for pairs in (train, validation):
        pairs[0]  # a folder without its images fails here: torch takes 5 s a loading process to end after an error
    return Data(
        train=train,
        evals={"val": validation},
        tokenizer=tokenizer,
        collate=Collate(tokenizer),
        bad=train_rows.bad + validation_rows.bad,
        has_places=False,
        notices=[*train_rows.notices, *_unknown([train_rows, validation_rows], tokenizer, config.tokenizer)],
    )


def _unknown(parts: list[Rows], tokenizer: CaptionTokenizer, name: str) -> list[str]:
    """A line on captions that are no language of the tokenizer, where there are any; of large sets a sample is read."""
    looked_at, found = 0, []
    for rows in parts:
        some = range(0, len(rows.texts), max(1, len(rows.texts) // CAPTIONS_LOOKED_AT))
        looked_at += len(some)
        found += [rows.files[i] for i in some if tokenizer.mostly_unknown(rows.texts[i])]
    if not found:
        return []
    return [
        f"{len(found)} of {looked_at} captions looked at are mostly tokens that data.tokenizer = {name!r} does "
        f"not know, the first of {found[0]}: give a tokenizer of their language"
    ]


class _Loader(DataLoader):
    """A `DataLoader` whose loading processes hand on a `UserError` as the one line it is."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None


def train_loader(
    data: Data, sampler: GlobalBatchSampler, workers: int, worker_init: Callable[[int], None] | None = None
) -> DataLoader:
    """Endless `Batch`es of this rank, from the position the sampler has consumed on."""
    return _loader(
        data.train,
        data.collate,
        workers,
        batch_sampler=sampler,
        seed=sampler.seed,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,
    )


def eval_loader(dataset: Dataset, data: Data, batch_size: int, workers: int, rank: int, world: int) -> DataLoader:
    """The `Batch`es of this rank: samples rank, rank + world, ...; `Batch.index` tells which they are."""
    mine = range(rank, len(dataset), world)  # type: ignore[arg-type]
    return _loader(dataset, data.collate, workers, sampler=mine, batch_size=batch_size, seed=0)


def batches(
    dataset: Dataset, batch_size: int, workers: int, collate: Callable, worker_init: Callable[[int], None] | None = None
) -> DataLoader:
    """A data set once, in its order."""
    workers = min(workers, -(-len(dataset) // batch_size))  # type: ignore[arg-type]
    return _loader(dataset, collate, workers, seed=0, batch_size=batch_size, worker_init_fn=worker_init)


def _loader(dataset: Dataset, collate: Callable, workers: int, seed: int, **batching) -> DataLoader:
    return _Loader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Its own: the loader would otherwise draw its workers' seeds from the generator that the model's dropout uses.
        generator=torch.Generator().manual_seed(seed),
        **batching,
    )
