"""Several micro-batches with gradient caching against the same pairs as one micro-batch."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests import make

WEIGHTS = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0, "cls_kd": 0.5, "cmli_sigmoid": 0.1, "global_sigmoid": 0.1}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# Nothing is kept gathered: the losses' parameters, which gradient caching uses outside their modules, neither.
NOTHING_KEPT = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}


def trained(device, micro_batch, accumulation, zero, dropout=0.0, weights=WEIGHTS, json=None, **optim):
    content = {"gradient_accumulation_steps": accumulation, "gradient_clipping": 0.01, **(json or {})}
    content["zero_optimization"] = {"reduce_bucket_size": 100_000, **zero}
    optim = {"micro_batch": micro_batch, **optim}
    sections = {"loss": {"weights": weights}, "student": {"dropout": dropout}, "optim": optim}
    return make.train_engine(device, content, **sections)


def batches_of_two_steps(data, size):
    """Return batches of 64 pairs. Of each 32 some have one picture, and two one caption, in other micro-batches too."""
    batches = make.batches(data, size, 64 // size)
    ids = torch.cat([batch.pair_id for batch in batches]).view(2, 32, 2)
    ids[:, [3, 30], 0] = ids[:, :1, 0]
    ids[:, 17, 1] = ids[:, 9, 1]
    for batch, part in zip(batches, ids.view(64, 2).split(size), strict=True):
        batch.pair_id.copy_(part)
    return batches


@pytest.fixture(scope="module")
def one_piece(device, data):
    plain = trained(device, 32, 1, {"stage": 2})
    return [make.gradients(plain, [batch]) for batch in batches_of_two_steps(data, 32)]


@pytest.mark.parametrize("zero", [{"stage": 2}, {"stage": 1, **OFFLOAD}, {"stage": 3, **NOTHING_KEPT}])
def test_losses_and_gradients_are_those_of_one_piece(device, data, one_piece, zero):
    several = trained(device, 8, 4, zero, json={"activation_checkpointing": {}})
    parts = batches_of_two_steps(data, 8)
    for step, (expected_losses, expected) in enumerate(one_piece):
        losses, gradients = make.gradients(several, parts[4 * step : 4 * step + 4])
        assert losses == pytest.approx(expected_losses, rel=2e-5, abs=1e-7)
        differences = make.relative_differences(gradients, expected)
        assert max(differences.values()) < 2e-5, differences  # a temperature's is a sum of terms that cancel


def test_without_it_each_micro_batch_has_its_own_negatives(device, data):
    plain = trained(device, 8, 2, {"stage": 2}, negatives="micro_batch", weights={"global": 1.0})
    alone = trained(device, 8, 1, {"stage": 2}, weights={"global": 1.0})
    batches = make.batches(data, 8, 2)
    first, _ = plain.step(batches)
    (expected,) = alone.step(batches[:1])
    torch.testing.assert_close(first.total, expected.total)


@pytest.mark.parametrize("json", [{}, {"activation_checkpointing": {}}], ids=["", "checkpointed"])
def test_micro_batches_draw_the_same_dropout_again(device, data, json):
    """Features of all micro-batches with their graphs kept, drawn in the same order, have the same gradients."""
    unclipped = {"gradient_clipping": 0.0, **json}
    several = trained(device, 4, 2, {"stage": 2}, dropout=0.4, weights={"global": 1.0}, json=unclipped)
    parts = make.batches(data, 4, 2)
    student = copy.deepcopy(several.objective.student).train()
    torch.manual_seed(3)
    features = [student(batch.image, batch.input_ids, batch.attention_mask) for batch in parts]
    image_cls, text_cls = (F.normalize(torch.cat([x[n] for x in features]), dim=-1) for n in (0, 2))
    logits = image_cls @ text_cls.t() / 0.07
    positives = torch.arange(8)
    expected = (F.cross_entropy(logits, positives) + F.cross_entropy(logits.t(), positives)) / 2
    expected.backward()
    torch.manual_seed(3)
    losses, gradients = make.gradients(several, parts)
    assert losses["global"] == pytest.approx(expected.item(), rel=1e-4)
    expected_gradients = {f"student.{name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
    updated = {name: gradients[name] for name in expected_gradients}
    assert max(make.relative_differences(updated, expected_gradients).values()) < 1e-3


def test_in_fp16_the_gradients_are_those_of_fp32_and_an_overflow_skips_the_step(device, data, fp16_device):
    settings = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 1000}
    weights = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}
    full, half = (trained(device, 8, 4, {"stage": 2}, weights=weights, json=json) for json in ({}, {"fp16": settings}))
    batches = make.batches(data, 8, 8)
    expected, gradients = (make.gradients(trained, batches[:4])[1] for trained in (full, half))
    for name in ("student.projection.weight", *(n for n in expected if n.endswith("logit_scale"))):
        assert (gradients[name] / 2.0**8 - expected[name]).norm() < 0.05 * expected[name].norm(), name
    assert not half.skipped and half.log_columns()["loss_scale"] == 2.0**8
    weights_before = [p.detach().clone() for p in half.objective.parameters()]
    seen = []

    def hook(module, inputs, output):
        if output[1].requires_grad:
            seen.append(output)
            if len(seen) == 3:
                output[1].register_hook(lambda gradient: gradient * torch.inf)

    handle = half.objective.student.register_forward_hook(hook)
    losses = half.step(batches[4:])
    handle.remove()
    assert len(seen) == 4 and half.skipped and all(x.total.isfinite() for x in losses)
    assert half.log_columns()["loss_scale"] == 2.0**7  # halved once
    torch.testing.assert_close([*half.objective.parameters()], weights_before, rtol=0, atol=0)
    half.step(batches[4:])
    assert not half.skipped
