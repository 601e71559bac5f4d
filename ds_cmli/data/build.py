"""The data that a run trains and evaluates on: what `--data` names, opened, mixed and held out."""

import difflib
import glob
import hashlib
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
from torch.utils.data import Dataset

from ds_cmli.config.registry import SOURCES
from ds_cmli.config.schema import DataConfig, check
from ds_cmli.data.images import View
from ds_cmli.data.pairs import Collate, EvalPairs, Images, Share, TrainPairs
from ds_cmli.data.sampler import Mixture
from ds_cmli.data.scenes import EVAL_SCENES, EVAL_SEED, TRAIN_SCENES, DemoPictures, Scenes
from ds_cmli.data.sources import Files, Source, arrow_parts, library, open_tars
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.errors import UserError, blame

HUB = "hf://datasets/"
NOT_OF_DEMO = "the demo has none, leave it out"
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000
LOOKED_AT = 100_000  # files of a folder of no known kind
IMAGES, LISTS = (".jpg", ".jpeg", ".png", ".webp"), (".csv", ".tsv", ".jsonl", ".json")
Opened = tuple[str, dict[str, Source]]  # kind, parts by split: train, validation, test
# By split: "seen" and "unseen" for the demo, else "val", "test" or "all".
Evals = Mapping[str, EvalPairs | Scenes]


@dataclass
class Data:
    """The data that a run trains and evaluates on."""

    train: Dataset
    mixture: Mixture  # decides which samples of `train` an epoch takes
    evals: Evals
    tokenizer: CaptionTokenizer
    summary: list[str]  # lines to print: what was read
    # Identifies the data, as JSON; must be equal when a run resumes.
    fingerprint: dict[str, Mapping[str, object]] = field(default_factory=dict)

    def __post_init__(self):
        self.collate = Collate(self.tokenizer)
        self.vocab_size, self.pad_id = self.tokenizer.vocab_size, self.tokenizer.pad_id


def build_data(config: DataConfig, seed: int) -> Data:
    """Open all data that `config` describes. Raises `UserError` for what cannot be trained on."""
    if config.source == "demo":
        for name in ("val_source", "image_root", "image_key", "caption_key"):
            check(not getattr(config, name), f"data.{name}", getattr(config, name), NOT_OF_DEMO)
        return _demo(config, seed)
    names, weights = weighted(config.source)
    opened = {name: open_source(name, config) for name in names}
    held_out, summary = _held_out(opened, config), list[str]()
    train, fingerprint = dict[str, Share](), dict[str, Mapping[str, object]]()
    shares = dict(zip(names, weights, strict=True)) if weights else {}
    for name, (kind, parts) in opened.items():
        if "train" not in parts:
            raise UserError(f"data.source is {name!r}, which has no training part")
        source, lost = parts["train"], getattr(parts["train"], "left_out", 0)
        if lost > config.max_bad_share * (lost + len(source)):
            what = f"{lost} of the {lost + len(source)} images of {name} have no caption"
            raise UserError(f"{what}, more than data.max_bad_share = {config.max_bad_share}")
        train[name] = source, range(len(source))
        if name in held_out and held_out[name][0] is source:
            train[name] = source, np.delete(np.arange(len(source)), held_out[name][1])
        weight, size = shares.get(name), len(train[name][1])
        share = f", {weight:g} of the mixture" if weight else ""
        summary.append(f"data: {name}: {kind}, {_size(train[name])} to train on{share}")
        fingerprint[name] = {**source.fingerprint(), "images": size, "weight": weight}
    summary += [f"held out: {_size(share)} of {name}" for name, share in held_out.items()]
    tokenizer = tokenizer_of(config)
    pairs = TrainPairs(Images(train), tokenizer, config, seed)
    for start in pairs.images.starts[:-1]:
        pairs[start]  # a folder without its images is an error here, not in a loading process
    mixture = Mixture([len(indices) for _, indices in train.values()], weights)
    evals = {"val": EvalPairs(Images(held_out), config)}
    return Data(pairs, mixture, evals, tokenizer, summary, fingerprint)


