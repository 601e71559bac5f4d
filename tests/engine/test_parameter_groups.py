"""Frozen layers, learning rates of parts and layers: which parameters move, and how fast."""

import pytest
import torch

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine.parameter_groups import counts_line, factor, parameter_groups
from ds_cmli.memory.inputs import longest_batch, without_weights
from tests.conftest import ZERO1

FROZEN = {"student": {"freeze_image": 1, "freeze_text": 2}}  # of two layers each
RATES = {"optim": {"lr": 1e-3, "layer_decay": 0.5, "lr_factors": {"text": 0.1}}}


def models(overrides):
    config, vocab_size = without_weights(load_preset("tiny", overrides))
    return config, engine.build_models(config, vocab_size)[0]


def frozen(name: str) -> bool:
    first = ("cls_token", "pos_embed", "patch_embed.", "blocks.0.")
    return name.startswith(("student.text.", *(f"student.image.model.{start}" for start in first)))


def test_first_layers_with_the_embeddings_below_or_the_whole_encoder():
    _, objective = models(FROZEN)
    assert {n for n, p in objective.named_parameters() if not p.requires_grad} == {
        n for n, _ in objective.named_parameters() if frozen(n)
    }
    assert "trained: image" in counts_line(objective, None)
    with pytest.raises(UserError, match=r"student\.freeze_text is 3: the text encoder has 2 layers"):
        models({"student": {"freeze_text": 3}})


def test_rates_by_layer_and_part():
    config, _ = models(RATES)
    # Two layers: 0.5 for the last, 0.25 for the first, 0.125 for the embeddings; the text's a tenth of these.
    assert [factor(("image", depth, 2), config.optim) for depth in range(4)] == [0.125, 0.25, 0.5, 1.0]
    assert factor(("text", 2, 2), config.optim) == pytest.approx(0.05)
    assert factor(("rest", 1, 0), config.optim) == 1.0


def test_each_parameter_is_in_the_group_of_its_rate():
    config, objective = models(RATES)
    groups = parameter_groups(objective, 0.1, config.optim, 1e-3)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    own = dict(objective.named_parameters())
    assert len(rate) == len(own)
    for name, expected in {
        "student.image.model.pos_embed": 0.125e-3, "student.image.model.blocks.0.attn.qkv.weight": 0.25e-3,
        "student.image.model.blocks.1.norm1.bias": 0.5e-3,
        "student.text.model.embeddings.word_embeddings.weight": 0.0125e-3,
        "student.text.model.encoder.layer.1.output.dense.weight": 0.05e-3, "student.projection.weight": 1e-3,
    }.items():  # fmt: skip
        assert rate[id(own[name])] == pytest.approx(expected), name


@pytest.mark.parametrize("kind", ["OneCycle", "WarmupLR"])
def test_a_scheduler_with_one_rate_for_all_is_refused(kind):
    params = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3} if kind == "OneCycle" else {}
    content = {**ZERO1, "scheduler": {"type": kind, "params": params}}
    with pytest.raises(UserError, match=rf"scheduler\.type is '{kind}', which sets one rate"):
        engine.filled(load_preset("tiny", RATES), DeepSpeedConfig.of(content), 1, 10)


@pytest.mark.parametrize("stage, checkpointing", [(1, False), (2, True), (3, False)])
def test_frozen_parameters_stay_and_all_others_move_with_their_rates(stage, checkpointing):
    both = {"student": FROZEN["student"], "optim": {**RATES["optim"], "warmup_share": 0.0}}
    config, vocab_size = without_weights(load_preset("tiny", both))
    content = {"zero_optimization": {"stage": stage}, **({"activation_checkpointing": {}} if checkpointing else {})}
    content["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}
    json = engine.filled(config, DeepSpeedConfig.of(content), 1, 1000)
    train_engine = engine.build(config, json, vocab_size, 1000, distributed.init())
    try:
        whole = {n: getattr(p, "ds_tensor", p) for n, p in train_engine.objective.named_parameters()}
        before = {name: p.detach().clone() for name, p in whole.items()}
        torch.manual_seed(0)
        for _ in range(3):
            batch = longest_batch(config, 8)
            batch.image.random_(0, 256)
            batch.input_ids.random_(5, 200)
            train_engine(batch)
        moved = {name for name, p in whole.items() if not torch.equal(p, before[name])}
        assert not {name for name in moved if frozen(name)}
        still = {name for name in whole if not frozen(name)} - moved
        assert not {name for name in still if "losses" not in name}, still
        rates = {group["lr"] for group in train_engine.engine.optimizer.param_groups}
        assert max(rates) / min(rates) == pytest.approx(2)  # the shared parts and the image's last layer
    finally:
        distributed.shutdown()
