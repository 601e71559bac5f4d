"""What a user sees of a run while it goes on."""

import sys

import pytest

from ds_cmli.metrics import Writer

VALUES = {"loss": 3.5, "loss/global": 1.25, "loss/cmli": 2.25, "lr": 1e-3, "pairs_per_s": 10.0}


@pytest.mark.parametrize("terminal", [True, False])
def test_each_loss_is_shown_on_a_terminal_and_away_from_one(terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "160")
    writer = Writer(tmp_path, 10)
    writer.advance()
    writer.log(1, VALUES)
    writer.close()
    shown = capsys.readouterr()
    assert "loss 3.5000  global 1.250  cmli 2.250" in (shown.err if terminal else shown.out)
