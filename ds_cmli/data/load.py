"""Image-text pairs, tokenised and batched in a resumable order, from the demo's scenes or the kinds of `sources`.

B pairs, M text positions (padded), S image size in pixels.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Bad, BadSamples
from ds_cmli.data.batch import Collate
from ds_cmli.data.opening import (
    OF_SOURCES,
    oddities,
    open_all,
    open_evaluated,
    open_sources,
    source_line,
)
from ds_cmli.data.pairs import EvalPairs, TrainPairs, of_sources
from ds_cmli.data.sampler import Mixture
from ds_cmli.data.scenes import EVAL_SCENES, EVAL_SEED, TRAIN_SCENES, Pictures, Scenes
from ds_cmli.data.tokens import CaptionTokenizer, SpecialTokens, load_tokenizer


@dataclass(kw_only=True)
class EvalData:
    """The data that a model is evaluated on. Its data sets are map-style and return `Sample`s."""

    evals: dict[
        str, Dataset
    ]  # by split: "seen" and "unseen" for the demo, else "val", "test" or "all"
    tokenizer: CaptionTokenizer
    collate: Collate
    has_places: bool = (
        False  # whether each token's place in the image is known, as the pointing game needs
    )
    summary: list[str] = field(
        default_factory=list
    )  # a line for each source, to print before the run
    notices: list[str] = field(default_factory=list)  # further lines to print before the run

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def special(self) -> SpecialTokens:
        return self.tokenizer.special


@dataclass(kw_only=True)
class Data(EvalData):
    """The data that a run trains and evaluates on."""

    train: Dataset
    mixture: Mixture  # decides which samples of `train` an epoch takes
    bad: list[Bad]  # samples that were left out at load and are to be reported
    fingerprint: dict[str, Any] = field(
        default_factory=dict
    )  # identifies the data; must be equal when a run resumes


def build_eval_data(config: DataConfig, seed: int, split: str | None) -> EvalData:
    """Build the data that an evaluation reads from `data.source`.

    Args:
        split: "val" or "test" for that part, "all" for every part (also what training uses); None: the split that
            training itself evaluates.

    Raises:
        UserError: as `build_data`, or `split` is given for the demo.
    """
    if config.source == "demo":
        if split is not None:
            raise UserError(f"--split is {split!r}: the demo has its own two, leave it out")
        return build_data(config, seed)
    if split in ("val", "test"):
        config = replace(config, val_split="test" if split == "test" else "validation")
    sources, notices = open_all(config) if split == "all" else open_evaluated(config)
    tokenizer = load_tokenizer(config.tokenizer, config.context_length)
    name = split or ("test" if config.val_split == "test" else "val")
    return EvalData(
        evals={name: EvalPairs(sources, tokenizer, config)},
        tokenizer=tokenizer,
        collate=Collate(tokenizer),
        summary=[source_line(source.where, [("to evaluate on", source)]) for source in sources],
        notices=[*notices, *oddities(sources, tokenizer, config.tokenizer)],
    )


def build_data(config: DataConfig, seed: int) -> Data:
    """Build all data that `config` describes; demo assets that it needs are fetched at first use.

    Raises:
        UserError: an error of `load_tokenizer`, of a source, of its data set or of `Pictures`; or the share of samples
            that are left out at load exceeds `max_bad_share`.
    """
    size = config.image_size
    if config.source == "demo":
        unused = [name for name in ("val_source", *OF_SOURCES) if getattr(config, name)]
        unused += ["val_split"] if config.val_split == "test" else []
        if unused:
            raise UserError(
                f"data.{unused[0]} is {getattr(config, unused[0])!r}: it says nothing of the demo, leave it out"
            )
        pictures = Pictures(
            size
        )  # before the tokenizer, because it is the smaller download if downloads fail
        tokenizer = load_tokenizer(config.tokenizer, config.context_length)
        evals: dict[str, Dataset] = {
            split: Scenes(split, EVAL_SEED, EVAL_SCENES, pictures, tokenizer, size)
            for split in ("seen", "unseen")
        }
        scenes = Scenes("train", seed, TRAIN_SCENES, pictures, tokenizer, size, config.augmentation)
        mixture = Mixture([len(scenes)])
        return Data(
            train=scenes,
            mixture=mixture,
            evals=evals,
            tokenizer=tokenizer,
            collate=Collate(tokenizer),
            bad=[],
            has_places=True,
            summary=[
                f"data: demo: {TRAIN_SCENES:,} scenes to train on, {2 * EVAL_SCENES} held out"
            ],
        )
    opened = open_sources(config)
    for part in (opened.train, opened.validation):
        left_out = of_sources(part)
        bad = BadSamples(config.max_bad_share, sum(map(len, part)), left_out)
        if bad.too_many(0, 0):
            raise UserError(bad.message(0))
    tokenizer = load_tokenizer(config.tokenizer, config.context_length)
    everything = [*opened.train, *opened.validation]
    train = TrainPairs(opened.train, tokenizer, config, seed)
    validation = EvalPairs(opened.validation, tokenizer, config)
    # Read the first pair of each source, so that missing images are an error here: after an error in a loading process
    # torch takes 5 s per process to end.
    for start in [0, *train.pictures.ends[:-1]]:
        train[start]
    TrainPairs(opened.validation, tokenizer, config, seed)[0]
    return Data(
        train=train,
        mixture=opened.mixture,
        evals={"test" if config.val_split == "test" else "val": validation},
        tokenizer=tokenizer,
        collate=Collate(tokenizer),
        bad=[*of_sources(opened.train), *of_sources(opened.validation)],
        summary=opened.summary,
        notices=[*opened.notices, *oddities(everything, tokenizer, config.tokenizer)],
        fingerprint=opened.fingerprint,
    )
