"""The data that a run trains and evaluates on, from the demo's scenes or the kinds of `sources`."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.config.validation import check
from ds_cmli.data.bad import Bad, BadSamples
from ds_cmli.data.batch import Collate
from ds_cmli.data.boxes import Boxes
from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.numbered import of_sources
from ds_cmli.data.opening import (
    open_all,
    open_sources,
    open_validation,
    settings_of_some,
    source_line,
)
from ds_cmli.data.pairs import EvalPairs, TrainPairs
from ds_cmli.data.sampler import Draw, Mixture
from ds_cmli.data.scenes import EVAL_SCENES, EVAL_SEED, TRAIN_SCENES, Scenes
from ds_cmli.data.sources.base import Source
from ds_cmli.data.tokens import (
    CaptionTokenizer,
    SpecialTokens,
    most_characters,
    tokenizer_of,
)

# About as many samples per source are checked for unknown tokens, in half a second.
LOOKED_AT = 5000
# Characters of a caption that is named as long, or `A_POSITION` for each position if that is more.
UNUSUAL = 1000
A_POSITION = 16


@dataclass(kw_only=True)
class EvalData:
    """The data that a model is evaluated on. Its data sets are map-style and return `Sample`s."""

    # By split: "seen" and "unseen" for the demo, else "val", "test" or "all".
    evals: dict[str, Dataset] = field(default_factory=dict)
    tokenizer: CaptionTokenizer
    has_places: bool = False  # whether each token's place is known, as the pointing game needs
    summary: list[str] = field(default_factory=list)  # a line for each source, before the run
    notices: list[str] = field(default_factory=list)  # further lines to print before the run

    def __post_init__(self):
        self.collate = Collate(self.tokenizer)

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
    text_length: Callable[[Draw], int]  # of a draw's caption in `train`, in bytes
    bad: list[Bad]  # samples that were left out at load and are to be reported
    # Identifies the data, as JSON; must be equal when a run resumes.
    fingerprint: dict[str, dict[str, object]] = field(default_factory=dict)


def build_eval_data(config: DataConfig, seed: int, split: str | None) -> EvalData:
    """Build the data that an evaluation reads from `data.source`.

    Args:
        split: "val" or "test" for that part, "all" for every part (also what training uses); None:
            the split that training itself evaluates.

    Raises:
        UserError: as `build_data`, or `split` is given for the demo.
    """
    if config.source == "demo":
        if split is not None:
            raise UserError(f"--split is {split!r}: the demo has its own two, leave it out")
        return _demo(config, seed)
    if split in ("val", "test"):
        config = replace(config, val_split="test" if split == "test" else "validation")
    purpose = "to evaluate on"
    if split == "all":
        sources, notices = open_all(config)
    else:  # what training evaluates on
        opened = open_validation(config)
        sources, notices = opened.validation, opened.of_files
        if opened.held_out:
            purpose = "held out of training to evaluate on"
    tokenizer = tokenizer_of(config)
    return EvalData(
        evals={split or _split(config): EvalPairs(sources, tokenizer, config)},
        tokenizer=tokenizer,
        summary=[source_line(source.where, [(purpose, source)]) for source in sources],
        notices=[*notices, *oddities(sources, tokenizer, config.tokenizer)],
    )


def build_data(config: DataConfig, seed: int) -> Data:
    """Build all data that `config` describes; assets of the demo are fetched at first use.

    Raises:
        UserError: an error of `load_tokenizer`, of a source, of its data set or of `DemoPictures`;
            or the share of samples that are left out at load exceeds `max_bad_share`.
    """
    if config.source == "demo":
        return _demo(config, seed)
    return _pairs(config, seed)


def _demo(config: DataConfig, seed: int) -> Data:
    need = "the demo's scenes are square: give 0, or --data"
    check(not config.aspect_patch, "data.aspect_patch", config.aspect_patch, need)
    silent = "val_source", "boxes", *settings_of_some()
    unused = [name for name in silent if getattr(config, name)]
    if config.val_split == "test":
        unused.append("val_split")
    if unused:
        raise UserError(
            f"data.{unused[0]} is {getattr(config, unused[0])!r}: it says nothing of the demo, "
            "leave it out"
        )
    # Before the tokenizer, because it is the smaller download if downloads fail.
    pictures = DemoPictures(config.image_size)
    tokenizer = tokenizer_of(config)
    make = partial(Scenes, pictures=pictures, tokenizer=tokenizer, captions=config.scenes)
    train = make("train", seed, TRAIN_SCENES, augmentation=config.augmentation)
    need = "a scene's names say the same in any order: give field, for another name in one's place"
    check(config.negatives != "swap", "data.negatives", config.negatives, need)
    train.texts_each, train.each_picture = config.captions, config.split_sentences
    train.wrong_each = config.texts - config.captions
    train.regions = config.regions
    evals: dict[str, Dataset] = {}
    for split in ("seen", "unseen"):
        evals[split] = make(split, EVAL_SEED, EVAL_SCENES)
    return Data(
        train=train,
        mixture=Mixture([len(train)]),
        text_length=train.text_length,
        evals=evals,
        tokenizer=tokenizer,
        bad=[],
        has_places=True,
        summary=[f"data: demo: {TRAIN_SCENES:,} scenes to train on, {2 * EVAL_SCENES} held out"],
    )


def _pairs(config: DataConfig, seed: int) -> Data:
    opened = open_sources(config)
    left_out: list[Bad] = []
    for part in (opened.train, opened.validation):
        bad = BadSamples(config.max_bad_share, sum(map(len, part)), of_sources(part))
        if bad.too_many(0, 0):
            raise UserError(bad.message(0))
        left_out += bad.at_load
    for source in opened.train:
        known = not config.group_by_length or source.caption_counts() is not None
        need = f"the captions of {source.where} are in .json, whose lengths only reading them tells"
        check(known, "data.group_by_length", config.group_by_length, f"{need}: leave it out")
    given = bool(config.boxes) or not config.regions
    need = f"data.regions is {config.regions}, and {config.source} has no boxes: name their file"
    check(given, "data.boxes", config.boxes, need)
    tokenizer = tokenizer_of(config)
    train = TrainPairs(opened.train, tokenizer, config, seed)
    validation = EvalPairs(opened.validation, tokenizer, config)
    # Read the first pair of each source, so that missing images are an error here: after an error
    # in a loading process torch takes 5 s per process to end.
    for start in train.pictures.starts[:-1]:
        train[start]
    TrainPairs(opened.validation, tokenizer, replace(config, regions=0), seed)[0]
    if train.boxes is not None:
        opened.fingerprint[config.boxes] = train.boxes.fingerprint
        opened.notices.append(boxes_line(train, train.boxes))
    everything = [*opened.train, *opened.validation]
    return Data(
        train=train,
        mixture=opened.mixture,
        text_length=train.text_length,
        evals={_split(config): validation},
        tokenizer=tokenizer,
        bad=left_out,
        summary=opened.summary,
        notices=[
            *opened.notices,
            *fewer_texts(train, config),
            *oddities(everything, tokenizer, config.tokenizer),
        ],
        fingerprint=opened.fingerprint,
    )


def fewer_texts(train: TrainPairs, config: DataConfig) -> list[str]:
    """Lines about sources of pictures with fewer captions, or wrong ones, than a step takes.

    Raises `UserError` if no picture has a second caption, or a wrong one.
    """
    lines: list[str] = []
    if config.captions > 1:
        kind = "sentence" if config.split_sentences else "caption"
        what = f"{kind}s than data.captions = {config.captions}: theirs are repeated"
        most, lines = _fewer(train, config.captions, what, train.texts)
        need = f"no picture has more than one {kind}: give 1, or data that has several"
        check(most > 1, "data.captions", config.captions, need)
    if config.negatives:
        count = config.negatives_count
        what = f"wrong captions than data.negatives_count = {count}: they are compared with those"
        most, of_wrong = _fewer(train, count, what, train.wrong_texts)
        need = "no picture has a list 'negatives' of wrong captions: add one, or give swap"
        if config.negatives == "swap":
            need = "no caption has two words that could be exchanged: leave it out"
        check(most > 0, "data.negatives", config.negatives, need)
        lines += of_wrong
    return lines


def _fewer(
    train: TrainPairs, wanted: int, what: str, texts: Callable[[int], list[str]]
) -> tuple[int, list[str]]:
    """The most texts that a picture has, and a line for each source in which some have too few.

    Only some pictures of large sources are read.
    """
    most, lines = 0, []
    for source, first in zip(train.pictures.sources, train.pictures.starts, strict=False):
        counts = []
        for index in range(first, first + len(source), max(1, len(source) // LOOKED_AT)):
            with suppress(Exception):  # reported when it is used
                counts.append(len(texts(index)))
        few, most = sum(count < wanted for count in counts), max([most, *counts])
        if few:
            lines.append(
                f"{few} of {len(counts)} pictures of {source.where} that were looked at have fewer "
                + what
            )
    return most, lines


def boxes_line(train: TrainPairs, boxes: Boxes) -> str:
    """What is there of boxes. Only some pictures of large data are looked at.

    Raises `UserError` if none of them has a box.
    """
    pictures = range(0, len(train), max(1, len(train) // LOOKED_AT))
    count = sum(1 for index in pictures if boxes.of(train.pictures.file(index)))
    if not count:
        raise UserError(
            f"data.boxes is {boxes.path!r}: none of the {len(pictures)} pictures that were looked "
            f"at has a box there, the first is {train.pictures.file(0)}: their files must have "
            "the names that it has"
        )
    left_out = f", {boxes.left_out:,} without an area or a phrase left out" * bool(boxes.left_out)
    return (
        f"data.boxes: {len(boxes.keys):,} boxes with phrases{left_out}; {count} of "
        f"{len(pictures)} pictures that were looked at have some"
    )


def _split(config: DataConfig) -> str:
    """The name of the split that training evaluates."""
    return "test" if config.val_split == "test" else "val"


def oddities(sources: Sequence[Source], tokenizer: CaptionTokenizer, name: str) -> list[str]:
    """Lines about captions that are very long, or that the tokenizer `name` does not know."""
    long = [_long(source, tokenizer) for source in sources]
    # Each line once, as a source may be both trained on and evaluated on.
    return [*dict.fromkeys(filter(None, long)), *_unknown(sources, tokenizer, name)]


def _long(source: Source, tokenizer: CaptionTokenizer) -> str:
    """A line about the captions of more characters than usual; "" if there is none."""
    limit = max(UNUSUAL, A_POSITION * tokenizer.positions)
    sizes = source.caption_bytes()
    candidates = np.flatnonzero(sizes > limit)
    largest = candidates[np.argsort(-sizes[candidates], kind="stable")][:LOOKED_AT].tolist()
    long = []
    for index in largest:
        lengths = map(len, _captions(source, index))
        long += [(length, index) for length in lengths if length > limit]
    if not long:
        return ""
    longest, index = max(long)
    line = (
        f"{len(long)} captions of {source.where} have more than {limit:,} characters, the longest "
        f"{longest:,}, of {source.name(index)}: a model reads the first data.context_length = "
        f"{tokenizer.positions} tokens"
    )
    most = most_characters(tokenizer.positions)
    return line + (f", and no character after the first {most:,}" if longest > most else "")


def _unknown(sources: Sequence[Source], tokenizer: CaptionTokenizer, name: str) -> list[str]:
    """A line about captions in a language that the tokenizer does not know.

    Only some captions of large sources are read.
    """
    looked_at, unread = 0, []
    for source in sources:
        for index in range(0, len(source), max(1, len(source) // LOOKED_AT)):
            captions = _captions(source, index)
            looked_at += len(captions)
            unknown = sum(map(tokenizer.mostly_unknown, captions))
            unread += [(source, index)] * unknown
    if not unread:
        return []
    source, index = unread[0]
    return [
        f"{len(unread)} of {looked_at} captions looked at are mostly tokens that data.tokenizer = "
        f"{name!r} does not know, the first of {source.name(index)}: give a tokenizer of their "
        "language"
    ]


def _captions(source: Source, index: int) -> list[str]:
    with suppress(Exception):  # samples that cannot be read are reported when they are used
        return source.captions(index)
    return []
