"""Starts that go on, are refused, or find damage: one folder, one command, in this process."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from ds_cmli.checkpoint.start import RunStart, find_start
from ds_cmli.checkpoint.state import TrainState
from ds_cmli.checkpoint.storage import CheckpointWriter
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import OptimConfig
from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import UserError
from ds_cmli.files import sha256
from ds_cmli.hardware import bf16_is_fast
from tests import make
from tests.checkpoint.runs import Code, assert_same
from tests.conftest import ZERO1
from tests.drive_train import drive

pytestmark = pytest.mark.usefixtures("alone")
TINY = load_preset("tiny", {})
OPTIMIZER = f"{'bf16_' * bf16_is_fast()}zero_pp_rank_0_mp_rank_00_optim_states.pt"
SMALL = {"--steps": 8, "--log-every": 1, "--save-every": 2, "--keep": 3, "--eval-every": 3}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    source = make.pairs(tmp_path_factory.mktemp("data") / "pairs", 33)
    return make.small({"--data": source, **SMALL}, {"optim.ema_decay": 0.5, "student.freeze_image": 1})


@pytest.fixture(scope="module")
def stopped(arguments, tmp_path_factory) -> Path:
    """A run stopped at step 4 of 8, with checkpoints of step 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert make.train(*arguments, "--output-dir", str(folder), stop_at=4) == 85
    return folder


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def refused(*arguments: object) -> str:
    return make.refused(drive, list(map(str, arguments)))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_each_damaged_file_is_named_and_the_one_before_taken(run, damage, capsys):
    newest = run / "checkpoint" / "step4"
    names = sorted(path.name for path in newest.iterdir())
    kept = "checksums.json", "model.ema.safetensors", "mp_rank_00_model_states.pt", "rank-0.pt", "state.json"
    assert names == sorted([OPTIMIZER, *kept])
    for name in names:
        whole = (newest / name).read_bytes()
        damage(newest / name)
        start = find_start(TINY, "auto", run)
        assert start.checkpoint is not None and start.checkpoint.name == "step2", name
        (line,) = capsys.readouterr().out.splitlines()
        assert "step4 is damaged" in line and name in line
        (newest / name).write_bytes(whole)
    (frozen,) = (run / "checkpoint").glob("frozen-*")
    damage(frozen)  # of both
    with pytest.raises(UserError, match=f"step2 is damaged: ../{frozen.name} .*there is no other"):
        find_start(TINY, "auto", run)


@pytest.mark.parametrize("content", [None, "a pipe", b"step9", b"\xff\xfe", b"../step2"])
def test_a_damaged_pointer_leaves_the_newest_whole_one(run, content):
    pointer = run / "checkpoint" / "latest"
    pointer.unlink()
    if content == "a pipe":
        os.mkfifo(pointer)
    elif content is not None:
        pointer.write_bytes(content)
    shutil.copytree(run / "checkpoint" / "step4", run / "checkpoint" / "step6.writing")
    start = find_start(TINY, "auto", run)
    assert start.checkpoint is not None and start.checkpoint.name == "step4"


FOREIGN = [
    (2, "state.json", '{"stepp": 4}'),
    (2, "rank-0.pt", {"sums": torch.ones(1)}),
    *((2, name, Code) for name in ("rank-0.pt", "model.ema.safetensors", OPTIMIZER, "mp_rank_00_model_states.pt")),
    *((1, name, Code) for name in (OPTIMIZER, "mp_rank_00_model_states.pt")),  # through the universal checkpoint
]


