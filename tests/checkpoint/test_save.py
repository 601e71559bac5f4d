"""Saving and finding checkpoints with the real engine, in this process."""

import json
import pickle
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from ds_cmli.checkpoint import contents, files
from ds_cmli.checkpoint import save as checkpoint
from ds_cmli.checkpoint.train_state import TrainState, generators, read_of_rank, read_shared
from ds_cmli.checkpoint.weights import full_weights
from ds_cmli.common.errors import UserError
from ds_cmli.common.pretrained import refused_code
from ds_cmli.config.presets import load_preset
from ds_cmli.data.build import build_data
from tests.batches import rank_batches
from tests.checkpoint.runs import DAMAGES, Evil, flip
from tests.engine.steps import build


@pytest.fixture(scope="module")
def train_engine(device):
    data = build_data(load_preset("tiny", {}).data, 0)
    train_engine = build(device, data, {"zero_optimization": {"stage": 2}})
    train_engine(next(iter(rank_batches(data.train, data, 8))))
    return train_engine


def save(folder, train_engine, number, keep=2):
    state = TrainState(step=number, sums=torch.zeros(4), generators=generators())
    return checkpoint.save(folder, train_engine, state, keep)


def published(folder):
    root = folder / "checkpoint"
    return (root / "latest").read_text(), sorted(p.name for p in root.iterdir() if p.name != "latest")


