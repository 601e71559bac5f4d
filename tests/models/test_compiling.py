"""Compiled blocks: the losses of uncompiled ones, with and without checkpointing, and what is refused."""

from dataclasses import replace

import pytest
import torch

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group as distributed
from ds_cmli.memory.predict import longest_batch, without_weights
from ds_cmli.models.compiling import cannot_compile
from tests.config.test_mistakes import fail

# One block of each kind, and dropout, which is to draw what it draws without the compiler.
TINY = {"student": {"layers": 1, "dropout": 0.2}, "teacher": {"block": 0}, "optim": {"warmup_share": 0.0, "lr": 0.001}}
COMPILED = load_preset("tiny", {"run": {"compile": "blocks"}})
HERE = cannot_compile(COMPILED, torch.device("cpu"))


def losses(compile_, stage, checkpointing):
    """Of three steps in fp32."""
    config, vocab_size = without_weights(load_preset("tiny", TINY))
    config.run = replace(config.run, compile=compile_)
    json = {
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
        **({"activation_checkpointing": {}} if checkpointing else {}),
    }  # fmt: skip
    train_engine = engine.build(
        config, engine.filled(config, DeepSpeedConfig.of(json), 1, 100), vocab_size, 100, distributed.init()
    )
    found = []
    for step in range(3):
        torch.manual_seed(step)
        batch = longest_batch(config, 4)
        batch.image.random_(0, 256)
        batch.input_ids.random_(5, 200)
        found.append(train_engine(batch)[0].item())
    train_engine.engine.destroy()
    return found


@pytest.mark.skipif(HERE is not None, reason=str(HERE))
@pytest.mark.parametrize(("stage", "checkpointing"), [(3, True), pytest.param(0, False, marks=pytest.mark.soak)])
def test_the_losses_of_uncompiled_blocks(device, stage, checkpointing):
    plain, compiled = (losses(kind, stage, checkpointing) for kind in ("off", "blocks"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_without_a_compiler_it_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = cannot_compile(COMPILED, torch.device("cpu"))
    assert line == (
        "run.compile is 'blocks' and there is no C++ compiler 'no-such-compiler' (CXX): install it, or give 'off'"
    )


def test_memory_of_compiled_blocks_is_not_set_beside_the_prediction(monkeypatch, capsys):
    from ds_cmli import train

    arguments = ["--preset", "tiny", "--set", "run.compile=blocks", "--profile-memory", "2"]
    assert "run.compile is 'blocks' and --profile-memory is 2" in fail(train.command, arguments, monkeypatch, capsys)