@pytest.mark.parametrize("stage, name, content", FOREIGN)
def test_a_foreign_file_is_one_line_and_runs_no_code(stage, name, content, run, arguments, tmp_path):
    checkpoint = run / "checkpoint" / "step4"
    trace = tmp_path / "trace"
    if isinstance(content, str):
        (checkpoint / name).write_text(content)
    else:
        torch.save(Code(trace) if content is Code else content, checkpoint / name)
    digests = json.loads((checkpoint / "checksums.json").read_text()) | {name: sha256(checkpoint / name)}
    (checkpoint / "checksums.json").write_text(json.dumps(digests))
    ds_config = make.json_file(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
    changed = ["--deepspeed_config", ds_config, "--resume-with-changes"]
    assert str(checkpoint) in refused(*arguments, "--output-dir", run, *changed)
    assert not trace.exists()


@contextmanager
def full_disk(run: Path, num_written: int, checkpoint: str) -> Iterator[None]:
    """Have the disk take no more, once `num_written` files are written and this checkpoint is begun."""
    write = CheckpointWriter.write
    written = []

    def write_to_full_disk(writer, path, write_to):
        def write_if_there_is_room(path):
            written.append(path)
            if len(written) > num_written and checkpoint in "".join(os.listdir(run / "checkpoint")):
                raise OSError(28, "No space left on device")
            write_to(path)

        write(writer, path, write_if_there_is_room)

    with mock.patch.object(CheckpointWriter, "write", write_to_full_disk):
        yield


@pytest.mark.parametrize("num_written, last_step, is_stopped", [(0, 6, False), (6, 6, False), (0, 5, True)])
def test_a_full_disk_leaves_the_checkpoint_before(num_written, last_step, is_stopped, run, arguments, capfd):
    """The error is told after a signal too: the run has not been saved."""
    contents_before = make.contents(run / "checkpoint")
    argv = [*arguments, "--output-dir", str(run)]
    with full_disk(run, num_written, f"step{last_step}"):
        if is_stopped:
            line = make.refused(drive, argv, stop_at=last_step)
        else:
            line = make.refused(drive, [*argv, "--steps", str(last_step), "--resume-with-changes"])
    assert "the last checkpoint could not be written" in line and "No space left" in line
    printed = capfd.readouterr().out
    assert (
        f"warning: no checkpoint at step {last_step}, the one before stays" in printed and "stopped at" not in printed
    )
    assert make.contents(run / "checkpoint") == contents_before
    assert drive(argv) == 0
    assert [line["step"] for line in make.lines(run)] == list(range(1, 9))


def test_other_settings_are_refused_with_their_differences_unless_asked_for(run, arguments):
    changed = [*arguments, "--output-dir", str(run), "--lr", "0.002", "--set", "loss.mse_reduction=sum"]
    contents_before = make.contents(run)
    line = refused(*changed)
    assert make.contents(run) == contents_before
    assert "optimizer.params.lr" in line and 'loss.mse_reduction: "mean" -> "sum"' in line
    assert drive([*changed, "--steps", "12", "--resume-with-changes"]) == 0
    rates = [line["lr"] for line in make.lines(run)]
    assert rates[4:] == pytest.approx([0.002 * OptimConfig().rate(step, 12) for step in range(5, 13)])


def test_a_new_run_has_done_nothing():
    state = vars(TrainState())
    assert state.pop("sums").shape == (0,)
    assert {name: value for name, value in state.items() if value} == {"world_size": 1, "accumulation": 1}


def test_a_changed_schedule_of_the_json_goes_on_at_the_step_reached(arguments, tmp_path):
    def rates(name: str, last_step: int, *options: str, stop_at: int | None = None) -> list[float]:
        params = {"total_num_steps": last_step, "warmup_num_steps": 2, "warmup_min_lr": 0, "warmup_max_lr": 0.01}
        content = {**ZERO1, "scheduler": {"type": "WarmupDecayLR", "params": params}}
        ds_config = make.json_file(tmp_path / "ds.json", content)
        words = ["--deepspeed_config", ds_config, "--output-dir", f"{tmp_path}/{name}"]
        drive([*arguments, *words, *options], stop_at=stop_at)
        return [line["lr"] for line in make.lines(tmp_path / name)]

    first_rates = rates("changed", 8, stop_at=4)
    straight = rates("straight", 12)  # of which 8 steps are taken
    assert rates("changed", 12, "--resume-with-changes") == first_rates + straight[4:]
    assert straight[-1] > 0.003, "the schedule before would end near 0"


def test_a_run_whose_source_is_a_run_goes_on_to_the_bit(stopped, arguments, tmp_path):
    words = [*arguments, "--start-from", str(stopped), "--set", "student.freeze_image=0", "--output-dir"]
    assert drive([*words, str(tmp_path / "straight")]) == 0
    assert drive([*words, str(tmp_path / "resumed")], stop_at=3) == 85
    assert drive([*words, str(tmp_path / "resumed")]) == 0
    assert_same(tmp_path / "resumed", tmp_path / "straight")


def test_the_best_result_on_other_data_does_not_count(run, arguments, tmp_path):
    other_source = make.pairs(tmp_path / "other", 12)
    start = find_start(TINY, "auto", run)
    assert start.state.best["step"] == 3
    start.config = load_preset("tiny", {"data": {"val_source": other_source}})
    start.check(DeepSpeedConfig.of(ZERO1).filled(start.config, 1, 8), accept_changes=True)
    assert start.state.best == {} and start.state.worse_in_row == 0


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers_that_do(monkeypatch):
    state = TrainState(world_size=2, train_batch_size=24, accumulation=2)
    start = RunStart(TINY, Path("run"), Path("run/checkpoint/step2"), state)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    kept = start.keep_batch(DeepSpeedConfig.of({**ZERO1, "train_micro_batch_size_per_gpu": 6}))
    assert [kept[key] for key in BATCH_KEYS] == [24, 4, 2]
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    with pytest.raises(UserError, match=r"24 = 12 pairs x 2 accumulation, which 5 ranks .*out of 1, 2, 3, 4, 6, 12"):
        start.keep_batch(DeepSpeedConfig.of(ZERO1))


def test_lines_after_the_resumed_step_are_removed_and_a_finished_run_changes_nothing(run, arguments, capfd):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # the process was killed while it wrote
    argv = [*arguments, "--output-dir", str(run)]
    assert drive(argv) == 0
    assert [line["step"] for line in make.lines(run)] == list(range(1, 9))
    assert (run / "checkpoint" / "latest").read_text() == "step8"
    contents_before = make.contents(run)
    assert drive(argv) == 0
    assert f"the run in {run} is finished, 8 steps" in capfd.readouterr().out
    assert make.contents(run) == contents_before


def test_resume_by_path_goes_on_elsewhere_and_again_and_another_path_is_refused(run, arguments, tmp_path, capfd):
    argv = [*arguments, "--output-dir", str(tmp_path / "new"), "--resume", str(run / "checkpoint" / "step2")]
    assert drive(argv, stop_at=4) == 85
    assert drive(argv) == 0  # the same command goes on with what it has itself
    assert f"resuming from {tmp_path / 'new' / 'checkpoint' / 'step4'}" in capfd.readouterr().out
    line = refused(*argv[:-1], run / "checkpoint" / "step4")
    assert "--resume" in line and "has checkpoints of its own" in line
    assert "no checkpoint there" in refused(*arguments, "--output-dir", tmp_path / "b", "--resume", tmp_path)
    assert drive([*arguments, "--resume", str(run)]) == 0
    assert make.contents(run)["model.safetensors"] == make.contents(tmp_path / "new")["model.safetensors"]


def test_never_is_refused_where_there_is_a_run_but_not_once_its_job_is_requeued(run, arguments, tmp_path, monkeypatch):
    contents_before = make.contents(run)
    never = [*arguments, "--resume", "never", "--output-dir"]
    assert "--resume is 'never'" in refused(*never, run)
    assert make.contents(run) == contents_before
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert drive([*never, str(tmp_path / "new")], stop_at=1) == 85
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert drive([*never, str(tmp_path / "new")], stop_at=2) == 85


def test_the_best_checkpoint_stays_and_a_run_out_of_patience_ends(arguments, tmp_path, capfd, monkeypatch):
    values = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.4, 10: 0.9}  # by step; the run ends before the last

    def best_result(best, split, result, step):
        is_better = values[step] > best.get("value", -1)
        return {"metric": "m", "value": values[step], "step": step, "pairs": 4, "chance": 0.25} if is_better else best

    monkeypatch.setattr("ds_cmli.run.best_result", best_result)
    run = tmp_path / "run"
    best_model = run / "model.best.safetensors"
    argv = [*arguments, "--output-dir", str(run), "--steps=12", "--eval-every=2"]
    argv += ["--save-every=0", "--keep=1", "--set", "run.patience=2", "--set", "run.keep_best=true"]
    assert drive(argv, stop_at=7) == 85
    assert sorted(path.name for path in (run / "checkpoint").glob("step*")) == ["step4", "step7"]
    weights = best_model.read_bytes()
    flip(best_model)
    assert drive(argv) == 0
    output = capfd.readouterr().out
    assert "ended at step 8: 2 evaluations in a row gave no better result" in output
    assert f"made from {run / 'checkpoint' / 'step4'}: model.best.safetensors" in output
    assert best_model.read_bytes() == weights
    assert sorted(path.name for path in (run / "checkpoint").glob("step*")) == ["step4", "step8"]
    # The run has ended. Its models are made again from its checkpoints.
    models = {path: path.read_bytes() for path in run.glob("model*.safetensors")}  # three
    for break_file in (flip, Path.unlink):
        for path in models:
            break_file(path)
        assert drive(argv) == 0
        output = capfd.readouterr().out
        assert "is finished, 8 steps" in output and output.count("made from ") == 2
        assert all(path.read_bytes() == content for path, content in models.items())
    shutil.rmtree(run / "checkpoint" / "step4")
    flip(best_model)
    assert drive(argv) == 0
    assert f"{best_model} is not the best of this run: removed" in capfd.readouterr().out and not best_model.exists()