@pytest.fixture(scope="module")
def two(train_engine, tmp_path_factory):
    """A run's folder with checkpoints of step 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    for number in (1, 2):
        assert save(folder, train_engine, number).error is None
    return folder


@pytest.fixture
def run(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


def test_old_ones_go_only_after_the_new_one_is_published(train_engine, tmp_path):
    for number in (1, 2, 3):
        saved = save(tmp_path, train_engine, number)
    assert published(tmp_path) == ("step3", ["step2", "step3"])
    assert (
        saved.bytes
        == sum(f.stat().st_size for f in (tmp_path / "checkpoint/step3").iterdir())
        - (tmp_path / "checkpoint/step3/checksums.json").stat().st_size
    )
    assert save(tmp_path, train_engine, 3).name == "step3.1"  # the same step again: never in the place of a good one
    assert published(tmp_path) == ("step3.1", ["step3", "step3.1"])
    assert save(tmp_path, train_engine, 20, keep=1).error is None
    assert published(tmp_path) == ("step20", ["step20"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_damaged_is_found_and_the_one_before_used(run, damage):
    newest = run / "checkpoint" / "step2"
    names = sorted(path.name for path in newest.iterdir())
    assert names == ["checksums.json", "mp_rank_00_model_states.pt", "rank-0.pt", "state.json",
                     "zero_pp_rank_0_mp_rank_00_optim_states.pt"]  # fmt: skip
    for name in names:
        whole = (newest / name).read_bytes()
        damage(newest / name)
        result = contents.find("auto", run)
        assert result.path.name == "step1", name
        assert len(result.lines) == 1 and "step2 is damaged" in result.lines[0] and name in result.lines[0]
        (newest / name).write_bytes(whole)
    assert contents.find("auto", run).path.name == "step2"


@pytest.mark.parametrize("content", [None, b"", b"step9", b"\xff\xfe", b"../step2"])
def test_a_damaged_pointer_leaves_the_newest_whole_one(run, content):
    pointer = run / "checkpoint" / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert contents.find("auto", run).path.name == "step2"


def test_what_was_never_published_does_not_count(run, train_engine):
    root = run / "checkpoint"
    shutil.copytree(root / "step2", root / "step3")  # killed before the pointer was replaced
    shutil.copytree(root / "step2", root / "step4.writing")
    assert contents.find("auto", run).path.name == "step2"
    assert save(run, train_engine, 3).name == "step3.1"
    assert published(run) == ("step3.1", ["step2", "step3.1"])


def test_all_damaged_is_a_mistake_to_be_told(run):
    for state in run.glob("checkpoint/*/state.json"):
        flip(state)
    with pytest.raises(UserError, match=r"step1 is damaged: state.json does not match its checksum; there is no other"):
        contents.find("auto", run)
    assert contents.find("auto", run / "elsewhere") is None


def assert_untouched(run, before):
    assert published(run) == ("step2", ["step1", "step2"])
    assert (run / "student.safetensors").read_bytes() == before
    assert not list(run.rglob("*.writing"))
    assert files.problem(run / "checkpoint" / "step2") is None


@pytest.mark.parametrize("writes", [1, 3, 100, 1000])
def test_a_disk_that_fills_up_at_any_write_leaves_the_one_before(run, train_engine, monkeypatch, writes):
    before = (run / "student.safetensors").read_bytes()
    left = [writes]

    def write(self, data, one=files.Hashing.write):
        left[0] -= 1
        if left[0] < 0:
            self.error = OSError(28, "No space left on device")
            raise self.error
        return one(self, data)

    monkeypatch.setattr(files.Hashing, "write", write)
    saved = save(run, train_engine, 3)
    monkeypatch.undo()
    if left[0] >= 0:  # fewer writes than that
        assert saved.error is None and writes == 1000
        return
    assert "No space left on device" in saved.error
    assert_untouched(run, before)


def test_no_space_is_found_before_writing(run, train_engine, monkeypatch):
    before = (run / "student.safetensors").read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert "MB, and 1.0 MB are free" in save(run, train_engine, 3).error
    assert_untouched(run, before)


def test_a_full_file_system_leaves_the_one_before(two, train_engine, tmp_path, monkeypatch):
    size = int(2.9 * sum(f.stat().st_size for f in (two / "checkpoint" / "step2").iterdir()))  # room for two
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
        assert save(tmp_path, train_engine, 1).error is None
        assert save(tmp_path, train_engine, 2).error is None
        before = (tmp_path / "student.safetensors").read_bytes()
        error = save(tmp_path, train_engine, 3).error
        assert "No space left on device" in error
        assert_untouched(tmp_path, before)
        print(f"full tmpfs: {error}")
        shutil.rmtree(tmp_path / "checkpoint" / "step1")
        assert save(tmp_path, train_engine, 3).error is None
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_loading_runs_no_code_from_a_file(tmp_path):
    for number, value in enumerate([Evil(str(tmp_path / "ran")), {"loss_scaler": [Evil(str(tmp_path / "ran"))]}]):
        torch.save(value, tmp_path / f"{number}.pt")
        with files.no_code(), pytest.raises(pickle.UnpicklingError) as error:
            files.CheckpointWriter().load(str(tmp_path / f"{number}.pt"))
        assert refused_code(error.value) == "it holds more than tensors (posix.mkdir), and code in pickles is never run"
        with files.no_code(), pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / f"{number}.pt", weights_only=False)  # as DeepSpeed's converter asks for
    assert not (tmp_path / "ran").exists()


def test_the_state_survives_its_file(run, train_engine):
    torch.rand(7)
    state = TrainState(
        step=7,
        sampler={"epoch": 1, "position": 8, "length": 16, "seed": 0},
        best={"metric": "loss", "value": 0.5, "step": 6, "pairs": 4, "chance": 0.25},
        sums=torch.tensor([1.5, 2.5]),
        micro_batches=3,
        bad_count=2,
        bad_first=[("a.png", "broken")],
        generators=generators(),
    )
    saved = checkpoint.save(run, train_engine, state, 2)
    path = run / "checkpoint" / saved.name
    assert read_shared(path).shared() == state.shared()
    read = TrainState(**read_of_rank(path, 0))
    assert read.sums.tolist() == [1.5, 2.5] and (read.micro_batches, read.bad_count) == (3, 2)
    assert read.bad_first == [("a.png", "broken")]
    drawn = draw()
    from ds_cmli.checkpoint.train_state import restore_generators

    restore_generators(read.generators)
    assert draw() == drawn != draw()
    assert json.loads((path / "state.json").read_text())["step"] == 7


def draw() -> list[float]:
    import random

    import numpy as np

    return [random.random(), float(np.random.rand()), torch.rand(1).item(), float(np.random.randn())]


def test_fewer_or_more_ranks_share_the_running_sums():
    from ds_cmli.checkpoint.train_state import redistribute

    ranks = [
        TrainState(sums=torch.tensor([float(r)]), micro_batches=4, bad_count=r, generators=generators()).of_rank()
        for r in (1, 3)
    ]
    new = [TrainState(**redistribute(ranks, r, 3, seed=0)) for r in range(3)]
    assert [state.sums.item() for state in new] == [2.0, 2.0, 2.0]  # the mean over ranks stays
    assert [state.bad_count for state in new] == [4, 0, 0]  # and so does the sum
    assert torch.equal(new[1].generators["torch"], ranks[1]["generators"]["torch"])
    assert not torch.equal(new[2].generators["torch"], ranks[1]["generators"]["torch"])


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_the_masters_and_not_what_16_bit_left_of_them(device, stage):
    data = build_data(load_preset("tiny", {}).data, 0)
    ds_config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    train_engine = build(device, data, ds_config, {"optim": {"lr": 1e-4, "warmup_share": 0.0}})
    for _ in range(2):  # the first step's learning rate is 0
        train_engine(next(iter(rank_batches(data.train, data, 8))))
    weights = full_weights(train_engine.objective)
    for name, parameter in train_engine.objective.named_parameters():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name].bfloat16(), parameter.detach().cpu())
    assert not torch.equal(
        weights["student.projection.weight"], weights["student.projection.weight"].bfloat16().float()
    )
