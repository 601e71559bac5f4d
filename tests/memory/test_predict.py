"""Predictions against PyTorch's allocator on this CPU, and what a prediction must never do: leave something behind."""

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig

from ds_cmli import engine
from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data import assets
from ds_cmli.distributed import process_group as distributed
from ds_cmli.memory import search
from ds_cmli.memory.fake import Answers, fake_world
from ds_cmli.memory.inputs import NotPredictable, longest_batch, without_weights
from ds_cmli.memory.largest_rank import predict_largest
from ds_cmli.memory.predict import DEFAULT_GPU, Options, predict
from ds_cmli.memory.report import CATEGORIES, gigabytes
from ds_cmli.memory.tracker import MemoryTracker
from ds_cmli.memory_model import gpus
from profiling.memory.measure_cpu import measure
from tests.ranks import python

ALL = ("global", "cmli", "target_cmli")
# For what does not depend on their number: a prediction takes a second for each.
ONE_BLOCK = {"student": {"layers": 1}, "teacher": {"block": 0}}
TWO_BLOCKS = {"student": {}, "teacher": {}}  # the preset's own
SCALARS = 256  # bytes: the few numbers that operators and the engine hold for a moment


def ds_json(stage=2, precision="bf16", accumulation=1, checkpointing=False, bucket=100_000) -> dict:
    out = {
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": stage > 0}},
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": bucket,
        },
    }
    if precision != "fp32":
        out[precision] = {"enabled": True}
    return {**out, "activation_checkpointing": {}} if checkpointing else out


def preset(name="tiny", batch=8, losses=ALL, **overrides):
    """With one block in each tower, unless student and teacher are given."""
    usual = {"optim": {"micro_batch": batch}, "loss": {"weights": dict.fromkeys(losses, 1.0)}, **ONE_BLOCK}
    return load_preset(name, usual | overrides)


