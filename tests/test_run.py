"""The loading of a step's micro-batches by a run."""

from dataclasses import fields
from types import SimpleNamespace
from unittest.mock import MagicMock

from ds_cmli.run import Run


def test_the_watchdog_is_told_the_step_and_each_micro_batch():
    run = Run(**{field.name: MagicMock() for field in fields(Run) if field.init})
    run.state.step = 7
    run.engine.accumulation = 2
    run.checkpoints.due.return_value = False
    run.flags.any.return_value = (False, False, True)
    batches = [SimpleNamespace(bad=0), SimpleNamespace(bad=1)]

    assert run.take_micro_batches(iter(batches)) == (batches, True)

    assert [call.args for call in run.watchdog.heartbeat.call_args_list] == [(7,), (), ()]
    assert run.sampler.advance.call_count == 2
