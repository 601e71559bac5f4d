"""What a user sees of a run while it goes on."""

import re
import sys
import time

import pytest

from ds_cmli.metrics import Meter, Writer

VALUES = {"loss": 3.5, "loss/global": 1.25, "loss/cmli": 2.25, "lr": 1e-3, "pairs_per_s": 10.0}


@pytest.mark.parametrize("terminal, columns", [(True, 160), (True, 80), (True, 50), (False, 80)])
def test_each_loss_is_shown_on_a_terminal_and_away_from_one(terminal, columns, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    writer = Writer(tmp_path, 10)
    writer.advance()
    writer.log(1, VALUES)
    writer.close()
    shown = capsys.readouterr()
    (line,) = [line for line in shown.out.splitlines() if "loss" in line]
    assert "step 1/10  loss 3.5000  global 1.250  cmli 2.250" in line
    assert ("pairs/s" in line) == (columns > 50)
    if terminal:
        assert len(line.strip()) < max(columns, 52)
        assert "|" in shown.err and "1/10 [" in shown.err and "loss" not in shown.err  # the bar, and the time left
    else:
        assert not shown.err and "\r" not in shown.out and line.endswith("left")


def test_a_slow_step_has_a_speed_and_a_whole_minute_left(tmp_path, capsys, monkeypatch):
    meter = Meter()
    meter.pairs, meter.since = 1, time.monotonic() - 30
    columns = meter.lap()
    writer = Writer(tmp_path, 2)
    writer.started = time.monotonic() - 179.7
    writer.log(1, {**VALUES, **columns})
    assert re.search(r"  0\.033\d+ pairs/s  3m00s left", capsys.readouterr().out)


def test_where_the_time_goes(tmp_path, capsys):
    shares = {"time/data": 0.004, "time/forward": 0.301, "time/backward": 0.66, "time/step": 0.035}
    Writer(tmp_path, 2).log(1, {**VALUES, **shares})
    assert "  10 pairs/s  forward 30% backward 66% step 4%  " in capsys.readouterr().out


def test_a_long_step_says_where_its_time_goes(tmp_path, capsys):
    writer, so_far = Writer(tmp_path, 9), {"data": 0.1, "forward": 30.0, "loss": 70.0}
    writer.say_alive(4, lambda: so_far)  # not yet
    writer.said -= 11
    writer.say_alive(4, lambda: {"data": 0.0})  # a GPU that has not come so far
    for _ in range(2):  # the second time that line has just been printed
        writer.say_alive(4, lambda: so_far)
    assert capsys.readouterr().out == "in step 4: forward 30% loss 70% of 100 s\n"


def test_a_start_keeps_no_line_of_an_evaluation_that_is_still_to_be_done(tmp_path):
    writer = Writer(tmp_path, 9, report_to=())
    for step, values in ((1, VALUES), (2, {"eval/a/x": 0.5}), (2, {"eval/b/x": 0.5}), (2, {"eval/a_ema/x": 0.5})):
        writer.log(step, values)
    assert (writer.lines_at(2, False), writer.lines_at(2, True), writer.lines_at(3, False)) == (1, 4, 4)


def test_a_peak_that_a_step_exceeds_is_measured_again():
    meter, measured = Meter(), []
    meter.measure = lambda: measured.append(4e12) or 4e12
    meter.peak = 1e12  # while something else ran
    for expected in (0.5, 0.5):
        meter.timer.marks, meter.timer.flops = [("forward", 0.0), (None, 1.0)], 2e12
        assert meter.lap()["mfu"] == expected
    assert measured == [4e12]
