"""The DeepSpeed JSON: what is refused, in one line; precision, batch and "auto" values."""

import json
import random

import pytest

from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from ds_cmli.errors import UserError
from tests import make
from tests.config import fuzz_json
from tests.conftest import ZERO1

# A device has a GPU's fp16, and fast bf16.
CPU = (False, True)
OLD_CPU = (False, False)
AMPERE = (True, True)
VOLTA = (True, False)


def tiny(**optim) -> Config:
    """The smallest preset, with an image encoder of 64 features."""
    overrides = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 14}
    return load_preset("tiny", {"student": {"image_overrides": overrides}, "optim": optim})


MISTAKES = [
    ({"zero_optimization": {"stage": 2, "stge": 2}}, "stge"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0: known: 1, 2, 3"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device is"),
    ({"fp16": {"loss_scale": 0}}, "fp16.enabled is missing"),
    ({"bf16": {"enabled": "true"}}, "bf16.enabled is 'true': Input should be a valid boolean"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "the DeepSpeed JSON: AssertionError: "),
    ({"optimizer": {"type": "Muon"}, "zero_allow_untested_optimizer": True}, "optimizer.type"),
    ({"optimizer": {"type": "AdamW", "params": {"weigth_decay": 0.1}}}, "'weigth_decay'"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, "'warmup_steps'"),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": -3}}},
        "scheduler.params.warmup_num_steps is -3",
    ),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        "activation_checkpointing.cpu_checkpointing is True: PyTorch",
    ),
    ({"gradient_clipping": -1}, "gradient_clipping is -1"),
    ({"comms_logger": "auto"}, "comms_logger is 'auto'"),
    ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow is False: a NaN would reach"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "zero_optimization.overlap_comm is 'auto'"),
    ({"optimizer": {"type": "AdamW", "lr": 5.0}}, "key of optimizer is 'lr': known: params, type"),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean 'grad_accum_dtype'?"),
    ({"torch_autocast": {"enabled": True, "dytpe": "bf16"}}, "did you mean 'dtype'?"),
    ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is True: it has no effect here"),
    ({"flops_profiler": {"profile_step": 0}}, "flops_profiler.profile_step is 0"),
    ({"timers": ""}, "timers is '': Input should be an object"),
    ({"gradient_accumulation_steps": 10**30}, "Input should be less than or equal to 1000000"),
    ({"gradient_clipping": float("nan")}, "gradient_clipping is nan: Input should be a finite number"),
    ({"fp16": {"enabled": True, "initial_scale_power": 10**9}}, "fp16.initial_scale_power is 1000000000: "),
    *(
        ({"optimizer": {"type": "AdamW", "params": params}}, line)
        for params, line in [
            ({"betas": [0.9, 0.98, 0.99]}, "optimizer.params.betas is [0.9, 0.98, 0.99]: Tuple should have at most 2"),
            ({"betas": [0.9, 1.5]}, "optimizer.params is {"),
            ({"lr": 0}, "optimizer.params.lr is 0: Input should be greater than 0"),
            ({"lr": float("inf")}, "optimizer.params.lr is inf: Input should be a finite number"),
            ({"torch_adam": "no"}, "optimizer.params.torch_adam is 'no': Input should be a valid boolean"),
            ({"differentiable": True}, "optimizer.params is {"),
        ]
    ),
    *(
        ({"scheduler": {"type": kind, "params": params}}, line)
        for kind, params, line in [
            ("WarmupDecayLR", {"total_num_steps": -3}, "scheduler.params.total_num_steps is -3"),
            ("WarmupCosineLR", {"total_num_steps": 0}, "scheduler.params.total_num_steps is 0"),
            ("LRRangeTest", {"lr_range_test_min_lr": 0}, "the learning rate stays 0"),
            ("WarmupLR", {"warmup_type": "cosine"}, "scheduler.params.warmup_type is 'cosine'"),
            ("OneCycle", {"cycle_min_lr": 1e-4}, "scheduler.params is "),
        ]
    ),
]


@pytest.mark.parametrize(("config", "words"), MISTAKES)
def test_mistakes_are_one_line(config, words):
    assert words in make.refused(DeepSpeedConfig.of, ZERO1 | config)


