"""The data that a run trains and evaluates on: what `--data` names, opened, mixed and held out."""

import difflib
import glob
import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError, printable
from ds_cmli.config.registry import SOURCES, load
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.arrow import HUB, open_hub
from ds_cmli.data.batch import Collate
from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.images import View
from ds_cmli.data.pairs import EvalPairs, TrainPairs
from ds_cmli.data.sampler import Mixture
from ds_cmli.data.scenes import EVAL_SCENES, EVAL_SEED, TRAIN_SCENES, Scenes
from ds_cmli.data.sources import Files, Source
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of

HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000
MOST_FILES = 100_000
Parts = dict[str, Source]  # by split: train, validation, test


@dataclass(kw_only=True)
class EvalData:
    """The data that a model is evaluated on. Its data sets are map-style and return `Sample`s."""

    # By split: "seen" and "unseen" for the demo, else "val", "test" or "all".
    evals: dict[str, Dataset] = field(default_factory=dict)
    tokenizer: CaptionTokenizer
    has_places: bool = False  # whether each token's place is known, as the pointing game needs
    summary: list[str] = field(default_factory=list)  # lines to print: what was read

    def __post_init__(self):
        self.collate = Collate(self.tokenizer)
        self.vocab_size, self.special = self.tokenizer.vocab_size, self.tokenizer.special


@dataclass(kw_only=True)
class Data(EvalData):
    """The data that a run trains and evaluates on."""

    train: Dataset
    mixture: Mixture  # decides which samples of `train` an epoch takes
    # Identifies the data, as JSON; must be equal when a run resumes.
    fingerprint: dict[str, Mapping[str, object]] = field(default_factory=dict)


def build_data(config: DataConfig, seed: int) -> Data:
    """Open all data that `config` describes; assets of the demo are fetched at first use.

    Raises:
        UserError: a tokenizer, a source or the demo cannot be opened, or has too few images.
    """
    if config.source == "demo":
        return _demo(config, seed)
    names, weights = weighted(config.source)
    train, validation, summary = dict[str, Source](), dict[str, Source](), list[str]()
    fingerprint: dict[str, Mapping[str, object]] = {}
    for number, name in enumerate(names):
        kind, parts = open_source(name, config)
        if "train" not in parts:
            raise UserError(f"data.source is {name!r}, which has no training part")
        _check_left_out(name, parts, config.max_bad_share)
        train[name], held = parts["train"], None
        if not config.val_source:
            train[name], held = _split(name, parts, config)
            validation[name] = held
        share = f", {weights[number]:g} of the mixture" if weights else ""
        summary += [f"data: {name}: {kind}, {_size(train[name])} to train on{share}"]
        summary += [f"held out: {_size(held)} of {name}"] if held is not None else []
        fingerprint[name] = {**train[name].fingerprint(), "weight": weights and weights[number]}
    if config.val_source:
        validation, line = _val_source(config)
        summary.append(line)
    tokenizer = tokenizer_of(config)
    pairs = TrainPairs(train, tokenizer, config, seed)
    for start in pairs.images.starts[:-1]:
        pairs[start]  # a folder without its images is an error here, not in a loading process
    return Data(
        train=pairs,
        mixture=Mixture([len(part) for part in train.values()], weights),
        evals={_eval_name(config): EvalPairs(validation, tokenizer, config)},
        tokenizer=tokenizer,
        summary=summary,
        fingerprint=fingerprint,
    )


