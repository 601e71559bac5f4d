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

    negatives, on_host, stage, precision, target, ranks = setting
    config = load_preset(
        "tiny", {**ONE_BLOCK, "loss": LOSSES, "optim": {"negatives": negatives, "cache_on_host": on_host}}
    )
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
        ("global_batch", False, 2, "bf16", "cpu", 2),
        ("micro_batch", False, 3, "bf16", "cuda", 2),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "negatives, stage, target, loss, texts, ranks, batch, count",
    [
        ("global_batch", 1, "cpu", {"cmli_exchange": "ring"}, None, 9, 2, 2),
        # The last tile has 1 text.
        ("global_batch", 2, "cuda", {"cmli_exchange": "gather"}, 3, 2, 7, 2),
    ],
    ids=["ring", "tiles"],
)
def test_uniform_loops_are_those_of_all_their_turns(
    negatives, stage, target, loss, texts, ranks, batch, count, monkeypatch
):
    from ds_cmli.losses.tiles import TileSide
    from ds_cmli.memory import predict as module
    from ds_cmli.memory import repeated

    if texts is not None:
        monkeypatch.setattr(TileSide, "texts_of_a_tile", lambda *_: texts)
    optim = {"negatives": negatives, "micro_batch": batch}
    ds_config = {
        "gradient_accumulation_steps": count, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}
    }  # fmt: skip
    results = []
    for turns in (repeated.TURNS, 1000):
        monkeypatch.setattr(repeated, "TURNS", turns)
        traffic = Traffic()
        prediction = module.predict(
            load_preset("tiny", {**ONE_BLOCK, "loss": LOSSES | loss, "optim": optim}), ds_config, ranks, target=target,
            options=module.Options(
                watch=lambda train_engine, step, traffic=traffic: traffic.counting() if step else nullcontext()
            ),
        )  # fmt: skip
        report = prediction.report
        # ZeRO-3 tells the other ranks once in which order modules ran: a list that leaves out the same turns.
        traffic.counts.pop(("rest", "broadcast"), None)
        results.append((report.phases, report.categories, report.totals, traffic.counts, len(prediction.events)))
    assert results[0][:-1] == results[1][:-1]
    assert results[0][-1] < results[1][-1]
    if loss.get("cmli_exchange") == "ring":  # each micro-batch's texts and their gradients go round
        assert results[0][-2]["text", "send"].calls >= 2 * (ranks - 1) * 2