def test_a_number_in_scientific_notation_is_a_whole_number_if_it_has_no_fraction():
    out = DeepSpeedConfig.of({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}, "gradient_clipping": 0.5})
    size = out["zero_optimization"]["reduce_bucket_size"]
    assert isinstance(size, int) and size == 500_000_000 and out["gradient_clipping"] == 0.5
    with pytest.raises(UserError, match=r"reduce_bucket_size is 0\.5: Input should be a valid integer"):
        DeepSpeedConfig.of({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0.5}})


def test_what_is_not_used_may_be_off_and_null_is_as_not_given():
    for off in (False, None, {}, {"enabled": False}):
        assert DeepSpeedConfig.of({**ZERO1, "pipeline": off, "autotuning": off, "fp16": None}) == ZERO1


def test_batch_arithmetic():
    def batch(*sizes, ranks=2):
        return DeepSpeedConfig.of(ZERO1 | dict(zip(BATCH_KEYS, sizes, strict=True))).batch(64, ranks)

    assert batch("auto", "auto", "auto") == (128, 64, 1)
    assert batch(None, 8, 4) == batch(64, "auto", 4) == batch(64, 8, "auto") == (64, 8, 4)
    assert batch(256, "auto", "auto") == (256, 64, 2)
    with pytest.raises(UserError, match=r"train_batch_size is 100, .*gpu 16 x .*steps 2 x world size 3 = 96"):
        batch(100, 16, 2, ranks=3)


def test_what_the_json_says_wins():
    content = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": "auto"}}, "gradient_clipping": 3.0}
    out = DeepSpeedConfig.of(ZERO1 | content).filled(tiny(lr=1e-3, weight_decay=0.1), 1, 10)
    assert {key: out["optimizer"]["params"][key] for key in ("lr", "weight_decay")} == {"lr": 0.5, "weight_decay": 0.1}
    assert out["gradient_clipping"] == 3.0
    assert content["optimizer"]["params"]["weight_decay"] == "auto"  # the caller's dictionary is left alone
    for kind, takes in {"RAdam": {"betas", "eps"}, "adam": {"betas", "eps", "torch_adam"}}.items():
        optimizer = {"type": kind, "params": {"lr": 0.1}}
        config = DeepSpeedConfig.of({**ZERO1, "optimizer": optimizer, "zero_allow_untested_optimizer": True})
        assert {*config.filled(tiny(), 1, 10)["optimizer"]["params"]} == {"lr", "weight_decay", *takes}


def test_auto_is_filled_as_hugging_face_does():
    params = {"total_num_steps": 50, "warmup_num_steps": 10, "warmup_min_lr": 0, "warmup_max_lr": 0.5}
    sizes = {"reduce_bucket_size": 4096, "stage3_prefetch_bucket_size": 3686, "stage3_param_persistence_threshold": 640}
    content = {
        "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(params, "auto")},
        "zero_optimization": {"stage": 3, **dict.fromkeys(sizes, "auto")},
    }
    config = tiny(warmup_share=0.2, lr=0.5)
    out = DeepSpeedConfig.of(content).filled(config, 1, 50)
    assert out["scheduler"]["params"] == params and out["zero_optimization"] == {"stage": 3, **sizes}
    del params["total_num_steps"]  # WarmupLR has none; the rest is filled though the JSON names nothing
    plain = DeepSpeedConfig.of({**ZERO1, "scheduler": {"type": "WarmupLR"}}).filled(config, 1, 50)
    assert plain["scheduler"]["params"] == params


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
    content = {n: {"enabled": v} for n, v in (("fp16", fp16), ("bf16", bf16)) if v is not None}
    config = DeepSpeedConfig.of(ZERO1 | content)
    out = config.on(*device)
    assert out.precision == runs and "auto" not in json.dumps(out) and "fp32" not in out
    assert (out is config) == (out == config)


def test_a_json_by_chance_is_one_line_or_kept_whole():
    draw = random.Random(7)
    accepted = [fuzz_json.read(fuzz_json.draw_json(draw)) is not None for _ in range(60)]
    assert 5 < sum(accepted) < 55, "the draws no longer meet both cases"