def build_eval_data(config: DataConfig, seed: int, split: str | None) -> EvalData:
    """Open the data that an evaluation reads from `data.source`.

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
    sources: dict[str, Source] = {}
    if split == "all":
        for name in weighted(config.source)[0]:
            for part, source in open_source(name, config)[1].items():
                sources[f"{name} ({part})"] = source
    elif config.val_source:
        sources, _ = _val_source(config)
    else:
        for name in weighted(config.source)[0]:
            sources[name] = _split(name, open_source(name, config)[1], config)[1]
    tokenizer = tokenizer_of(config)
    return EvalData(
        evals={split or _eval_name(config): EvalPairs(sources, tokenizer, config)},
        tokenizer=tokenizer,
        summary=[f"data: {name}: {_size(part)} to evaluate on" for name, part in sources.items()],
    )


def evaluation_data(config: DataConfig, name: str) -> DataConfig:
    """A run's configuration to evaluate on the source `name`, which `--data` gives.

    Of a source that the run has held a share out of, that share is evaluated; other data is, as
    `val_source`, evaluated whole or in its validation part. The run's settings of its own data do
    not apply to other data.
    """
    if printable(name) != name:
        raise UserError(f"--data is {name!r}, which is no Unicode: rename it")
    own = [_place(source) for source in weighted(config.source)[0]]
    if config.val_source or _place(name) not in own:
        if _place(name) not in (*own, _place(config.val_source)):
            config = replace(config, image_root="", image_key="", caption_key="", separator="")
        config = replace(config, val_source="" if name == "demo" else name, held_out=None)
    if name == "demo":
        config = replace(config, resize="crop")  # its scenes are square
    return replace(config, source=name)


def weighted(sources: str | list[str]) -> tuple[list[str], list[float] | None]:
    """Split names and weights: `["a::0.7", "b::0.3"]` -> `(["a", "b"], [0.7, 0.3])`.

    Raises:
        UserError: a weight is not a positive number or only some sources have one, a name occurs
            twice, or "demo" is mixed with other sources.
    """
    sources = [sources] if isinstance(sources, str) else sources
    names, weights = [], list[float]()
    for source in sources:
        name, mark, weight = source.rpartition("::")
        names.append(name if mark else source)
        if mark:
            try:
                weights.append(float(weight))
            except ValueError:
                weights.append(0.0)
            if not 0 < weights[-1] < math.inf:
                raise UserError(f"--data is {source!r}: write WHAT::WEIGHT, as {name}::0.7")
    if len(set(names)) < len(names) or ("demo" in names and len(names) > 1):
        raise UserError(f"--data is {sources}: name each source once, and the demo alone")
    if weights and (len(weights) < len(names) or len(names) == 1):
        raise UserError(f"--data is {sources}: give each of several sources a weight, or none")
    return names, weights or None


def open_source(name: str, config: DataConfig) -> tuple[str, Parts]:
    """Open one source: its kind in a few words, and its parts by split.

    Raises:
        UserError: it is of no known kind, or cannot be opened.
    """
    if name.startswith(HUB):
        return "a data set of the hub", open_hub(name, config)
    path, files = Path(os.path.expanduser(name)), list[Path]()
    if path.is_dir():
        for entry in SOURCES.values():
            files = sorted(file for pattern in entry.holds for file in path.glob(pattern))
            if files:
                files = [file for file in files if file.name.endswith(entry.ends)] or [path]
                break
    else:
        files = expand(name)
        ends = files[0].name.lower().endswith
        for entry in SOURCES.values():
            if entry.ends and ends(entry.ends):
                break
        if not all(entry.ends and file.name.lower().endswith(entry.ends) for file in files):
            files = []
    if not files:
        raise UserError(f"data.source is {name!r}, {_guess(path)}\n{accepted()}")
    if entry.package:
        try:
            import_module(entry.package)
        except ImportError:
            raise UserError(
                f"data.source is {name!r}, which the package {entry.package} reads: pip install "
                f"'ds-cmli[{entry.extra}]'"
            ) from None
    return entry.short, load(entry)(files, config)


def expand(pattern: str) -> list[Path]:
    """The files that a name stands for, in order: `{00..19}`, `{a,b}`, `*`, `?` and `[]`.

    Raises:
        UserError: some do not exist, none matches, or there are too many.
    """
    names = [os.path.expanduser(pattern)]
    while braces := next(filter(None, (re.search(r"\{([^{}]*)\}", name) for name in names)), None):
        choices = braces[1].split(",")
        if span := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
            numbers = range(int(span[1]), int(span[2]) + 1)[: MOST_FILES + 1]
            choices = [str(number).zfill(len(span[1])) for number in numbers]
        names = [name.replace(braces[0], choice, 1) for name in names for choice in choices]
        if not 0 < len(names) <= MOST_FILES:
            raise UserError(f"data.source is {pattern!r}: {len(names):,} files")
    files = [file for name in names for file in sorted(glob.glob(name)) or [name]]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"data.source is {pattern!r}: {len(missing)} of {len(files)} files do not exist, the "
            f"first {missing[0]}{_near(missing[0])}: {accepted()}"
        )
    return list(map(Path, files))


def accepted() -> str:
    return f"accepted are 'demo', {HUB}OWNER/NAME, {', '.join(e.what for e in SOURCES.values())}"


def _guess(path: Path) -> str:
    """What a folder or file of no known kind seems to be, and what to do about it."""
    if not path.is_dir():
        return "whose files are of no known kind, or of several"
    inside = sorted(path.iterdir())
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    if any(file.suffix.lower() in suffixes for file in inside):
        return "a folder of images without captions: write a metadata.csv with file_name,text in it"
    folders = [folder for folder in inside if folder.is_dir()]
    if any(file.suffix.lower() in suffixes for folder in folders for file in folder.iterdir()):
        return (
            "folders of images by class, without captions: they serve ds-cmli-evaluate "
            "--zero-shot; to train, write a metadata.csv with file_name,text"
        )
    names = ", ".join(file.name for file in inside[:3])
    return f"a folder of no known kind: it holds {names or 'nothing'}"


def _near(file: str) -> str:
    folder, name = os.path.split(file)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {os.path.join(folder, close[0])}?)" if close else ""


class Part:
    """The images of a source that `indices` (int [n]) lists, in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> bytes:
        return self.source.image(int(self.indices[index]))

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> Mapping[str, object]:
        return {**self.source.fingerprint(), "images": len(self)}


