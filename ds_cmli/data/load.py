"""The data that a run trains and evaluates on, from the demo's scenes or the kinds of `sources`."""

from dataclasses import dataclass, field, replace
from functools import partial

from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.config.validation import check
from ds_cmli.data.bad import Bad, BadSamples
from ds_cmli.data.batch import Collate
from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.numbered import of_sources
from ds_cmli.data.oddities import oddities
from ds_cmli.data.opening import (
    open_all,
    open_sources,
    open_validation,
    settings_of_some,
    source_line,
)
from ds_cmli.data.pairs import EvalPairs, TrainPairs
from ds_cmli.data.sampler import Mixture
from ds_cmli.data.scenes import EVAL_SCENES, EVAL_SEED, TRAIN_SCENES, Scenes
from ds_cmli.data.tokens import (
    CaptionTokenizer,
    SpecialTokens,
    tokenizer_of,
)


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
    silent = "val_source", *settings_of_some()
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
    train.each_picture = config.split_sentences
    evals: dict[str, Dataset] = {}
    for split in ("seen", "unseen"):
        evals[split] = make(split, EVAL_SEED, EVAL_SCENES)
    return Data(
        train=train,
        mixture=Mixture([len(train)]),
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
    tokenizer = tokenizer_of(config)
    train = TrainPairs(opened.train, tokenizer, config, seed)
    validation = EvalPairs(opened.validation, tokenizer, config)
    # Read the first pair of each source, so that missing images are an error here: after an error
    # in a loading process torch takes 5 s per process to end.
    for start in train.pictures.starts[:-1]:
        train[start]
    TrainPairs(opened.validation, tokenizer, config, seed)[0]
    everything = [*opened.train, *opened.validation]
    return Data(
        train=train,
        mixture=opened.mixture,
        evals={_split(config): validation},
        tokenizer=tokenizer,
        bad=left_out,
        summary=opened.summary,
        notices=[
            *opened.notices,
            *oddities(everything, tokenizer, config.tokenizer),
        ],
        fingerprint=opened.fingerprint,
    )


def _split(config: DataConfig) -> str:
    """The name of the split that training evaluates."""
    return "test" if config.val_split == "test" else "val"
