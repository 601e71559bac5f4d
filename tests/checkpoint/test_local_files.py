"""Local files of a configuration that hold something else at the next start."""

import json
import os
import random
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from ds_cmli.checkpoint import local_files
from ds_cmli.common import tensor_file
from ds_cmli.common.errors import UserError
from ds_cmli.config import settings
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.schema import Config
from ds_cmli.data.sources import base
from ds_cmli.data.tokens import builtin_tokenizer
from ds_cmli.distributed import process_group as distributed
from tests.checkpoint.test_resume_data import own_caches  # noqa: F401
from tests.config.test_mistakes import pairs
from tests.data.sources.samples import members, tar
from tests.data.sources.test_arrow import table
from tests.data.sources.test_coco import coco
from tests.drive_train import drive
from tests.stranger.drive import ONE_BLOCK

SIZES = PRESETS["tiny"]["student"]["text_overrides"]


def vit(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    sizes = PRESETS["tiny"]["student"]["image_overrides"]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=56, **sizes)
    header, data = tensor_file.pieces(model.state_dict())  # with a checksum that fits
    path.write_bytes(header + bytes(data))
    return str(path)


def bert(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    config = BertConfig(vocab_size=builtin_tokenizer().vocab_size, **SIZES)
    save_file(BertModel(config, add_pooling_layer=False).state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "README.md").write_text("of a model")
    return str(folder)


def flipped(path: Path) -> None:
    """One bit, with the size and the time of the file as before."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def named(folder: Path) -> Config:
    """A configuration that names a local file wherever one can be named."""
    builtin_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "model.safetensors").write_bytes(b"of no tokenizer")
    student = {"image_weights": vit(folder / "image.safetensors", 0), "text_weights": bert(folder / "text", 0)}
    student["image_model"] = f"local-dir:{bert(folder / 'timm', 1)}"
    teacher = {"weights": vit(folder / "teacher.safetensors", 1), "overrides": {"a": {"b": student["image_weights"]}}}
    tokenizer = {"tokenizer": str(folder / "tokenizer")}
    return load_preset("tiny", {"student": student, "teacher": teacher, "data": tokenizer})


FILES = {
    "image.safetensors": ("student.image_weights", "teacher.overrides.a.b"),
    "teacher.safetensors": ("teacher.weights",),
    "text/config.json": ("student.text_weights.config.json",),
    "text/model.safetensors": ("student.text_weights.model.safetensors",),
    "timm/config.json": ("student.image_model.config.json",),
    "timm/model.safetensors": ("student.image_model.model.safetensors",),
    "tokenizer/tokenizer.json": ("data.tokenizer.tokenizer.json",),
    "tokenizer/tokenizer_config.json": ("data.tokenizer.tokenizer_config.json",),
    "text/README.md": (),
    "tokenizer/model.safetensors": (),
}


@pytest.fixture
def noted(tmp_path):
    """A function that compares the files of `named` with what they were first."""
    config = named(tmp_path)
    before = settings.compared(config, {}, None, local_files.noted(config))
    return lambda: settings.differences(before, settings.compared(config, {}, None, local_files.noted(config)), True)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(name, noted, tmp_path):
    assert noted() == []
    flipped(tmp_path / name)
    assert noted() == [f"{setting}: the file has another content" for setting in FILES[name]]


def test_a_file_more_or_less_in_a_folder_is_named(noted, tmp_path):
    (tmp_path / "tokenizer" / "added_tokens.json").write_text("{}")
    (tmp_path / "text" / "config.json").unlink()
    assert noted() == [
        "data.tokenizer.added_tokens.json: a local file, which was none",
        "student.text_weights.config.json: the local file is gone",
    ]


def test_a_run_of_an_earlier_version_noted_no_files(noted, tmp_path):
    config = load_preset("tiny", {})
    before = settings.compared(config, {})
    assert settings.differences(before, settings.compared(config, {}, None, local_files.noted(config)), True) == []


def test_nodes_with_other_files_are_refused(tmp_path, monkeypatch):
    config = named(tmp_path)
    mine = local_files._digests(config)
    other = {**mine, "teacher.weights": "0"}
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [("a", mine), ("a", {}), ("b", other)])
    with pytest.raises(UserError, match=r"^teacher.weights: its files on b have another content than on a: "):
        local_files.noted(config)


def test_every_bit_of_small_data_counts_and_sampled_blocks_of_large_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_BYTES", 8)
    monkeypatch.setattr(base, "BLOCKS", 16)
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_bytes(random.randbytes(60))  # twice at most 16 blocks of 8 bytes: all of it is read
    for place in range(60):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        other.write_bytes(content)
        assert base.sampled([other]) != base.sampled([file])
        assert base.sampled([file, other]) != base.sampled([other, file])
    file.write_bytes(random.randbytes(1000))
    assert base.sampled([file] * 99) == base.sampled([file] * 99) != base.sampled([file])


def test_another_teacher_is_refused_unless_asked_for(alone, tmp_path, capfd):
    run = ["--preset", "tiny", "--steps", "3", "--data", pairs(tmp_path / "pairs"), "--set", "run.match_maps=0"]
    run += [*ONE_BLOCK, "--set", f"teacher.weights={vit(tmp_path / 'teacher.safetensors', 0)}"]
    run += ["--output-dir", str(tmp_path / "run")]
    assert drive(run, stop_at=1) == 85
    vit(tmp_path / "teacher.safetensors", 1)
    with pytest.raises(UserError, match=r"other settings: teacher.weights: the file has another content. Give the old"):
        drive(run)
    assert drive([*run, "--resume-with-changes"]) == 0
    assert "with changes: teacher.weights: the file has another content" in capfd.readouterr().out


@pytest.mark.soak
def test_every_local_file_changed_between_two_starts(alone, own_caches, tmp_path, capfd):  # noqa: F811
    """Weights, tokenizer, DeepSpeed's JSON and the data of every kind: all are refused, and named."""
    cases = 0
    tar(tmp_path / "tars" / "0.tar", members(range(20)))
    table(range(20)).to_parquet(str(tmp_path / "x.parquet"))
    table(range(20)).save_to_disk(str(tmp_path / "saved"))
    folder = pairs(tmp_path / "pairs")
    lists = coco(tmp_path / "coco", count=20) if (tmp_path / "coco").mkdir() is None else None
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    vit(tmp_path / "image.safetensors", 0), vit(tmp_path / "teacher.safetensors", 1), bert(tmp_path / "text", 0)
    builtin_tokenizer().save_pretrained(tmp_path / "tokenizer")
    local = {"student.image_weights": "image.safetensors", "student.text_weights": "text"}
    local |= {"teacher.weights": "teacher.safetensors", "data.tokenizer": "tokenizer"}
    common = ["--preset", "tiny", "--steps", "3", "--set", "run.match_maps=0", *ONE_BLOCK]
    common += ["--deepspeed_config", str(tmp_path / "ds.json"), "--micro-batch", "4"]
    for setting, name in local.items():
        common += ["--set", f"{setting}={tmp_path / name}"]
    data = {"tars": tmp_path / "tars", "x.parquet": tmp_path / "x.parquet", "saved": tmp_path / "saved"}
    data |= {"pairs": folder, "coco": lists}
    for kind, source in data.items():
        run = [*common, "--data", str(source), "--output-dir", str(tmp_path / f"run-{kind}")]
        assert drive(run, stop_at=1) == 85
        files = [path for path in Path(source).rglob("*") if path.is_file()] or [Path(source)]
        files += [path for path in Path(source).parent.glob("*.png") if kind == "coco"][:3]
        if kind == "tars":
            files += [tmp_path / "ds.json", *map(tmp_path.joinpath, ("image.safetensors", "teacher.safetensors"))]
            files += sorted((tmp_path / "text").glob("[cm]*")) + sorted((tmp_path / "tokenizer").iterdir())
        for file in random.Random(0).sample(files, min(len(files), 14)):
            kept = file.read_bytes()
            change(file, kept)
            capfd.readouterr()
            code = drive(run, stop_at=2, mistakes=True)
            out = capfd.readouterr().out
            file.write_bytes(kept)
            assert code == 2, (file, out)
            assert "error: " in out and "step 2" not in out, (file, out)
            cases += 1
        assert drive(run, stop_at=2) == 85
    with capfd.disabled():
        print(f"\n{cases} local files changed: {cases} refused, and as before again read")


def change(file: Path, kept: bytes) -> None:
    if file.suffix == ".json" and b"gradient_clipping" in kept:
        file.write_bytes(kept.replace(b"0.5", b"0.6"))
    elif file.suffix == ".png":
        file.write_bytes(kept + b"x")
    else:
        file.write_bytes(kept)
        flipped(file)
