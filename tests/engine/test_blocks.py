"""The blocks compiled, also under activation checkpointing: losses as without."""

from itertools import count
from unittest import mock

import pytest
import torch

from tests import make


def losses_of_steps(device, compile_):
    """Return the losses of three steps in fp32 with dropout, which must draw what it draws without the compiler."""
    json = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}, "activation_checkpointing": {}}
    chosen = {"student": {"dropout": 0.2}, "loss": {"weights": {"global": 1.0}}, "run": {"compile": compile_}}
    trained = make.train_engine(device, json, **chosen)
    losses = []
    for number, batch in enumerate(make.batches(make.data_of(make.config()), 4, 3)):
        torch.manual_seed(number)
        losses.append(make.step(trained, [batch])["total"])
    trained.engine.destroy()
    return losses


@pytest.mark.slow
def test_the_losses_of_a_traced_block(device, monkeypatch):
    """A block of the image encoder is traced by torch.compile, forward and backward, and its operators run as they are:
    Inductor takes 20 s of each block, and the tracing of each some seconds."""
    number = count()
    compile_ = torch.compile

    def traced_or_not(function, **options):
        return compile_(function, backend="aot_eager", **options) if next(number) == 0 else function

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = losses_of_steps(device, "off")  # which imports what compiles functions of its own
    monkeypatch.setattr(torch, "compile", traced_or_not)
    assert losses_of_steps(device, "blocks") == pytest.approx(plain, rel=1e-4)
    assert next(number) == 2  # and that of the text encoder; the one of both is called twice
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_divided_leaf_modules_are_evaluated_also_where_the_first_layers_are_frozen(source, tmp_path):
    """Blocks that are compiled under ZeRO-3 are its leaf modules; evaluation uses other methods than forward."""
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    options = {"--deepspeed_config": make.json_file(tmp_path / "ds.json", zero), "--losses": "global,cmli"}
    options |= {"--steps": 2, "--eval-every": 1}
    losses = {}
    for kind in ("off", "blocks"):
        settings = {"run.compile": kind, "student.layers": 2, "student.freeze_image": 1}
        with mock.patch("torch.compile", lambda function, **_: function):  # which takes minutes
            assert make.train(*make.small(options | {"--output-dir": tmp_path / kind}, settings), *source) == 0
        assert [line["step"] for line in make.lines(tmp_path / kind, "eval/val/pairs")] == [1, 2]
        losses[kind] = [line["loss"] for line in make.lines(tmp_path / kind)]
    assert len(losses["off"]) == 2 and losses["blocks"] == pytest.approx(losses["off"], rel=1e-6)
