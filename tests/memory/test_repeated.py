"""A prediction that runs few of a step's micro-batches says what one says that runs them all."""

from contextlib import nullcontext

import pytest

from ds_cmli.common.probe import Probe
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed.traffic import Traffic

ACCUMULATION = 6  # of which two are not run
ONE_BLOCK = {"student": {"layers": 1}}
LOSSES = {"weights": {"global": 1.0, "cmli": 1.0}}  # without a teacher


def predicted(setting, monkeypatch, *, whole):
    from ds_cmli.memory import predict as module

    negatives, stage, precision, target, ranks = setting
    config = load_preset("tiny", {**ONE_BLOCK, "loss": LOSSES, "optim": {"negatives": negatives}})
    ds_config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}},
        precision: {"enabled": True},
    }
    traffic, forwards = Traffic(), []

    def watch(train_engine, step):
        if step == 0:
            train_engine.objective.student.register_forward_hook(lambda *_: forwards.append(1))
            return nullcontext()
        return traffic.counting()

    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(module, "Repeated", lambda *arguments: Probe())
        result = module.predict(config, ds_config, ranks, target=target, options=module.Options(watch=watch))
    return result, traffic.counts, len(forwards)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        ("global_batch", 2, "bf16", "cpu", 2),
        ("micro_batch", 3, "bf16", "cuda", 2),
    ],
    ids=lambda setting: "-".join(map(str, setting)),
)
def test_every_event_is_that_of_the_whole_step(setting, monkeypatch):
    entry, moved, forwards = predicted(setting, monkeypatch, whole=False)
    expected, all_moved, all_forwards = predicted(setting, monkeypatch, whole=True)
    assert forwards < all_forwards == 2 * ACCUMULATION * (2 if setting[0] == "global_batch" else 1)
    assert entry.events == expected.events  # blocks, bytes, categories, phases and operators, in their order
    assert entry.report == expected.report
    assert moved == all_moved and moved