CELLS = {
    "ZeRO-2 of 8": (preset(batch=32), ds_json(), 8),
    "ZeRO-3 of 2": (preset(losses=("cmli",), **TWO_BLOCKS), ds_json(3), 2),
    "fp32": (preset(student={"dropout": 0.1}), ds_json(1, "fp32"), 1),
    "autocast": (preset(), {**ds_json(1, "fp32"), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 2),
    "fp32 accumulation": (preset(), {**ds_json(1), "data_types": {"grad_accum_dtype": "fp32"}}, 2),
    "teacher's blocks averaged, accumulation": (
        preset(teacher={"average_blocks": 2}), ds_json(1, accumulation=3), 2
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_predicted_equals_the_allocator(name):
    config, ds_config, world_size = CELLS[name]
    predicted = predict(config, ds_config, world_size, target="cpu", options=Options(backend="fake")).report
    measured = measure(config, ds_config, world_size)
    ours, theirs = predicted.totals["requested"], measured.totals["requested"]
    print(f"predicted {ours:,} B, measured {theirs:,} B: {ours - theirs:+,} B")
    assert abs(ours - theirs) <= SCALARS
    for phase, size in measured.phases.items():
        assert abs(predicted.phases[phase] - size) <= SCALARS, phase
    assert sum(predicted.categories.values()) == ours
    for category in CATEGORIES:
        most = SCALARS if category == "temporaries" else 0
        assert abs(predicted.categories[category] - measured.categories[category]) <= most, category


@pytest.mark.slow
def test_optimizer_states_and_master_weights_fall_as_one_over_ranks():
    config = preset(losses=("global",))
    objective, _ = engine.build_models(*without_weights(config))
    groups = [sum(p.numel() for p in group["params"]) for group in engine.parameter_groups(objective, 0.1)]
    for world in (1, 64):
        result = predict(config, ds_json(), world).report.categories
        share = sum(-(-numbers // (2 * world)) * 2 for numbers in groups)  # each padded to a multiple of 2 x ranks
        assert result["master weights"] == 4 * share
        assert result["optimizer states"] == 8 * share + 2 * 4  # two moments, and the count of each of two groups


def test_packaged_weights_are_predicted_with_their_own_sizes():
    config, words = without_weights(load_preset("demo", {}))
    packaged = AutoConfig.from_pretrained(assets.fetch("minilm")).to_dict()
    assert packaged["vocab_size"] == words and packaged["model_type"] == config.student.text_model
    assert len(config.student.text_overrides) == 4
    assert config.student.text_overrides.items() <= packaged.items()


@pytest.mark.slow
def test_nothing_remains():
    """A training in the same process gives the same bits, before and after predictions that end well or badly."""
    config = preset()
    resolved = DeepSpeedConfig.of(ds_json(checkpointing=True)).filled(config.optim, 1, 10)

    def train() -> list[float]:
        train_engine = engine.build(config, copy.deepcopy(resolved), 300, 10, distributed.init())
        losses = [train_engine(longest_batch(config, 8))[0].item() for _ in range(3)]
        distributed.shutdown()
        return losses

    before, apply, hook, generator = train(), nn.Module._apply, sys.excepthook, torch.get_rng_state()
    sizes = [predict(config, ds_json(checkpointing=True), world).report.totals["requested"] for world in (1, 8, 1)]
    assert sizes[0] == sizes[2] != sizes[1]
    with pytest.raises(UserError, match="no_such_model"):
        predict(preset(student={"image_model": "no_such_model"}), ds_json(), 2)
    assert nn.Module._apply is apply and sys.excepthook is hook
    assert torch.equal(torch.get_rng_state(), generator)
    assert type(torch.empty(1)) is torch.Tensor
    assert "RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1"
    assert train() == before


@pytest.mark.slow
def test_what_ranks_have_alike_is_made_once(monkeypatch):
    """The events of ZeRO-3 are those of its loops over all ranks, shares of unequal and of no size included."""
    ds_config = ds_json(3)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    operators = []
    see = MemoryTracker._see_results
    monkeypatch.setattr(MemoryTracker, "_see_results", lambda *args: (operators.append(1), see(*args))[1])
    config = preset(batch=2, losses=("global",))
    once = predict(config, ds_config, 12).events
    few = len(operators)
    monkeypatch.setattr("ds_cmli.memory.fake.shares_made_once", lambda another: nullcontext())
    assert once == predict(config, ds_config, 12).events
    assert few < 0.75 * (len(operators) - few)


def test_results_that_are_known_are_views_and_conjugates_again():
    with Answers():
        x = torch.ones(4, 6, dtype=torch.complex64)
        for _ in range(2):
            assert x.conj().is_conj() and x.conj().imag.is_neg() and not x.is_conj()
            view = x[1:, 2:].t()
            assert view.shape == (4, 3) and view.stride() == (1, 6) and view.storage_offset() == 8
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert (x + 1).untyped_storage()._cdata != x.untyped_storage()._cdata
            assert (x[0] + 1.0).dtype == torch.complex64 and (x[0].real + 1).dtype == torch.float32


def test_parameters_are_flattened_on_the_host_where_the_device_has_no_room_for_both(monkeypatch):
    """As DeepSpeed does at stages 1 and 2: then both copies never lie on the device; and the rest stays as it was."""
    config = preset(batch=2, losses=("global",))

    def most_parameters(events) -> int:
        return max(accumulate(e.bytes for e in events if e.category == "parameters" and e.phase == "init"))

    usual = predict(config, ds_json(), 2)
    full = gpus.find(DEFAULT_GPU).total._replace(bytes=gpus.device_bytes(0, DEFAULT_GPU, 2))
    monkeypatch.setitem(gpus.GPUS, DEFAULT_GPU, replace(gpus.find(DEFAULT_GPU), total=full))
    little = predict(config, ds_json(), 2)
    parameters = usual.report.categories["parameters"]
    assert most_parameters(usual.events) > 1.5 * parameters > 1.4 * most_parameters(little.events)
    assert little.report.categories == usual.report.categories
    assert little.report.phases["backward"] == usual.report.phases["backward"]


def test_no_prediction_beside_a_process_group():
    distributed.init()
    try:
        with pytest.raises(RuntimeError, match="a process group is up"):
            predict(preset(), ds_json(), 2)
    finally:
        distributed.shutdown()


def test_operators_are_those_of_cuda():
    """Attention with dropout keeps no scores, and dropout one byte an element."""
    x = nn.Parameter(torch.empty(2, 3, 32, 16, dtype=torch.float16))
    mask = torch.ones(2, 1, 1, 32, dtype=torch.bool)

    def kept(function) -> int:
        with fake_world(1, gpus.find("A100 80GB").limits), MemoryTracker() as tracker:
            q = nn.Parameter(torch.empty(x.shape, dtype=x.dtype))
            before = sum(e.bytes for e in tracker.events())
            out = function(q, torch.ones(mask.shape, dtype=torch.bool))
            size = sum(e.bytes for e in tracker.events()) - before
            del out
        return size

    elements = 2 * 3 * 32 * 16
    assert kept(lambda q, m: F.dropout(q, 0.1)) == elements * (2 + 1)
    attention = kept(lambda q, m: F.scaled_dot_product_attention(q, q, q))
    assert elements * 2 + 2 * 3 * 32 * 4 <= attention <= elements * 2 + 2 * 3 * 32 * 4 + 64  # out, log-sum-exp, seeds
    masked = kept(lambda q, m: F.scaled_dot_product_attention(q, q, q, m, dropout_p=0.1))
    # The mask as numbers is kept for all heads once.
    assert masked <= elements * 2 + 2 * 3 * 32 * 4 + 2 * 32 * 2 + 2 * 2 * 32 + 64


@pytest.mark.parametrize("width, held", [(40, 40), (36, 40), (33, 40)])
def test_rows_of_a_mask_begin_at_multiples_of_8_elements(width, held):
    with fake_world(1, gpus.find("A100 80GB").limits), MemoryTracker() as tracker:
        q = torch.empty(2, 3, width, 16, dtype=torch.float16, requires_grad=True)
        before = len(tracker.events())
        out = F.scaled_dot_product_attention(q, q, q, torch.zeros(2, 1, 1, width, dtype=torch.float16))
        live = {}
        for event in tracker.events()[before:]:
            live[event.block] = live.get(event.block, 0) + event.bytes
        assert list(live.values()).count(2 * held * 2) == 1  # of 2 texts, in 16 bit; no copy of what is aligned
        del out


def test_heads_of_flash_attention_are_padded_to_multiples_of_8():
    with fake_world(1, gpus.find("A100 80GB").limits), MemoryTracker() as tracker:
        q = torch.empty(2, 3, 32, 12, dtype=torch.float16, requires_grad=True)
        before = len(tracker.events())
        assert F.scaled_dot_product_attention(q, q, q).shape[-1] == 12
        sizes = [event.bytes for event in tracker.events()[before:] if event.bytes > 0]
    assert sizes.count(2 * 3 * 32 * 16 * 2) == 4  # query, key, value and what comes out


def test_on_a_gpu_the_backend_is_triton_and_the_allocator_rounds_up():
    report = predict(preset(), ds_json(precision="fp16"), 2, gpu="A100 40GB").report
    assert report.setting["cmli_backend"] == "triton" and report.setting["precision"] == "fp16"
    totals = report.totals
    assert totals["requested"] < totals["allocated"] <= totals["reserved"] < totals["device"]


@pytest.mark.slow
def test_on_a_gpu_that_does_not_run_the_kernels_the_backend_is_torch():
    results, config = [], preset()
    report = predict(config, ds_json(), 1, gpu="T4 16GB", options=Options(tell=results.append)).report
    assert report.setting["cmli_backend"] == "torch"
    assert any("8.0 or later, this GPU has 7.5" in line for line in results)
    outcome = replace(config, loss=replace(config.loss, cmli_backend="triton"))
    with pytest.raises(UserError, match=r"'triton', which does not run \(the kernels need"):
        predict(outcome, ds_json(), 1, gpu="T4 16GB")
    results.clear()
    alone = replace(outcome, loss=replace(outcome.loss, weights={"global": 1.0}))
    predict(alone, ds_json(), 1, gpu="T4 16GB", options=Options(tell=results.append))
    assert not any("Triton" in line for line in results)  # no loss would use the kernels


def test_an_offloaded_optimizer_takes_nothing_from_the_device():
    offloaded = ds_json()
    offloaded["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    offloaded["zero_force_ds_cpu_optimizer"] = False
    there, own = (predict(preset(), j, 1).report for j in (offloaded, ds_json()))
    assert there.categories["optimizer states"] == there.categories["master weights"] == 0
    kept = own.categories["optimizer states"] + own.categories["master weights"]
    assert there.totals["requested"] < own.totals["requested"] - 0.8 * kept


def test_another_implementation_of_all_pairs():
    def stored(image, text, token_mask, patch_mask, ids, learned):
        s_i2t, s_t2i = cmli_scores_reference(image, torch.cat([text] * 2), torch.cat([token_mask] * 2))
        return ((s_i2t + s_t2i) * learned).mean()

    config = preset(batch=16, losses=("cmli",))
    ours = predict(config, ds_json(), 2)
    materialised = predict(config, ds_json(), 2, options=Options(pair_loss=stored))
    products = 16 * 32 * 16 * 32 * 4  # B x G x N x M in fp32
    assert materialised.report.totals["requested"] > ours.report.totals["requested"] + products
    assert any(event.bytes == products for event in materialised.events)


def test_nadam_is_predicted():
    """It divides by the distance from 1 of a product that it keeps."""
    nadam = {**ds_json(1), "optimizer": {"type": "NAdam", "params": {}}, "zero_allow_untested_optimizer": True}
    assert predict(preset(), nadam, 2).report.categories["optimizer states"] > 0


@pytest.mark.slow
def test_zero_3_leaves_nothing_for_the_next_prediction():
    before = F.linear
    predict(preset(), ds_json(3), 1)
    assert F.linear is before


def test_what_cannot_be_predicted_is_said():
    offload = ds_json(3)
    offload["zero_optimization"]["offload_param"] = {"device": "cpu"}
    with pytest.raises(UserError, match=r"offload_param\.device is 'cpu'"):
        predict(preset(), offload, 1)
    partitioned = {"partition_activations": True, "cpu_checkpointing": True}
    with pytest.raises(NotPredictable, match=r"activation_checkpointing\.partition_activations is true"):
        predict(preset(), {**ds_json(1), "activation_checkpointing": partitioned}, 1)
    unknown = {"text_model": "someone/no-such-model", "text_weights": "hub", "text_overrides": {}}
    with pytest.raises(UserError, match=r"student\.text_model is 'someone/no-such-model'"):
        predict(load_preset("demo", {"student": unknown}), ds_json(), 1)


@pytest.mark.parametrize("room", [0, 5, 1000, 1003, 77_777, 10**9])
def test_the_largest_that_fits(room):
    for needs in (lambda n: 10 * n, lambda n: 1000 + n // 7, lambda n: 3 * n * n + (500 if n > 64 else 0)):
        calls = []
        result = search.largest(lambda n: (calls.append(n), needs(n))[1], room, most=100_000)  # noqa: B023
        expected = next((n for n in range(100_000, 0, -1) if needs(n) <= room), 0)
        assert result == expected
        assert len(calls) <= 40


def test_sizes_as_they_are_typed():
    assert gpus.parse_memory("24GB") == (24 * 10**9, None)
    assert gpus.parse_memory("1.5 GiB") == (3 * 2**29, None)
    assert gpus.parse_memory("RTX 3090")[1] == "RTX 3090 24GB"
    with pytest.raises(UserError, match="--fit is '24 apples'"):
        gpus.parse_memory("24 apples")


def command(*arguments: str) -> subprocess.CompletedProcess:
    one_block = ("--set", "student.layers=1", "--set", "teacher.block=0")
    return python("profiling/predict.py", "--preset", "tiny", *one_block, *arguments)


@pytest.mark.slow
def test_the_command_writes_json_and_snapshot(tmp_path):
    done = command(
        "--world-size", "2", "--checkpointing", "off", "--micro-batch", "4",
        "--json", str(tmp_path / "memory.json"), "--snapshot", str(tmp_path / "memory.pickle"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "memory.json").read_text())
    assert set(content["categories"]) == set(CATEGORIES)
    assert set(content["totals"]) == {"requested", "allocated", "reserved", "device"}
    assert sum(content["categories"].values()) == content["totals"]["requested"] == max(content["phases"].values())
    assert content["setting"]["micro_batch"] == 4 and content["setting"]["checkpointing"] is False
    assert f"{content['totals']['device']:,}" in done.stdout
    assert done.stdout.startswith("micro-batch 4 with ZeRO-2 over 2 GPUs (rank 1, which needs the most) needs ")
    assert (tmp_path / "memory.pickle").stat().st_size > 1000


@pytest.mark.slow
def test_the_command_predicts_with_the_loss_of_a_plugin():
    done = command("--plugin", "tests.stranger.toy", "--losses", "global,filip")
    assert done.returncode == 0 and "requested" in done.stdout, done.stderr


@pytest.mark.slow
def test_fit():
    config, ds_config = preset(losses=("global",)), ds_json()
    room = predict(config, search.with_batch(ds_config, 100), 2).report.totals["device"]
    results: list[str] = []
    result = search.fit(config, ds_config, 2, room, tell=results.append)
    assert result.tried[result.micro_batch] <= room < result.tried[result.micro_batch + 1]
    assert result.prediction.report.setting["micro_batch"] == result.micro_batch
    assert len(result.tried) <= 8 and all(any(f"micro-batch {n}: " in line for line in results) for n in result.tried)
    # The preset's own micro-batch is smaller; one that is too large comes with what would make it fit.
    assert result.asked <= result.micro_batch and result.changes == []


def test_fit_proposes_what_makes_one_pair_fit(monkeypatch):
    """One change if one is enough, otherwise the fewest together; each was predicted to fit."""
    config, ds_config = preset(), DeepSpeedConfig.of(ds_json(1, bucket=500_000_000))
    context = gpus.device_bytes(0, DEFAULT_GPU, 2)

    def bytes_of(config, ds_config, world_size, **options):
        size = 100 if ds_config.stage < 3 else 13
        size -= 5 * ("offload_optimizer" in ds_config.zero)
        totals = {"device": context + size, "requested": size}
        report = SimpleNamespace(totals=totals, setting={"rank": 0}, retries=0)
        return SimpleNamespace(report=report, events=[])

    monkeypatch.setattr(search, "predict_largest", bytes_of)
    one = search.fit(config, ds_config, 2, context + 13)
    assert [name for name, _ in one.changes] == ['"zero_optimization": {"stage": 3}']
    several = search.fit(config, ds_config, 2, context + 10)
    ((name, size),) = several.changes
    assert size == context + 8 and '"stage": 3' in name and "offload_optimizer" in name
    nothing = search.fit(config, ds_config, 2, context + 7)
    assert nothing.micro_batch == 0 and nothing.changes == [] and list(nothing.tried) == [1]


def test_fit_proposes_what_makes_the_asked_micro_batch_fit(monkeypatch):
    from ds_cmli.memory.command import fit_sentence  # which hides GPUs from its process when imported

    config, ds_config = preset(), DeepSpeedConfig.of(ds_json(1))  # of 8 pairs
    context = gpus.device_bytes(0, DEFAULT_GPU, 2)

    def bytes_of(config, ds_config, world_size, **options):
        size = 10**9 * ds_config.micro_batch // (2 if ds_config.checkpointing else 1)
        totals = {"device": context + size, "requested": size}
        report = SimpleNamespace(totals=totals, setting={"rank": 0}, retries=0)
        return SimpleNamespace(report=report, events=[])

    monkeypatch.setattr(search, "predict_largest", bytes_of)
    result = search.fit(config, ds_config.replaced(activation_checkpointing=None), 2, context + 5 * 10**9)
    assert (result.micro_batch, result.asked) == (5, 8)
    assert result.changes[0] == ('"activation_checkpointing": {} in the DeepSpeed JSON', context + 4 * 10**9)
    room, six = (context + 5 * 10**9) / 1e9, (context + 6 * 10**9) / 1e9
    assert fit_sentence(result, context + 5 * 10**9) == (
        f"fits in {room:.2f} GB with micro-batch 5; 6 needs {six:.2f} GB; 8 would fit with "
        f'"activation_checkpointing": {{}} in the DeepSpeed JSON: {room - 1:.2f} GB'
    )


def test_the_answer_comes_first():
    from ds_cmli.memory.command import sentence

    setting = {"micro_batch": 64, "zero_stage": 2, "world_size": 4}
    report = SimpleNamespace(totals={"device": 20 * 10**9}, setting=setting, retries=0)
    total = gpus.find(DEFAULT_GPU).total.bytes / 1e9
    step = "micro-batch 64 with ZeRO-2 over 4 GPUs needs"
    expected = f"{step} 20.00 GB and fits on a {DEFAULT_GPU} ({total:.2f} GB), {total - 20:.2f} GB are left"
    assert sentence(report, DEFAULT_GPU) == expected
    retried = ", only as PyTorch's allocator returns its cache (2 retries)"
    report.retries = 2
    assert sentence(report, DEFAULT_GPU) == expected + retried
    report.totals["device"] = 30 * 10**9
    expected = f"{step} 30.00 GB and does not fit on a {DEFAULT_GPU} ({total:.2f} GB), by {30 - total:.2f} GB"
    assert sentence(report, DEFAULT_GPU) == f"{expected}: --fit {DEFAULT_GPU!r} finds what does"
    report.totals["device"] = gpus.find(DEFAULT_GPU).total.bytes + 70_000
    setting["rank"] = 3
    assert sentence(report, DEFAULT_GPU).startswith(
        "micro-batch 64 with ZeRO-2 over 4 GPUs (rank 3, which needs the most) needs 25.42594 GB and does not fit on a "
        "RTX 3090 24GB (25.42587 GB), by 0.00007 GB"
    )


@pytest.mark.parametrize(
    "gpu, fit, micro_batch, device, fits",
    [
        ("T4", None, 0, 10**9, True),
        ("48GB 8.9", None, 0, 48 * 10**9, True),
        ("48GB 8.9", None, 0, 48 * 10**9 + 1, False),
        ("T4", None, 0, 10**11, False),
        (None, None, 0, 10**11, True),  # no GPU was asked about
        (None, "24GB", 8, 10**9, True),
        (None, "24GB", 0, 10**11, False),
    ],
)
def test_what_does_not_fit_has_an_exit_code(monkeypatch, gpu, fit, micro_batch, device, fits):
    from ds_cmli.memory import command, largest_rank, search

    setting = {"micro_batch": 1, "zero_stage": 2, "world_size": 1}
    report = SimpleNamespace(totals={"device": device}, setting=setting, to_dict=dict, retries=0)
    result = SimpleNamespace(report=report)
    fitted = SimpleNamespace(
        micro_batch=micro_batch, tried={1: device, 8: device}, changes=[], asked=1, prediction=result
    )
    monkeypatch.setattr(largest_rank, "predict_largest", lambda *_, **__: result)
    monkeypatch.setattr(search, "fit", lambda *_, **__: fitted)
    monkeypatch.setattr(command, "show", lambda _: None)
    given = (None, *gpu.split()) if gpu and " " in gpu else (gpu, None, None)
    options = command.PredictionOptions(1, None, *given, fit, None, None)
    assert command.single(None, None, options)[1] == fits


def test_the_gpu_here_is_the_one_that_is_asked_about(monkeypatch):
    import pynvml

    from ds_cmli.memory import command

    assert command.default_gpu() == DEFAULT_GPU  # without a driver
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", ["NVIDIA L40S"].__getitem__)
    assert command.default_gpu() == "L40S 48GB"
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", ["NVIDIA L40"].__getitem__)
    with pytest.raises(UserError, match=r"^this GPU, 'NVIDIA L40', is not listed"):
        command.default_gpu()


def test_two_sizes_never_read_alike():
    from ds_cmli.memory.command import fit_sentence

    tried = {1663: 23_999_100_000, 1664: 24_000_500_000}
    fits = SimpleNamespace(report=SimpleNamespace(retries=0))
    result = SimpleNamespace(micro_batch=1663, tried=tried, changes=[], asked=8, prediction=fits)
    assert fit_sentence(result, 24 * 10**9) == "fits in 24.0000 GB with micro-batch 1663; 1664 needs 24.0005 GB"
    none = SimpleNamespace(micro_batch=0, tried={1: 10**9 + 1}, changes=[], asked=1)
    assert fit_sentence(none, 10**9).startswith(
        "does not fit in 1.000000000 GB: one pair needs 1.000000001 GB; nothing that was tried makes 1 fit"
    )
    assert gigabytes(5, 5) == ["0.00", "0.00"] and gigabytes(1_250_000_000, 0, digits=1) == ["1.2", "0.0"]


def test_what_fit_means_is_said_with_what_tensors_can_have():
    from ds_cmli.memory.command import meant

    assert meant("24GB", 24 * 10**9, "", DEFAULT_GPU, 1) == (
        "--fit '24GB' means 24,000,000,000 B of a GPU: 23,685,427,200 B of them for tensors, the rest is CUDA's context"
        " as on a RTX 3090 24GB; to mean a GPU's own memory, name it: A10 24GB (23,686,283,264 B), A10G 24GB"
        " (23,686,283,264 B), L4 24GB (23,670,554,624 B), RTX 3090 24GB (25,425,870,848 B), RTX 4090 24GB"
        " (25,372,393,472 B)"
    )
    assert meant("A10G", 23_686_283_264, "A10G 24GB", "A10G 24GB", 2) == (
        "--fit 'A10G' means the 23,686,283,264 B that a A10G 24GB has: 23,057,137,664 B of them for tensors, the rest "
        "is CUDA's context and NCCL as on a A10G 24GB"
    )
    assert "name it" not in meant("7GB", 7 * 10**9, "", DEFAULT_GPU, 1)


@pytest.mark.slow
def test_the_rank_that_needs_the_most_is_predicted():
    # Of many pairs activations weigh more than the gradients that are kept.
    config = preset(batch=1, losses=("global",))
    item = [predict(config, ds_json(), 3, target="cpu", rank=rank).report for rank in (0, 2)]
    largest = predict_largest(config, ds_json(), 3, target="cpu").report
    sizes = [report.totals["requested"] for report in item]
    assert largest.totals["requested"] == max(sizes)
    assert largest.setting["rank"] == 2
    assert sizes[1] > sizes[0]
    with pytest.raises(UserError, match="--rank is 3: the ranks of 3 are 0 to 2"):
        predict(config, ds_json(), 3, rank=3)


@pytest.mark.parametrize("arguments", [("--gpu", "abacus"), ("--world-size", "0")])
def test_mistakes_are_one_line(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and arguments[0] in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_relative_attention_is_predicted_where_gradients_are_scattered_in_place():
    sizes = {
        **load_preset("tiny", {}).student.text_overrides,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    }
    config = preset(student={"text_model": "deberta-v2", "text_overrides": sizes})
    predicted = predict(config, ds_json(1), 1, target="cpu", options=Options(backend="fake")).report.phases
    measured = measure(config, ds_json(1), 1).phases
    for phase, size in measured.items():
        assert abs(predicted[phase] - size) <= 2 * SCALARS, phase
