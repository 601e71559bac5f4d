"""The weights beside a run's checkpoints, and in an exported folder: whoever reads them finds a flipped bit."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ds_cmli.checkpoint import save, write
from ds_cmli.checkpoint.weights import AVERAGE, WEIGHTS
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.evaluate.model import load_objective
from ds_cmli.export.folder import load_run
from ds_cmli.inference import Model
from ds_cmli.models.weights import WeightsSource, weights_file
from tests.run_folder import write_run


def flip_a_bit_of_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"))
    weights = load_file(folder / WEIGHTS)
    for name in (WEIGHTS, AVERAGE, save.BEST_WEIGHTS):
        write.write_weights(folder / name, weights)
    return folder


@pytest.fixture
def run(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "run"))


def evaluate(folder: Path, ema: bool) -> None:
    from ds_cmli.data.build import build_data

    config = load_preset("tiny", {"loss": {"weights": {"global": 1.0, "cmli": 1.0}}})
    load_objective(config, folder, ema, build_data(config.data, 0), "cpu")


def export(folder: Path, ema: bool) -> None:
    load_run(folder, None, ema)


def search(folder: Path, ema: bool) -> None:
    Model.load(folder)


@pytest.mark.parametrize("read, ema", [(evaluate, False), (evaluate, True), (export, False), (export, True),
                                       (search, False)])  # fmt: skip
def test_a_flipped_bit_of_a_run_is_refused_in_one_line(run, read, ema):
    read(run, ema)
    file = run / (AVERAGE if ema else WEIGHTS)
    flip_a_bit_of_a_weight(file)
    with pytest.raises(UserError) as refused:
        read(run, ema)
    assert str(file) in str(refused.value) and "does not match the checksum" in str(refused.value)


def test_the_best_weights_keep_their_checksum_under_another_name(run):
    (run / save.BEST_WEIGHTS).replace(run / WEIGHTS)
    search(run, False)
    flip_a_bit_of_a_weight(run / WEIGHTS)
    with pytest.raises(UserError, match="damaged"):
        search(run, False)


def test_a_flipped_bit_of_an_export_is_refused_here_and_found_by_sha256sum(run, tmp_path):
    import subprocess

    from ds_cmli.export.__main__ import command

    (run / "metrics.jsonl").write_text(json.dumps({"step": 7, "eval/seen/global/i2t_r1": 0.1}) + "\n")
    folder = tmp_path / "a model"
    command.main([str(run), str(folder)], standalone_mode=False)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0
    listed = {line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert listed == there - {"SHA256SUMS"}
    Model.load(folder)
    flip_a_bit_of_a_weight(folder / "model.safetensors")
    with pytest.raises(UserError, match="does not match the checksum"):
        Model.load(folder)
    process = subprocess.run(check, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == "model.safetensors: FAILED\n"


def test_damaged_weights_are_no_start_of_another_run(run):
    source = WeightsSource("student.image_weights", str(run / WEIGHTS), False)
    assert weights_file(source, "weights") == str(run / WEIGHTS)
    flip_a_bit_of_a_weight(run / WEIGHTS)
    with pytest.raises(UserError, match=r"student.image_weights is .* is damaged"):
        weights_file(source, "weights")
