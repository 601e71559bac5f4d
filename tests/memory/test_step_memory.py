"""The trainer's step on fake CUDA: what is counted, and that a prediction leaves nothing behind."""

import copy
import sys
from dataclasses import replace
from itertools import accumulate

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
from ds_cmli.memory.inputs import longest_batch, without_weights
from ds_cmli.memory.step_memory import Step, predicted, predicted_worst
from ds_cmli.memory_model import gpus

ALL = ("global", "cmli", "target_cmli")
# For what does not depend on their number: a prediction takes a second for each.
ONE_BLOCK = {"student": {"layers": 1}, "teacher": {"block": 0}}
A100 = gpus.find("A100 80GB")


def ds_json(stage=2, precision="bf16", checkpointing=False, **zero) -> dict:
    zero = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 100_000, **zero}
    out = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}, "zero_optimization": zero}
    if precision != "fp32":
        out[precision] = {"enabled": True}
    return {**out, "activation_checkpointing": {}} if checkpointing else out


def preset(name="tiny", batch=8, losses=ALL, **overrides):
    """With one block in each tower, unless student and teacher are given."""
    usual = {"optim": {"micro_batch": batch}, "loss": {"weights": dict.fromkeys(losses, 1.0)}, **ONE_BLOCK}
    return load_preset(name, usual | overrides)


def predict(config, json, world=1, rank=0, gpu=A100, limit=1 << 44, **more):
    return predicted(Step(config, json, world, rank, **more), gpu, limit)


def test_packaged_weights_are_predicted_with_their_own_sizes():
    config, words = without_weights(load_preset("demo", {}))
    packaged = AutoConfig.from_pretrained(assets.fetch("minilm")).to_dict()
    assert packaged["vocab_size"] == words and packaged["model_type"] == config.student.text_model
    assert len(config.student.text_overrides) == 4
    assert config.student.text_overrides.items() <= packaged.items()


@pytest.mark.slow
def test_nothing_remains(alone):
    """A training in the same process gives the same bits, before and after predictions that end well or badly."""
    config = preset()
    resolved = DeepSpeedConfig.of(ds_json(checkpointing=True)).filled(config.optim, 1, 10)

    def train() -> list[float]:
        train_engine = engine.build(config, copy.deepcopy(resolved), 300, 10, distributed.init())
        losses = [train_engine(longest_batch(config, 8))[0].item() for _ in range(3)]
        distributed.shutdown()
        return losses

    before, apply, hook, generator = train(), nn.Module._apply, sys.excepthook, torch.get_rng_state()
    sizes = [predict(config, ds_json(checkpointing=True), world).totals["requested"] for world in (1, 8, 1)]
    assert sizes[0] == sizes[2] != sizes[1]
    with pytest.raises(UserError, match="no_such_model"):
        predict(preset(student={"image_model": "no_such_model"}), ds_json(), 2)
    assert nn.Module._apply is apply and sys.excepthook is hook and not torch.cuda.is_available()
    assert torch.equal(torch.get_rng_state(), generator)
    assert type(torch.empty(1)) is torch.Tensor
    assert train() == before


def test_parameters_are_flattened_on_the_host_where_the_device_has_no_room_for_both():
    """As DeepSpeed does at stages 1 and 2: then both copies never lie on the device; and the rest stays as it was."""
    config = preset(batch=2, losses=("global",))

    def most_before_master_weights(events) -> int:
        first = next(place for place, event in enumerate(events) if event.category == "master weights")
        return max(accumulate(event.bytes for event in events[:first]))

    usual = predict(config, ds_json(), 2)
    little = predict(config, ds_json(), 2, gpu=replace(A100, total=A100.total._replace(bytes=0)))
    assert most_before_master_weights(little.events) < most_before_master_weights(usual.events)
    assert little.categories == usual.categories
    assert little.phases["backward"] == usual.phases["backward"]


def test_no_prediction_beside_a_process_group(alone):
    distributed.init()
    try:
        with pytest.raises(RuntimeError, match="a process group is up"):
            predict(preset(), ds_json(), 2)
    finally:
        distributed.shutdown()


