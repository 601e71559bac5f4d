"""Interrupted and resumed runs against unbroken ones: the same metrics, weights and samples."""

import json
import math
import shutil
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_cmli.checkpoint import files, restore
from ds_cmli.checkpoint.files import no_code
from ds_cmli.checkpoint.train_state import TrainState
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data.sampler import permutation
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults import preemption
from ds_cmli.run import Run
from tests.checkpoint.runs import TINY, assert_same, json_file, ranks
from tests.conftest import ZERO1, set_one_process
from tests.drive_train import drive
from tests.make import pairs
from tests.metrics_file import metrics
from tests.ranks import free_port
from tests.stranger.drive import ONE_BLOCK

pytestmark = pytest.mark.usefixtures("alone")


def test_the_best_checkpoint_stays_and_a_run_out_of_patience_ends_and_is_finished(source, tmp_path, capfd, monkeypatch):
    from ds_cmli.evaluate import report

    values = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.4, 10: 0.9}  # by step; the run ends before the last

    def best(before, split, result, step):
        value = values[step]
        now = {"metric": "m", "value": value, "step": step, "pairs": 4, "chance": 0.25}
        return before if value <= before.get("value", -1) else now

    monkeypatch.setattr(report, "best", best)
    folder = tmp_path / "run"
    arguments = [*TINY[:2], "--steps", "12", "--eval-every", "2", *source, *json_file(tmp_path / "ds.json", ZERO1)]
    arguments += ["--set", "run.patience=2", "--set", "run.keep_best=true", "--keep", "1", "--output-dir", str(folder)]
    arguments += ["--set", "optim.ema_decay=0.5"]  # the best is that of the averaged weights
    assert drive(arguments, stop_at=7) == 85
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["latest", "step4", "step7"]
    best_weights = (folder / "student-best.safetensors").read_bytes()
    assert best_weights == (folder / "checkpoint" / "step4" / "student_ema.safetensors").read_bytes()
    assert best_weights != (folder / "student_ema.safetensors").read_bytes()
    assert drive(arguments) == 0
    assert "ended at step 8: 2 evaluations in a row gave no better result" in capfd.readouterr().out
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["latest", "step4", "step8"]
    assert (folder / "student-best.safetensors").read_bytes() == best_weights
    before = (folder / "metrics.jsonl").read_text()
    assert drive(arguments) == 0
    assert "is finished, 8 steps" in capfd.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before


STAGES = {"zero 2": {"zero_optimization": {"stage": 2}}, "zero 3": {"zero_optimization": {"stage": 3}}}
BATCH, EPOCH = 12, 3  # pairs a step; steps of an epoch of 41 pairs
BREAK, STEPS = 2, 5  # steps before the change, steps in all