def build_eval_data(config: DataConfig, seed: int, split: str | None) -> tuple[Evals, list[str]]:
    """What an evaluation reads from `data.source`, and lines to print.

    `split`: "val" or "test" for that part, "all" for every part (also what training uses); None:
    what training itself evaluates.
    """
    if config.source == "demo":
        if split is not None:
            raise UserError(f"--split is {split!r}: the demo has its own two, leave it out")
        demo = _demo(config, seed)
        return demo.evals, demo.summary
    names = weighted(config.source)[0] if split == "all" or not config.val_source else []
    opened = {name: open_source(name, config) for name in names}
    if split == "all":
        every = [(f"{name} ({p})", one) for name in names for p, one in opened[name][1].items()]
        shares: dict[str, Share] = {name: (one, range(len(one))) for name, one in every}
    else:
        shares = _held_out(opened, config, "test" if split == "test" else "validation")
    summary = [f"data: {name}: {_size(share)} to evaluate on" for name, share in shares.items()]
    return {split or "val": EvalPairs(Images(shares), config)}, summary


def _held_out(
    opened: dict[str, Opened], config: DataConfig, split: str = "validation"
) -> dict[str, Share]:
    """What is evaluated: `val_source`, or of each source a part of its own or a held-out share."""
    shares = dict[str, Share]()
    if config.val_source:
        _, parts = open_source(config.val_source, config)
        source = parts.get(split) or next(iter(parts.values()))
        return {config.val_source: (source, range(len(source)))}
    for name, (_, parts) in opened.items():
        if split in parts:
            shares[name] = parts[split], range(len(parts[split]))
        elif split == "test" or "train" not in parts:
            raise UserError(f"{name} has no {split} part, but {', '.join(parts)}")
        else:
            shares[name] = parts["train"], hold_out(name, parts["train"], config.held_out)
    return shares


