"""`ds_cmli.fit` in a process that goes on: mistakes, resuming; its bits are compared in test_train.py."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

import ds_cmli
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import UserError
from ds_cmli.faults import preemption
from ds_cmli.train import processes
from tests.checkpoint.runs import assert_same
from tests.conftest import ZERO1
from tests.make import metrics, pairs
from tests.ranks import run


@pytest.fixture
def data(tmp_path):
    return pairs(tmp_path / "pairs", count=33)


def settings(folder, **more):
    run = {"preset": "tiny", "output_dir": str(folder), **more}
    return {"run": run, "optim": {"steps": 4}}


def test_an_error_ends_the_run_and_the_next_call_goes_on(tmp_path, data, capsys, monkeypatch):
    def broken(step, values):
        if step == 3:
            raise ArithmeticError(step)

    step_losses = []

    def step_and_keep_the_loss(engine, *arguments):
        losses = take_step(engine, *arguments)
        step_losses.append(losses[0].total.item())
        return losses

    environment = dict(os.environ)
    logged = {}
    take_step = TrainEngine.step
    monkeypatch.setattr(TrainEngine, "step", step_and_keep_the_loss)
    sections = settings(tmp_path / "straight")
    straight = ds_cmli.fit(sections, Path(data), on_log=lambda step, values: logged.setdefault(step, {}).update(values))
    assert os.environ == environment
    batch = "8 pairs per rank x 1 accumulation x 1 ranks = 8 pairs a step"
    assert f"batch: {batch}; 4 steps; negatives from 8 pairs" in capsys.readouterr().out
    assert [values["loss"] for values in logged.values()] == pytest.approx(step_losses)
    assert straight.metrics["step"] == 4 and straight.metrics["loss"] == logged[4]["loss"]
    assert straight.model.embed_texts(["a", "b"]).cls.shape == (2, 32)
    sections = settings(tmp_path / "broken", save_every=2)
    with pytest.raises(ArithmeticError):
        ds_cmli.fit(sections, [data], on_log=broken)
    again = ds_cmli.fit(sections, data)  # from step 2
    assert_same(again.folder, straight.folder)
    assert ds_cmli.fit(sections, data).metrics == again.metrics  # the run has ended


def test_a_whole_configuration_in_a_process_group_of_the_script(tmp_path, data, capsys):
    config = load_preset("tiny", settings(tmp_path, log_every=9))
    values = config.to_dict()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ds_cmli.fit(config, data, deepspeed_config=ZERO1)
        assert config.to_dict() == values and dist.is_initialized()
        ds_cmli.fit(settings(tmp_path, log_every=9), data, deepspeed_config=ZERO1)
        assert "is finished" in capsys.readouterr().out and dist.is_initialized()
    finally:
        process_group.shutdown()


def test_only_a_single_process_that_goes_on_may_stand_still_in_a_debugger(alone):
    for keeps_process, seconds in ((True, 0.0), (False, 120.0)):
        with processes(load_preset("tiny", {}), keeps_process) as (_, watchdog):
            assert watchdog.timeout == seconds


def test_a_lack_of_memory_is_raised_a_signal_saves_and_signals_are_the_scripts_again(tmp_path, data, monkeypatch):
    def short(*_):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(TrainEngine, "step", short)
        with pytest.raises(UserError, match=r"^out of memory: rank 0\n  "):
            ds_cmli.fit(settings(tmp_path), data)
    handlers = [signal.getsignal(number) for number in preemption.SIGNALS]
    with pytest.raises(preemption.Preempted, match=str(tmp_path)):
        ds_cmli.fit(settings(tmp_path), data, on_log=lambda step, values: os.kill(os.getpid(), signal.SIGUSR1))
    assert (tmp_path / "checkpoint" / "latest").read_text() == "step1"
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == handlers
    assert preemption.end_request() is None
    assert ds_cmli.fit(settings(tmp_path), data).metrics["step"] == 4


def fit_on_ranks(rank, world, folder):
    def fit(name, **more):
        run = {"preset": "tiny", "output_dir": f"{folder}/{name}", "match_maps": 0}
        return ds_cmli.fit({"run": run, "optim": {"steps": 2, "micro_batch": 4}}, **more)

    first = fit("first")
    with pytest.raises(UserError, match=r"^data.source is '/nowhere'"):
        fit("none", data="/nowhere")
    return metrics(first.folder) == metrics(fit("second").folder)


def test_ranks_call_it_twice_and_go_on_after_a_mistake(tmp_path):
    assert run(fit_on_ranks, 2, str(tmp_path), group=False) == [True, True]