# (ZeRO stage, ranks before and after): each change, and each stage both ways.
CHANGES = (("zero 2", "2 to 1"), ("zero 2", "2 to 3"), ("zero 3", "1 to 2"), ("zero 3", "2 to 1"))


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Runs of one global batch in fp32: straight on two ranks, and broken by a change to another number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    common = ["--preset", "tiny", "--steps", str(STEPS), "--data", pairs(folder / "pairs", count=43)]
    common += ["--set", "run.eval_batch=3", "--set", "run.match_maps=0", *ONE_BLOCK]
    common += ["--set", "student.freeze_image=1", "--set", "optim.layer_decay=0.7"]

    def task(world_size, stage, name, stop):
        run = str(folder / f"{stage}-{name}")
        arguments = [*common, *json_file(folder / f"{stage}.json", STAGES[stage]), "--output-dir", run]
        arguments += ["--micro-batch", str(BATCH // world_size)]
        return {"arguments": arguments, "seen": f"{run}.seen", "stop_at": stop, "port": free_port()}

    before = [(2, stage, "straight", None) for stage in dict(CHANGES)]
    before += [(int(change[0]), stage, change, BREAK) for stage, change in CHANGES]
    after = [(int(change[-1]), stage, change, None) for stage, change in CHANGES]
    for part, world_size in product((before, after), (1, 2, 3)):
        tasks = [task(*item) for item in part if item[0] == world_size]
        expected = [85 if task["stop_at"] else 0 for task in tasks]
        if world_size > 1 and tasks:
            assert ranks(world_size, tasks)[0] == expected
            continue
        with pytest.MonkeyPatch.context() as patch:
            set_one_process(patch)
            assert [drive(task["arguments"], task["stop_at"], task["seen"]) for task in tasks] == expected
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage, change", CHANGES)
def test_another_number_of_ranks_goes_on_with_the_same_batches(changed, stage, change):
    straight, broken = (changed / f"{stage}-{name}" for name in ("straight", change))
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (straight, broken)]
    assert len(losses[1]) == STEPS
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert worst < 1e-4, losses
    print(f"{stage}, {change} ranks: largest difference of a loss {worst:.1e}")
    resolved = json.loads((broken / "config.json").read_text())["deepspeed"]
    assert resolved["train_batch_size"] == BATCH
    assert resolved["train_micro_batch_size_per_gpu"] == BATCH // int(change[-1])
    weights = [load_file(run / "student.safetensors") for run in (straight, broken)]
    assert max((a - weights[1][name]).abs().max() for name, a in weights[0].items()) < 1e-3
    assert not list((broken / "checkpoint").glob("*.writing"))

    # Each sample of the first epoch once, but for the 5 of 41 that its last incomplete batch would have had.
    samples = samples_of_epoch(changed, f"{stage}-{change}")
    assert len(samples) == len(set(samples)) == EPOCH * BATCH
    assert sorted(samples) == sorted(permutation(41, 0, 0)[: EPOCH * BATCH].tolist())


def samples_of_epoch(folder: Path, name: str) -> list[int]:
    """Everything trained on in the first epoch, before and after the change of ranks."""
    before, after = int(name[-6]), int(name[-1])
    out = []
    for rank in range(max(before, after)):
        lines = [json.loads(line) for line in (folder / f"{name}.seen.{rank}").read_text().splitlines()]
        first = BREAK if rank < before else 0  # how many of the lines are from before
        out += [i for line in lines[:first] for i in line]
        out += [i for line in lines[first : first + EPOCH - BREAK] for i in line] if rank < after else []
    return out


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers_that_do(monkeypatch):
    result = restore.ResumePoint(Path("run"), TrainState(train_batch_size=24, accumulation=2), 2, [])
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    rebatched = restore.rebatch(result, DeepSpeedConfig.of({**ZERO1, "train_micro_batch_size_per_gpu": 6}))
    assert [rebatched[key] for key in BATCH_KEYS] == [24, 4, 2]
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    with pytest.raises(UserError) as error:
        restore.rebatch(result, DeepSpeedConfig.of(ZERO1))
    assert "24 = 12 pairs x 2 accumulation, which 5 ranks cannot share evenly" in str(error.value)
    assert "out of 1, 2, 3, 4, 6, 12" in str(error.value)


def test_a_batch_once_rebatched_for_other_ranks_stays_so_at_every_later_start(monkeypatch):
    config, said = load_preset("tiny", {}), []  # 8 pairs per rank

    def start(ranks, result):
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        options = restore.rebatch(result, DeepSpeedConfig.of({"zero_optimization": {"stage": 2}}))
        resolved = options.filled(config.optim, ranks, 20)
        return restore.state_of(result, config, resolved, False, said.append)

    state = start(2, None)
    assert (state.train_batch_size, state.world_size, state.rebatched) == (16, 2, False)
    for count, before in ((1, 2), (1, 1), (2, 1), (2, 2)):
        state = start(count, restore.ResumePoint(Path("run/checkpoint/step1"), state, before, []))
        assert (state.train_batch_size, state.world_size, state.rebatched) == (16, count, True)
    assert sum("universal" in line for line in said) == 2


@pytest.fixture(scope="module")
def stopped(source, tmp_path_factory) -> Path:
    """A run stopped at step 4 of 12, with checkpoints of step 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        set_one_process(patch)
        assert drive([*TINY, *source, "--save-every", "2", "--output-dir", str(folder)], stop_at=4) == 85
    return folder


@pytest.fixture
def copied(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_other_settings_are_refused_with_their_differences_unless_asked_for(copied, source):
    arguments = [*TINY, *source, "--output-dir", str(copied), "--lr", "0.002", "--set", "loss.mse_reduction=sum"]
    with pytest.raises(UserError) as error:
        drive(arguments)
    assert "deepspeed.optimizer.params.lr: 0.001 -> 0.002; loss.mse_reduction: " in str(error.value)
    assert 'loss.mse_reduction: "mean" -> "sum"' in str(error.value) and "\n" not in str(error.value)
    assert drive([*arguments, "--resume-with-changes"]) == 0
    # Warm-up took one step: step 6 is the 5th of the 11 of the cosine that would end with a 12th, from the new peak.
    rate = next(line["lr"] for line in metrics(copied) if line["step"] == 6 and "lr" in line)
    assert rate == pytest.approx(0.002 * 0.5 * (1 + math.cos(math.pi * 5 / 12)), rel=1e-6)
    assert [line["step"] for line in metrics(copied) if "loss" in line] == [3, 6, 9, 12]


def test_what_does_not_touch_training_may_change(copied, source):
    arguments = [*TINY, *source, "--output-dir", str(copied), "--save-every", "5", "--keep", "3", "--workers", "1"]
    assert drive(arguments) == 0
    assert sorted(p.name for p in (copied / "checkpoint").glob("step*")) == ["step10", "step12", "step5"]


def test_a_finished_run_says_so_and_changes_nothing(copied, source, capfd):
    arguments = [*TINY, *source, "--output-dir", str(copied)]
    assert drive(arguments) == 0
    times = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    times.pop(copied / "metrics.jsonl")
    capfd.readouterr()
    assert drive(arguments) == 0
    assert f"the run in {copied} is finished, 12 steps" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_lines_after_the_resumed_step_are_truncated(copied, source, tmp_path):
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # the process was killed while it wrote
    arguments = [*TINY, *source, "--output-dir"]
    assert drive([*arguments, str(copied)]) == 0
    assert [line["step"] for line in metrics(copied)] == [3, 5, 6, 9, 10, 12, 12]
    events = EventAccumulator(str(copied / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [3, 6, 9, 12]


def test_resume_by_path_goes_on_in_another_folder_or_the_same(copied, source, tmp_path, capfd):
    arguments = [*TINY, *source]
    assert drive([*arguments, "--output-dir", str(tmp_path / "new"), "--resume", str(copied / "checkpoint/step2")]) == 0
    assert [line["step"] for line in metrics(tmp_path / "new") if "loss" in line] == [3, 6, 9, 12]
    # Started again in the same way, as after an interruption, it goes on with what it has itself.
    assert drive([*arguments, "--output-dir", str(tmp_path / "new"), "--resume", str(copied / "checkpoint/step2")]) == 0
    assert "is finished, 12 steps" in capfd.readouterr().out
    assert drive([*arguments, "--resume", str(copied)]) == 0
    assert_same_weights(tmp_path / "new", copied)
    with pytest.raises(UserError, match="no checkpoint there"):
        drive([*arguments, "--resume", str(tmp_path), "--output-dir", str(tmp_path / "other")])


def test_never_is_refused_where_there_is_a_run(copied, source):
    before = snapshot(copied)
    with pytest.raises(UserError, match=r"--resume is 'never', and .* has a run: give another --output-dir"):
        drive([*TINY, *source, "--output-dir", str(copied), "--resume", "never"])
    assert snapshot(copied) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_never_is_done_with_once_a_slurm_job_is_requeued(source, tmp_path, monkeypatch, capfd):
    arguments = [*TINY, *source, "--output-dir", str(tmp_path / "new"), "--resume", "never"]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert drive(arguments, stop_at=1) == 85
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert drive(arguments, stop_at=2) == 85
    assert f"resuming from {tmp_path / 'new' / 'checkpoint' / 'step1'}" in capfd.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job's run is not gone on with
    with pytest.raises(UserError, match="has a run"):
        drive(arguments)


def assert_same_weights(folder: Path, other: Path) -> None:
    assert (folder / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()


def rewrite(checkpoint: Path, name: str, change) -> None:
    """A file of a checkpoint changed by `change(path)`, and the checksums with it."""
    change(checkpoint / name)
    entries = files.read_checksums(checkpoint)
    entries[name] = files.describe(checkpoint / name)
    files.write_checksums(checkpoint, entries)


def test_a_state_of_a_newer_version_is_one_line(copied, source):
    def newer(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), "phase": 3}))

    rewrite(copied / "checkpoint" / "step4", "state.json", newer)
    with pytest.raises(UserError, match=r"step4/state.json has phase, which this version does not know: go on with"):
        drive([*TINY, *source, "--output-dir", str(copied)])


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(copied, source):
    def spoiled(path):
        with no_code():
            values = torch.load(path, weights_only=True)
        values["module"]["student.text.model.embeddings.word_embeddings.weight"][-1] = torch.nan
        torch.save(values, path)

    rewrite(copied / "checkpoint" / "step4", "mp_rank_00_model_states.pt", spoiled)
    with pytest.raises(UserError, match=r"step4: its weights.student.text.* is not finite: give an earlier checkpoint"):
        drive([*TINY, *source, "--output-dir", str(copied)])


def test_damaged_lines_of_metrics_are_kept_and_told(copied, source, capfd):
    file = copied / "metrics.jsonl"
    good = file.read_text()
    file.write_text('{"step": 1, "lo\n' + good + "[1]\n\x00\x00\n")
    assert drive([*TINY, *source, "--output-dir", str(copied)], stop_at=5) == 85
    assert f"warning: 3 lines of {file} cannot be read: kept in " in capfd.readouterr().out
    assert file.read_text().startswith(good)
    assert (copied / "metrics.damaged.jsonl").read_text() == '{"step": 1, "lo\n[1]\n\x00\x00\n'


def test_lines_of_metrics_that_were_changed_are_kept_and_told(copied, source, capfd):
    file = copied / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    other = lines[0].replace('"loss":', '"lors":')
    file.write_text("".join([other, *lines[1:]]))
    assert drive([*TINY, *source, "--output-dir", str(copied)], stop_at=5) == 85
    line = f"warning: {file}: line 1 does not agree with its checksum in metrics.jsonl.crc32: kept in "
    assert line + str(copied / "metrics.damaged.jsonl") in capfd.readouterr().out
    assert other not in file.read_text()
    assert (copied / "metrics.damaged.jsonl").read_text() == other
    assert drive([*TINY, *source, "--output-dir", str(copied)], stop_at=6) == 85
    assert "does not agree" not in capfd.readouterr().out


def test_a_run_without_checksums_of_its_lines_gets_them(copied, source, capfd):
    sums = copied / "metrics.jsonl.crc32"
    before, _ = sums.read_bytes(), sums.unlink()
    assert drive([*TINY, *source, "--output-dir", str(copied)], stop_at=5) == 85
    assert "warning" not in capfd.readouterr().out
    assert sums.read_bytes().startswith(before) and len(sums.read_bytes()) == 9 * len(metrics(copied))


def test_a_full_disk_under_tensorboard_is_one_line(tmp_path, monkeypatch, capfd):
    from tensorboard.summary.writer.record_writer import RecordWriter

    from ds_cmli.metrics import Writer

    def full(writer, data):
        raise OSError(28, "No space left on device")

    writer = Writer(tmp_path, 5)
    writer.draw(1, loss=1.0)
    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(2, 6):
        writer.draw(step, loss=1.0)
        time.sleep(0.1)
    writer.close()
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert printed.out.count("warning: metrics cannot be written now: [Errno 28]") == 1


def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied, source, tmp_path, capfd):
    file = next((copied / "checkpoint" / "step4").glob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    arguments = [*TINY, *source, "--output-dir"]
    assert drive([*arguments, str(copied)]) == 0
    out = capfd.readouterr().out
    assert f"step4 is damaged: {file.name} does not match its checksum" in out
    assert f"resuming from {copied / 'checkpoint' / 'step2'}" in out
    assert drive([*arguments, str(tmp_path / "straight")]) == 0
    assert_same(tmp_path / "straight", copied)
    for path in (copied / "checkpoint").glob("step*/state.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"state.json cannot be read.*there is no other"):
        drive([*arguments, str(copied)])


@pytest.mark.parametrize("ds_json", [ZERO1, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}])
def test_an_evaluation_of_averages_that_fails_saves_the_weights(ds_json, source, tmp_path, monkeypatch):
    """Started again, the run is as one that was never broken off."""
    arguments = [*TINY, "--steps", "6", *source, "--set", "optim.ema_decay=0.9", *json_file(tmp_path / "ds", ds_json)]
    assert drive([*arguments, "--output-dir", str(tmp_path / "straight")]) == 0
    splits = Run._evaluate_splits

    def fails(run, suffix, counts):
        if suffix:
            raise UserError("a data loading process was killed")
        splits(run, suffix, counts)

    broken = [*arguments, "--output-dir", str(tmp_path / "broken")]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_evaluate_splits", fails)
        assert drive(broken, mistakes=True) == 2
    assert drive(broken) == 0
    assert_same(tmp_path / "straight", tmp_path / "broken")


def test_a_run_stopped_in_its_evaluation_does_it_again(source, tmp_path, monkeypatch):
    arguments = [*TINY, *source, "--output-dir"]
    poll, calls, signals = Run.poll, [], []

    def signalled(run):
        calls.append(run.state.step)
        if calls in signals:
            preemption._received.append("SIGTERM")
        poll(run)

    monkeypatch.setattr(Run, "poll", signalled)
    assert drive([*arguments, str(tmp_path / "straight")]) == 0
    times = calls.count(5)  # that an evaluation looks for signals
    assert times > 1 and calls == [5] * times + [10] * times + [12] * times
    first = [5, 5]  # the signal comes within the first evaluation, and at the beginning of the last one
    whole = first + [5] * times + [10] * times
    signals += [first, [*whole, 12]]
    calls.clear()
    assert drive([*arguments, str(tmp_path / "broken")]) == 85
    assert drive([*arguments, str(tmp_path / "broken")]) == 85
    assert drive([*arguments, str(tmp_path / "broken")]) == 0
    assert calls == [*whole, 12] + [12] * times
    assert_same(tmp_path / "straight", tmp_path / "broken")


def test_a_rank_whose_data_fail_ends_all_with_the_same_line(tmp_path):
    folder = Path(pairs(tmp_path / "pairs", count=400))
    for number in range(100, 320):
        (folder / f"{number}.png").write_bytes(b"not a picture")
    arguments = ["--preset", "tiny", "--steps", "50", "--data", str(folder), "--set", "data.max_bad_share=1"]
    codes, output = ranks(2, [{"arguments": [*arguments, "--output-dir", str(tmp_path / "run")],
                                         "mistakes": True}], timeout=120)  # fmt: skip
    assert codes == [2]
    lines = [line for line in output.splitlines() if line.startswith("error: rank ")]
    assert len(lines) == 2 and lines[0] == lines[1] and "100 samples in a row" in lines[0]


def test_deterministic_runs_repeat_their_bits(source, tmp_path):
    # PyTorch fills what is made empty then, and a bucket has 2 GB if it is not told its size.
    config = json_file(tmp_path / "ds.json", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}})
    arguments = [*TINY, *source, *config, "--deterministic", "--output-dir"]
    try:
        assert [drive([*arguments, str(tmp_path / name)]) for name in "ab"] == [0, 0]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(tmp_path / "a", tmp_path / "b")