def test_the_backend_is_the_gpu_s_and_the_allocator_rounds_up():
    report = predict(preset(), ds_json(precision="fp16"), 2)
    assert report.setting["cmli_backend"] == "triton" and report.setting["precision"] == "fp16"
    totals = report.totals
    assert totals["requested"] < totals["allocated"] <= totals["reserved"] < totals["device"]
    old = predict(preset(), ds_json(precision="fp16"), gpu=gpus.find("T4"))
    assert old.setting["cmli_backend"] == "torch"
    wanted = preset(loss={"weights": dict.fromkeys(ALL, 1.0), "cmli_backend": "triton"})
    with pytest.raises(UserError, match=r"'triton', which does not run \(the kernels need"):
        predict(wanted, ds_json(precision="fp16"), gpu=gpus.find("T4"))


def test_an_offloaded_optimizer_takes_nothing_from_the_device():
    offloaded = ds_json(offload_optimizer={"device": "cpu", "pin_memory": True})
    offloaded["zero_force_ds_cpu_optimizer"] = False
    there, own = (predict(preset(), json) for json in (offloaded, ds_json()))
    assert there.categories["optimizer states"] == there.categories["master weights"] == 0
    kept = own.categories["optimizer states"] + own.categories["master weights"]
    assert there.totals["requested"] < own.totals["requested"] - 0.8 * kept


def test_another_implementation_of_all_pairs():
    def stored(image, text, token_mask, patch_mask, **_):
        s_i2t, s_t2i = cmli_scores_reference(image, torch.cat([text] * 2), torch.cat([token_mask] * 2))
        return (s_i2t + s_t2i).mean()

    def use(train_engine) -> None:
        train_engine.objective.losses["cmli"].forward = stored

    config = preset(batch=16, losses=("cmli",))
    ours, materialised = predict(config, ds_json(), 2), predict(config, ds_json(), 2, built=use)
    products = 16 * 32 * 16 * 32 * 4  # B x G x N x M in fp32
    assert materialised.totals["requested"] > ours.totals["requested"] + products
    assert any(event.bytes == products for event in materialised.events)


@pytest.mark.slow
def test_an_optimizer_that_reads_numbers_is_predicted():
    json = {**ds_json(1), "optimizer": {"type": "NAdam", "params": {}}, "zero_allow_untested_optimizer": True}
    assert predict(preset(), json, 2).categories["optimizer states"] > 0


@pytest.mark.parametrize("caching", [True, False])
def test_more_micro_batches_take_gradients_or_features(caching):
    negatives = "global_batch" if caching else "micro_batch"
    json = {**ds_json(1), "gradient_accumulation_steps": 3}
    report = predict(preset(optim={"micro_batch": 8, "negatives": negatives}), json, 2)
    assert (report.categories["cached features"] > 0) == caching


def test_zero_3_gathers_parameters_and_leaves_nothing_for_the_next_prediction():
    before = F.linear
    report = predict(preset(), ds_json(3), 2)
    assert F.linear is before
    assert {event.stream for event in report.events if event.bytes > 0} > {0}
    assert report.totals["requested"] == max(report.phases.values())
    # What linear layers keep are activations as before, although a function of DeepSpeed's allocates it.
    other = predict(preset(), ds_json(2), 2)
    assert report.categories["activations student"] >= other.categories["activations student"]


def test_what_cannot_be_predicted_is_said():
    with pytest.raises(UserError, match=r"offload_param\.device is 'cpu'"):
        predict(preset(), ds_json(3, offload_param={"device": "cpu"}))
    with pytest.raises(
        UserError, match=r"activation_checkpointing\.cpu_checkpointing is True: blocks are recomputed by"
    ):
        predict(preset(), {**ds_json(1), "activation_checkpointing": {"cpu_checkpointing": True}})
    unknown = {"text_model": "someone/no-such-model", "text_weights": "hub", "text_overrides": {}}
    with pytest.raises(UserError, match=r"student\.text_model is 'someone/no-such-model'"):
        predict(load_preset("demo", {"student": unknown}), ds_json())


@pytest.mark.slow
def test_the_rank_that_needs_the_most_is_predicted():
    step = Step(preset(batch=1, losses=("global",)), ds_json(), 3)
    each = [predicted(replace(step, rank=rank), A100).totals["requested"] for rank in range(3)]
    worst = predicted_worst(step, A100)
    assert worst.totals["requested"] == max(each) > min(each)
    assert each[worst.setting["rank"]] == max(each)
    assert predicted_worst(step, A100, rank=1).setting["rank"] == 1
