"""Several micro-batches with gradient caching against the same pairs as one micro-batch."""

import pytest
import torch

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data import build_data, eval_loader
from ds_cmli.distributed import process_group as distributed

WEIGHTS = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0, "cls_kd": 0.5, "cmli_sigmoid": 0.1, "global_sigmoid": 0.1}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# Nothing is kept gathered: the losses' parameters, which gradient caching uses outside their modules, neither.
NOTHING_KEPT = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}


@pytest.fixture(scope="module")
def device():
    yield distributed.init()
    distributed.shutdown()


@pytest.fixture(scope="module")
def data():
    return build_data(load_preset("tiny", {}).data, 0)


def build(device, data, micro_batch, accumulation, zero, dropout=0.0, checkpointing=False, weights=WEIGHTS, **optim):
    settings = {
        "loss": {"weights": weights},
        "student": {"dropout": dropout},
        "optim": {"micro_batch": micro_batch, **optim},
    }
    config = load_preset("tiny", settings)
    content = {
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.01,
        "zero_optimization": {"reduce_bucket_size": 100_000, **zero},
        **({"activation_checkpointing": {}} if checkpointing else {}),
    }
    ds_config = engine.filled(config, engine.on_this_device(DeepSpeedConfig.of(content)), 1, 6)
    return engine.build(config, ds_config, data.vocab_size, 6, device)


def micro_batches(data, size, number):
    loader = iter(eval_loader(data.train, data, size, 0, 0, 1))
    return [next(loader) for _ in range(number)]


def gradients_of(train_engine, batches):
    """The mean losses of a step, and the gradients that its update is made from, before clipping."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    update = train_engine.engine._take_model_step

    def take(*arguments):
        found.update((n, safe_get_full_grad(p).clone()) for n, p in train_engine.objective.named_parameters())
        update(*arguments)

    train_engine.engine._take_model_step = take
    losses = train_engine.step(batches)
    train_engine.engine._take_model_step = update
    assert not train_engine.skipped
    return torch.stack([x.stacked() for x in losses]).mean(0), found


def assert_same(ours, theirs, limit=1e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=limit, atol=1e-7)
    whole = torch.stack([g.norm() for g in theirs[1].values()]).norm()
    for name, expected in theirs[1].items():
        # Below 1e-6 of the whole gradient there is nothing to be relative to: a key's bias has none but for rounding.
        error = (ours[1][name] - expected).norm() / max(expected.norm(), 1e-6 * whole)
        assert error < limit, (name, error.item())


@pytest.mark.parametrize(
    "zero, optim",
    [
        ({"stage": 0}, {}),
        ({"stage": 1, **OFFLOAD}, {}),
        ({"stage": 2}, {"cache_on_host": True}),
        ({"stage": 2, **OFFLOAD}, {"reduce_once": True}),
        ({"stage": 3, **NOTHING_KEPT}, {}),
        ({"stage": 3, **OFFLOAD}, {"reduce_once": True}),
    ],
)
def test_losses_and_gradients_are_those_of_one_piece(device, data, zero, optim):
    one = build(device, data, 32, 1, {"stage": 2})
    several = build(device, data, 8, 4, zero, checkpointing=True, **optim)
    whole, parts = micro_batches(data, 32, 2), micro_batches(data, 8, 8)
    for step in range(2):
        assert_same(gradients_of(several, parts[4 * step : 4 * step + 4]), gradients_of(one, whole[step : step + 1]))


def test_without_it_each_micro_batch_has_its_own_negatives(device, data):
    plain = build(device, data, 8, 2, {"stage": 2}, negatives="micro_batch", weights={"global": 1.0})
    alone = build(device, data, 8, 1, {"stage": 2}, weights={"global": 1.0})
    batches = micro_batches(data, 8, 2)
    (first, _), (expected,) = plain.step(batches), alone.step(batches[:1])
    torch.testing.assert_close(first.total, expected.total)
