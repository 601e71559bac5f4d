import json
from pathlib import Path

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config import deepspeed_json
from ds_cmli.config.schema import OptimConfig

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_are_valid_and_checkpoint_activations(path):
    config = deepspeed_json.load(path)
    assert "activation_checkpointing" in config
    resolved = deepspeed_json.resolve(config, OptimConfig(micro_batch=4), world_size=2, total_steps=10)
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 8


def test_names_of_shipped_files():
    assert [p.stem for p in SHIPPED] == ["zero1", "zero2", "zero2_bf16", "zero2_offload", "zero3"]
    assert deepspeed_json.precision(deepspeed_json.load(SHIPPED[1])) == "fp16"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimisation": {}}, "key is 'zero_optimisation': did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stge": 2}}, "key of zero_optimization is 'stge': did you mean 'stage'?"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "key of zero_optimization.offload_optimizer is 'devise': did you mean 'device'?",
        ),
        ({"fp16": {"enable": True}}, "key of fp16 is 'enable': did you mean 'enabled'?"),
        ({"fp16": True}, "fp16 is True: give a JSON object"),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, "did you mean 'cpu_checkpointing'?"),
        ({"optimizer": {"typ": "Adam"}}, "did you mean 'type'?"),
        ({"optimizer": {"params": {}}}, "optimizer.type is None: "),
        ({"optimizer": {"type": "AdamWW"}}, "optimizer.type is 'AdamWW': did you mean 'AdamW'?"),
        (
            {"optimizer": {"type": "AdamW", "params": {"weigth_decay": 0.1}}},
            "key of optimizer.params is 'weigth_decay': did you mean 'weight_decay'?",
        ),
        ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params is None: give a JSON object"),
        ({"scheduler": {"type": "WarmupRL"}}, "scheduler.type is 'WarmupRL': did you mean 'WarmupLR'?"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
            "key of scheduler.params is 'warmup_steps': did you mean 'warmup_num_steps'?",
        ),
        ({"train_batch_size": 0}, "train_batch_size is 0: give a positive whole number"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "choose one"),
    ],
)
def test_unknown_keys_and_bad_values(config, words):
    with pytest.raises(UserError) as error:
        deepspeed_json.check(config)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def batch(total, micro, steps, world_size, default=64):
    values = zip(deepspeed_json.BATCH_KEYS, (total, micro, steps), strict=True)
    return deepspeed_json.resolve_batch({k: v for k, v in values if v is not None}, default, world_size)


def test_batch_arithmetic():
    assert batch("auto", "auto", "auto", 2) == (128, 64, 1)
    assert batch(None, 8, 4, 2) == (64, 8, 4)
    assert batch(64, "auto", 4, 2) == (64, 8, 4)
    assert batch(64, 8, "auto", 2) == (64, 8, 4)
    assert batch(256, "auto", "auto", 2) == (256, 64, 2)
    with pytest.raises(UserError, match=r"train_batch_size is 100, .*gpu 16 x .*steps 2 x world size 3 = 96"):
        batch(100, 16, 2, 3)


def test_what_the_json_says_wins():
    given = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": "auto"}}, "gradient_clipping": 3.0}
    out = deepspeed_json.resolve(given, OptimConfig(lr=1e-3, weight_decay=0.1), 1, 10)
    assert out["optimizer"]["params"]["lr"] == 0.5
    assert out["optimizer"]["params"]["weight_decay"] == 0.1
    assert out["gradient_clipping"] == 3.0
    assert given["optimizer"]["params"]["weight_decay"] == "auto"  # the caller's own is left alone


def test_an_optimizer_is_given_what_it_takes():
    def filled(kind):
        resolved = deepspeed_json.resolve({"optimizer": {"type": kind, "params": {"lr": 0.1}}}, OptimConfig(), 1, 10)
        return set(resolved["optimizer"]["params"])

    assert filled("SGD") == {"lr", "weight_decay"}
    assert filled("adam") == filled("Lamb") == {"lr", "betas", "eps", "weight_decay"}


def test_scheduler_auto_values_are_filled_and_others_refused():
    params = {"total_num_steps": "auto", "warmup_num_steps": "auto"}
    out = deepspeed_json.resolve(
        {"scheduler": {"type": "WarmupDecayLR", "params": params}}, OptimConfig(warmup_share=0.2), 1, 50
    )
    assert out["scheduler"]["params"] == {"total_num_steps": 50, "warmup_num_steps": 10}
    with pytest.raises(UserError, match='steps_per_print is "auto"'):
        deepspeed_json.resolve({"steps_per_print": "auto"}, OptimConfig(), 1, 50)


def test_fall_back_to_bf16():
    out = deepspeed_json.fall_back_to_bf16({"fp16": {"enabled": True}, "gradient_clipping": 1.0})
    assert out == {"bf16": {"enabled": True}, "gradient_clipping": 1.0}
    assert deepspeed_json.precision(out) == "bf16"
