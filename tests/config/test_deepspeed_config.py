"""The DeepSpeed JSON: what is refused, in one line; precision, batch and "auto" values."""

import json

import pytest

from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.schema import OptimConfig
from ds_cmli.errors import UserError
from tests.conftest import ZERO1

MISTAKES = [
    ({"zero_optimization": {"stage": 2, "stge": 2}}, "stge"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0: known: 1, 2, 3"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device is"),
    ({"zero_optimization": 3}, "zero_optimization is 3: give a section"),
    ({"zero_optimisation": {}}, "did you mean 'zero_optimization'?"),
    ({"fp16": {"loss_scale": 0}}, "fp16.enabled is None: give true, false"),
    ({"bf16": {"enabled": "true"}}, "bf16.enabled is 'true': give true, false"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "the DeepSpeed JSON: AssertionError: "),
    ({"optimizer": {"type": "AdamWW"}}, "optimizer.type is 'AdamWW'"),
    ({"optimizer": {"type": "Muon"}, "zero_allow_untested_optimizer": True}, "optimizer.type"),
    ({"optimizer": {"type": "AdamW", "params": {"weigth_decay": 0.1}}}, "'weigth_decay'"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "high"}}}, "optimizer.params is {'lr': 'high'}: TypeError"),
    ({"steps_per_print": "all"}, "steps_per_print is 'all'"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, "'warmup_steps'"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing.cpu_checkpointing is True"),
    ({"train_batch_size": "8"}, "train_batch_size is '8'"),
    ({"gradient_clipping": -1}, "gradient_clipping is -1"),
    ({"comms_logger": "auto"}, "comms_logger is 'auto'"),
]


@pytest.mark.parametrize(("config", "words"), MISTAKES)
def test_mistakes_are_one_line(config, words):
    with pytest.raises(UserError) as error:
        DeepSpeedConfig.of(ZERO1 | config)
    assert words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_what_is_not_used_may_be_off_and_null_is_as_not_given():
    for off in (False, None, {}, {"enabled": False}):
        assert DeepSpeedConfig.of({**ZERO1, "pipeline": off, "autotuning": off, "fp16": None}) == ZERO1


def test_batch_arithmetic():
    def batch(*given, ranks=2):
        return DeepSpeedConfig.of(ZERO1 | dict(zip(BATCH_KEYS, given, strict=True))).batch(64, ranks)

    assert batch("auto", "auto", "auto") == (128, 64, 1)
    assert batch(None, 8, 4) == batch(64, "auto", 4) == batch(64, 8, "auto") == (64, 8, 4)
    assert batch(256, "auto", "auto") == (256, 64, 2)
    with pytest.raises(UserError, match=r"train_batch_size is 100, .*gpu 16 x .*steps 2 x world size 3 = 96"):
        batch(100, 16, 2, ranks=3)


def test_what_the_json_says_wins():
    given = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": "auto"}}, "gradient_clipping": 3.0}
    out = DeepSpeedConfig.of(ZERO1 | given).filled(OptimConfig(lr=1e-3, weight_decay=0.1), 1, 10)
    assert {key: out["optimizer"]["params"][key] for key in ("lr", "weight_decay")} == {"lr": 0.5, "weight_decay": 0.1}
    assert out["gradient_clipping"] == 3.0
    assert given["optimizer"]["params"]["weight_decay"] == "auto"  # the caller's own is left alone
    for kind, takes in {"RMSprop": {"eps"}, "adam": {"betas", "eps", "torch_adam"}, "SGD": set()}.items():
        optimizer = {"type": kind, "params": {"lr": 0.1}}
        of_kind = DeepSpeedConfig.of({**ZERO1, "optimizer": optimizer, "zero_allow_untested_optimizer": True})
        assert {*of_kind.filled(OptimConfig(), 1, 10)["optimizer"]["params"]} == {"lr", "weight_decay", *takes}


def test_auto_is_filled_as_hugging_face_does():
    params = {"total_num_steps": 50, "warmup_num_steps": 10, "warmup_min_lr": 0, "warmup_max_lr": 0.5}
    sizes = {"reduce_bucket_size": 4096, "stage3_prefetch_bucket_size": 3686, "stage3_param_persistence_threshold": 640}
    given = {
        "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(params, "auto")},
        "zero_optimization": {"stage": 3, **dict.fromkeys(sizes, "auto")},
    }
    optim = OptimConfig(warmup_share=0.2, lr=0.5)
    out = DeepSpeedConfig.of(given).filled(optim, 1, 50, width=64)
    assert out["scheduler"]["params"] == params and out["zero_optimization"] == {"stage": 3, **sizes}
    del params["total_num_steps"]  # WarmupLR has none; the rest is filled though the JSON names nothing
    plain = DeepSpeedConfig.of({**ZERO1, "scheduler": {"type": "WarmupLR"}}).filled(optim, 1, 50)
    assert plain["scheduler"]["params"] == params


CPU, OLD_CPU, AMPERE, VOLTA = (False, True), (False, False), (True, True), (True, False)


@pytest.mark.parametrize(
    ("fp16", "bf16", "device", "runs"),
    [
        ("auto", "auto", AMPERE, "bf16"),
        ("auto", "auto", VOLTA, "fp16"),
        ("auto", False, CPU, "fp32"),
        (False, "auto", VOLTA, "fp32"),
        (True, None, CPU, "bf16"),
        (True, None, OLD_CPU, "fp32"),
        (True, None, AMPERE, "fp16"),
        (True, "auto", CPU, "bf16"),
    ],
)
def test_precision_is_decided_by_the_device(fp16, bf16, device, runs):
    given = {n: {"enabled": v} for n, v in (("fp16", fp16), ("bf16", bf16)) if v is not None}
    config = DeepSpeedConfig.of(ZERO1 | given)
    out = config.on(*device)
    assert out.precision == runs and "auto" not in json.dumps(out)
    assert (out is config) == (out == config)