def hold_out(name: str, source: Source, wanted: float | None) -> np.ndarray:
    """The images of a source that are held out of training: int64 [n], in their order.

    Those with the lowest of pseudorandom numbers that are always the same; `wanted`: as
    `data.held_out`.
    """
    count = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(source))))
    if wanted is not None:
        count = max(1, round(wanted if wanted >= 1 else wanted * len(source)))
    if count >= len(source):
        what = f"data.held_out is {wanted}, and {name} has {len(source)} images with a caption"
        raise UserError(f"{what}: that leaves none to train on, hold out less")
    if isinstance(source, Files):  # hashes of names: neither order nor captions change the split
        names = (source.name(index).encode(errors="surrogatepass") for index in range(len(source)))
        digests = b"".join(hashlib.sha256(one).digest()[:8] for one in names)
        numbers = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
    else:  # SplitMix64
        x = np.arange(1, len(source) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers = x ^ (x >> np.uint64(31))
    return np.sort(np.argpartition(numbers, count - 1)[:count])


def evaluation_data(config: DataConfig, name: str) -> DataConfig:
    """A run's configuration to evaluate on `--data`: what it has held out of that source, or else
    other data, whole or its validation part, without the settings of the run's own data."""
    names = [name, config.val_source, *weighted(config.source)[0]]
    place, other, *own = (os.path.realpath(os.path.expanduser(one)) for one in names)
    if config.val_source or place not in own:
        if place not in (other, *own):
            config = replace(config, image_root="", image_key="", caption_key="")
        config = replace(config, val_source="" if name == "demo" else name, held_out=None)
    if name == "demo":
        config = replace(config, resize="crop")  # its scenes are square
    return replace(config, source=name)


def weighted(sources: str | list[str]) -> tuple[list[str], list[float] | None]:
    """Split names and weights: `["a::0.7", "b::0.3"]` -> `(["a", "b"], [0.7, 0.3])`."""
    names, weights = list[str](), list[float]()
    for source in [sources] if isinstance(sources, str) else sources:
        name, mark, weight = source.rpartition("::")
        names.append(name if mark else source)
        if mark:
            with blame(f"--data is {source!r}: write WHAT::WEIGHT, as {name}::0.7"):
                weights.append(float(weight))
                if not 0 < weights[-1] < math.inf:
                    raise ValueError("a weight is above 0")
    if len(set(names)) < len(names) or ("demo" in names and len(names) > 1):
        raise UserError(f"--data is {sources}: name each source once, and the demo alone")
    if weights and (len(weights) < len(names) or len(names) == 1):
        raise UserError(f"--data is {sources}: give each of several sources a weight, or none")
    return names, weights or None


def open_source(name: str, config: DataConfig) -> Opened:
    """Open one source: its kind in a few words, and its parts by split."""
    if name.startswith(HUB):
        return "a data set of the hub", open_hub(name, config)
    path = Path(os.path.expanduser(name))
    named = [] if path.is_dir() else expand(name)
    for entry in SOURCES.values():
        files = named or sorted(file for held in entry.holds for file in path.glob(held))
        of_kind = [file for file in files if file.name.lower().endswith(entry.ends)]
        if files and (not named or of_kind == files):
            opened = resolve_name(entry.implementation)(of_kind or [path], config)
            return entry.what, opened
    raise UserError(f"data.source is {name!r}, {_guess(path)}\n{_accepted()}")


def open_hub(name: str, config: DataConfig) -> dict[str, Source]:
    """Open hf://datasets/OWNER/NAME[@REVISION]: its tars, or what `datasets` reads of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, given = name.removeprefix(HUB).partition("@")
    at, shards = given or None, list[Path]()
    with blame(f"{name} cannot be fetched"):
        with suppress(LocalEntryNotFoundError):  # without a network: `datasets` may have a copy
            tars = snapshot_download(repo, repo_type="dataset", revision=at, allow_patterns="*.tar")
            shards = sorted(Path(tars).rglob("*.tar"))
        if not shards:
            return arrow_parts(library().load_dataset(repo, revision=at), config)
    return open_tars(shards, config)


def expand(pattern: str) -> list[Path]:
    """The files that a name stands for, in order: `{00..19}`, `{a,b}`, `*`, `?` and `[]`."""
    names = [os.path.expanduser(pattern)]
    while braces := next(filter(None, (re.search(r"\{([^{}]*)\}", name) for name in names)), None):
        choices = braces[1].split(",")
        if span := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
            numbers = range(int(span[1]), int(span[2]) + 1)
            choices = [str(number).zfill(len(span[1])) for number in numbers]
        names = [name.replace(braces[0], choice, 1) for name in names for choice in choices]
    files = [Path(file) for name in names for file in sorted(glob.glob(name)) or [name]]
    if missing := [file for file in files if not file.is_file()]:
        close = difflib.get_close_matches(str(missing[0]), glob.glob(f"{missing[0].parent}/*"), n=1)
        raise UserError(
            f"data.source is {pattern!r}: {len(missing)} of {len(files)} files do not exist, the "
            f"first {missing[0]}{f' (did you mean {close[0]}?)' if close else ''}\n{_accepted()}"
        )
    return files


def _accepted() -> str:
    return f"accepted are 'demo', {HUB}OWNER/NAME, {', '.join(e.what for e in SOURCES.values())}"


def _guess(path: Path) -> str:
    """What a folder or file of no known kind seems to be, and what to do about it."""
    if not path.is_dir():
        return "whose files are of no known kind, or of several"
    inside = sorted(path.iterdir())
    if lists := [file for file in inside if file.suffix.lower() in LISTS]:
        return f"a folder with the list {lists[0].name}: give that, --data {lists[0]}"
    if any(file.suffix.lower() in IMAGES for file in islice(path.rglob("*"), LOOKED_AT)):
        what = "write a metadata.csv with file_name,text in it; images by class serve --zero-shot"
        return f"a folder of images without captions: {what}"
    return (
        f"a folder of no known kind: it holds {', '.join(x.name for x in inside[:3]) or 'nothing'}"
    )


def _size(share: Share) -> str:
    left_out = getattr(share[0], "left_out", 0)
    return f"{len(share[1]):,} images" + (f" ({left_out:,} left out)" if left_out else "")


def _demo(config: DataConfig, seed: int) -> Data:
    # Before the tokenizer, because it is the smaller download if downloads fail.
    pictures, tokenizer = DemoPictures(config.image_size), tokenizer_of(config)
    of_demo = pictures, tokenizer, config.scenes
    train = Scenes("train", seed, TRAIN_SCENES, *of_demo, View.of(config, seed))
    evals = {name: Scenes(name, EVAL_SEED, EVAL_SCENES, *of_demo) for name in ("seen", "unseen")}
    summary = [f"data: demo: {TRAIN_SCENES:,} scenes to train on, {2 * EVAL_SCENES} held out"]
    return Data(train, Mixture([TRAIN_SCENES]), evals, tokenizer, summary)