def hold_out(name: str, source: Source, wanted: float | None) -> tuple[Source, Source]:
    """Split a source into a training part and a held-out part.

    Args:
        wanted: as `data.held_out`; at least one image is held out.

    Raises:
        UserError: none would be left.
    """
    count = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(source))))
    if wanted is not None:
        count = max(1, round(wanted if wanted >= 1 else wanted * len(source)))
    if count >= len(source):
        raise UserError(
            f"data.held_out is {wanted}, of which {name} with {len(source)} images with a caption "
            "leaves none to train on: give it more images, or less"
        )
    chosen = np.zeros(len(source), dtype=bool)
    chosen[np.argpartition(priorities(source), count - 1)[:count]] = True
    return Part(source, np.flatnonzero(~chosen)), Part(source, np.flatnonzero(chosen))


def priorities(source: Source) -> np.ndarray:
    """Pseudorandom numbers, uint64 [n], always the same; the lowest are held out."""
    if isinstance(source, Files):  # hashes of names: neither order nor captions change the split
        digests = (hashlib.sha256(source.name(i).encode()).digest()[:8] for i in range(len(source)))
        return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
    x = np.arange(1, len(source) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # SplitMix64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _split(name: str, parts: Parts, config: DataConfig) -> tuple[Source, Source]:
    """What a source trains on, and what it evaluates on: a part of its own, or a held-out share."""
    part = parts.get(config.val_split)
    if part is not None:
        return parts.get("train", part), part
    if config.val_split == "test":
        raise UserError(f"data.val_split is 'test', and {name} has no such part: leave it out")
    return hold_out(name, parts["train"], config.held_out)


def _val_source(config: DataConfig) -> tuple[dict[str, Source], str]:
    name = config.val_source
    parts = open_source(name, config)[1]
    part = parts.get(config.val_split) or next(iter(parts.values()))
    return {name: part}, f"held out: {name}, {_size(part)} to evaluate on"


def _check_left_out(name: str, parts: Parts, most: float) -> None:
    lost = sum(getattr(part, "left_out", 0) for part in parts.values())
    number = lost + sum(map(len, parts.values()))
    if lost > most * number:
        raise UserError(
            f"{lost} of the {number} images of {name} have no caption, more than "
            f"data.max_bad_share = {most}: give them some, or raise it"
        )


def _eval_name(config: DataConfig) -> str:
    return "test" if config.val_split == "test" else "val"


def _size(source: Source) -> str:
    left_out = getattr(getattr(source, "source", source), "left_out", 0)
    return f"{len(source):,} images" + (
        f" ({left_out:,} without caption left out)" * bool(left_out)
    )


def _place(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))


def _demo(config: DataConfig, seed: int) -> Data:
    given = ("val_source", "image_root", "image_key", "caption_key", "separator")
    unused = [name for name in given if getattr(config, name)]
    if unused or config.val_split == "test":
        raise UserError(f"data.{[*unused, 'val_split'][0]} says nothing of the demo: leave it out")
    # Before the tokenizer, because it is the smaller download if downloads fail.
    pictures, tokenizer = DemoPictures(config.image_size), tokenizer_of(config)
    view = View.of_training(config, seed)
    train = Scenes("train", seed, TRAIN_SCENES, pictures, tokenizer, config.scenes, view)
    evals: dict[str, Dataset] = {}
    for split in ("seen", "unseen"):
        evals[split] = Scenes(split, EVAL_SEED, EVAL_SCENES, pictures, tokenizer, config.scenes)
    return Data(
        train=train,
        mixture=Mixture([len(train)]),
        evals=evals,
        tokenizer=tokenizer,
        has_places=True,
        summary=[f"data: demo: {TRAIN_SCENES:,} scenes to train on, {2 * EVAL_SCENES} held out"],
    )
