import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config import deepspeed_keys as keys
from ds_cmli.config import optimizers
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.deepspeed_effects import overruled
from ds_cmli.config.schema import OptimConfig
from tests.conftest import ZERO1

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_are_valid_and_checkpoint_activations(path):
    config = DeepSpeedConfig.load(path)
    assert "activation_checkpointing" in config
    resolved = config.filled(OptimConfig(micro_batch=4), world_size=2, total_steps=10)
    assert '"auto"' not in json.dumps(resolved.raw())
    assert resolved["train_batch_size"] == resolved.train_batch == 8


def test_names_of_shipped_files():
    assert [p.stem for p in SHIPPED] == ["zero1", "zero2", "zero2_bf16", "zero2_offload", "zero3"]
    assert DeepSpeedConfig.load(SHIPPED[1]).precision == "fp16"


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
        ({"fp16": True}, "fp16 is True: Input should be a valid dictionary"),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, "did you mean 'cpu_checkpointing'?"),
        ({"fp16": {"loss_scale": 0}}, 'fp16 has no "enabled"'),
        ({"fp16": {"enabled": 1}}, "fp16.enabled is 1: Input should be a valid boolean"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled is 'true': Input should be a valid boolean"),
        ({"gradient_clipping": -1.0}, "gradient_clipping is -1.0: Input should be greater than or equal to 0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is nan: Input should be "),
        ({"aio": {"block_sise": 1}}, "aio is {'block_sise': 1}: it has no effect here"),
        ({"checkpoint": {"tag_validatoin": "Warn"}}, "did you mean 'tag_validation'?"),
        ({"data_types": {"grad_accum_type": "fp32"}}, "did you mean 'grad_accum_dtype'?"),
        ({"flops_profiler": {"enabled": True, "profle_step": 1}}, "did you mean 'profile_step'?"),
        ({"timers": {"throughput": {"enable": True}}}, "key of timers.throughput is 'enable': did you mean 'enabled'?"),
        ({"torch_autocast": {"enabled": True, "dtyp": "fp16"}}, "did you mean 'dtype'?"),
        ({"comms_logger": {"enabled": True, "verbos": True}}, "did you mean 'verbose'?"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency is {'enabled': True}: it has no effect here"),
        ({"pipeline": {"stages": 2}}, "pipeline is {'stages': 2}: it has no effect here"),
        ({"autotuning": {"enabled": True}}, "autotuning is {'enabled': True}: it has no effect here"),
        ({"compile": {"deepcompile": True}}, "compile is {'deepcompile': True}: it has no effect here"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param is {'device': 'cpu'}: no effect at stage 2",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, 'an old name: give "offload_optimizer"'),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0: give one of 1, 2, 3"),
        ({"zero_optimization": {}}, "has no stage, which DeepSpeed takes for 0: give 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"names": ["vit"]}}}, "it has no effect here"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "would spoil the weights"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "only with partition_activations"),
        ({"activation_checkpointing": {"number_checkpoints": 2}}, "number_checkpoints is 2: it has no effect here"),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 2}}, "has not tested it with ZeRO"),
        ({"comet": {"enabled": True}}, "comet.enabled is true: it needs comet_ml: pip install comet_ml, or give false"),
        ({"optimizer": {"type": ["AdamW"]}}, "optimizer.type is ['AdamW']: Input should be a valid string"),
        ({"optimizer": {"type": "LBFGS"}}, "it cannot train here, as it needs the loss several times a step"),
        ({"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}}, "PyTorch's AdamW does not take it"),
        ({"scheduler": {"type": "LambdaLR"}}, "JSON has no functions"),
        ({"scheduler": {"type": "StepLR"}}, "scheduler.params has no step_size: StepLR needs it"),
        ({"optimizer": {"typ": "Adam"}}, "did you mean 'type'?"),
        ({"optimizer": {"params": {}}}, "optimizer.type is None: "),
        ({"optimizer": {"type": "AdamWW"}}, "optimizer.type is 'AdamWW': did you mean 'AdamW'?"),
        (
            {"optimizer": {"type": "AdamW", "params": {"weigth_decay": 0.1}}},
            "key of optimizer.params is 'weigth_decay': did you mean 'weight_decay'?",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": None}},
            "optimizer.params is None: Input should be a",
        ),
        ({"scheduler": {"type": "WarmupRL"}}, "scheduler.type is 'WarmupRL': did you mean 'WarmupLR'?"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
            "key of scheduler.params is 'warmup_steps': did you mean 'warmup_num_steps'?",
        ),
        (
            {"zero_optimization.offload_optimizer": {"device": "cpu"}},
            'a JSON has no dotted keys: write "zero_optimization": {"offload_optimizer": ...}',
        ),
        ({"timers.throughput": {"enabled": True}}, 'write "timers": {"throughput": ...}'),
        ({"fp16.enabled": True}, 'write "fp16": {"enabled": ...}'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer.device": "cpu"}}, "key of zero_optimization is 'offl"),
        (
            {"optimizer": {"type": "AdamW", "params.lr": 1}},
            'write "params": {"lr": ...}',
        ),
        ({"": {}}, "key is '': known: "),
        ({"fp16": {" ": 1, "enabled": True}}, "key of fp16 is ' ': known: "),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, "adam_w_mode is False: AdamW decays"),
        (
            {"optimizer": {"type": "adam", "params": {"torch_adam": False, "fused": True}}},
            "optimizer.params.fused is True: DeepSpeed's own Adam does not take it",
        ),
        ({"train_batch_size": 0}, "train_batch_size is 0: Input should be greater than or equal to 1"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "choose one"),
    ],
)
def test_unknown_keys_and_bad_values(config, words):
    with pytest.raises(UserError) as error:
        DeepSpeedConfig.of(ZERO1 | config)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def batch(total, micro, steps, world_size, default=64):
    values = zip(BATCH_KEYS, (total, micro, steps), strict=True)
    return DeepSpeedConfig.of(ZERO1 | {k: v for k, v in values if v is not None}).batch(default, world_size)


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
    out = DeepSpeedConfig.of(ZERO1 | given).filled(OptimConfig(lr=1e-3, weight_decay=0.1), 1, 10)
    assert out["optimizer"]["params"]["lr"] == 0.5
    assert out["optimizer"]["params"]["weight_decay"] == 0.1
    assert out["gradient_clipping"] == 3.0
    assert given["optimizer"]["params"]["weight_decay"] == "auto"  # the caller's own is left alone


def test_an_optimizer_is_given_what_it_takes():
    def filled(kind):
        optimizer = {"type": kind, "params": {"lr": 0.1}}
        given = DeepSpeedConfig.of({**ZERO1, "optimizer": optimizer, "zero_allow_untested_optimizer": True})
        return set(given.filled(OptimConfig(), 1, 10).optimizer_params)

    assert filled("SGD") == {"lr", "weight_decay"}
    assert filled("Lion") == {"lr", "betas", "weight_decay"}
    assert filled("Lamb") == {"lr", "betas", "eps", "weight_decay"}
    assert filled("adam") == {"lr", "betas", "eps", "weight_decay", "torch_adam"}


def test_auto_is_filled_as_hugging_face_does_and_refused_elsewhere():
    params = {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    zero = dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
    )
    given = {"scheduler": {"type": "WarmupDecayLR", "params": params}, "zero_optimization": {"stage": 3, **zero}}
    out = DeepSpeedConfig.of(given).filled(OptimConfig(warmup_share=0.2, lr=0.5), 1, 50, width=lambda: 64)
    expected = {"total_num_steps": 50, "warmup_num_steps": 10, "warmup_min_lr": 0, "warmup_max_lr": 0.5}
    assert out["scheduler"]["params"] == expected
    assert [out.zero[key] for key in zero] == [4096, 3686, 640]
    for bad in ({"steps_per_print": "auto"}, {"zero_optimization": {"stage": "auto"}}, {"fp16": {"enabled": "Auto"}}):
        with pytest.raises(UserError, match=r"is .[aA]uto"):
            DeepSpeedConfig.of(ZERO1 | bad)


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_warmup_schedulers_need_no_parameters(kind):
    out = DeepSpeedConfig.of({**ZERO1, "scheduler": {"type": kind}}).filled(OptimConfig(warmup_share=0.2), 1, 50)
    assert out["scheduler"]["params"]["warmup_num_steps"] == 10
    assert ("total_num_steps" in out["scheduler"]["params"]) == (kind != "WarmupLR")


CPU, OLD_CPU, AMPERE, VOLTA = ("cpu", False, True), ("cpu", False, False), ("cuda", True, True), ("cuda", True, False)


@pytest.mark.parametrize(
    ("fp16", "bf16", "device", "runs"),
    [
        ("auto", "auto", AMPERE, "bf16"),
        ("auto", "auto", VOLTA, "fp16"),
        ("auto", "auto", CPU, "bf16"),
        ("auto", None, AMPERE, "fp16"),
        ("auto", None, CPU, "bf16"),
        ("auto", False, CPU, "fp32"),
        (None, "auto", VOLTA, "fp16"),
        (False, "auto", VOLTA, "fp32"),
        (True, "auto", AMPERE, "fp16"),
        ("auto", True, AMPERE, "bf16"),
        (True, None, CPU, "bf16"),
        (True, None, OLD_CPU, "fp32"),
        ("auto", "auto", OLD_CPU, "fp32"),
        (True, None, AMPERE, "fp16"),
        (False, False, AMPERE, "fp32"),
    ],
)
def test_precision_is_decided_by_the_device(fp16, bf16, device, runs):
    given = {n: {"enabled": v} for n, v in (("fp16", fp16), ("bf16", bf16)) if v is not None}
    out = DeepSpeedConfig.of(ZERO1 | given).on(*device)
    assert out.precision == runs
    assert "auto" not in json.dumps(out.raw())
    changed = "auto" in (fp16, bf16) or (fp16 is True and runs != "fp16")
    assert len(out.notices) == changed and all(runs in line and "\n" not in line for line in out.notices)


def test_keys_of_fp16_that_go_with_it_are_told():
    asks = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "auto_cast": True, "hysteresis": 2}
    (line,) = DeepSpeedConfig.of({**ZERO1, "fp16": asks}).on(*CPU).notices
    assert line.endswith("training in bf16 instead, without fp16.initial_scale_power 8, fp16.auto_cast True")
    defaults = keys.models()["fp16"]().model_dump()
    (line,) = DeepSpeedConfig.of({**ZERO1, "fp16": {**defaults, "enabled": True}}).on(*CPU).notices
    assert line.endswith("training in bf16 instead")


def test_bf16_that_is_asked_for_is_taken_where_it_is_slow_and_told():
    out = DeepSpeedConfig.of({**ZERO1, "bf16": {"enabled": True}}).on(*OLD_CPU)
    assert out.precision == "bf16"
    (line,) = out.notices
    assert "slower" in line and '"auto"' in line


def test_what_this_device_or_run_cannot_do_is_one_line():
    def refused(content, words):
        with pytest.raises(UserError, match=words):
            DeepSpeedConfig.of(ZERO1 | content).on(*CPU).filled(OptimConfig(), 3, 10)

    refused({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "for GPUs only")
    refused({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "3 ranks do not divide")
    refused({"flops_profiler": {"enabled": True, "profile_step": 11}}, "the run has 10 steps")
    refused({"optimizer": {"type": "Lion"}}, "for GPUs only")


def test_whole_numbers_may_be_written_as_floats():
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 1e2, "warmup_max_lr": 1.0}}
    zero = {"stage": 2, "reduce_bucket_size": 5e7}
    optimizer = {"type": "AdamW", "params": {"betas": [0.9, 0.5], "eps": 0.0, "lr": 2.0, "weight_decay": 0.9}}
    out = DeepSpeedConfig.of({"zero_optimization": zero, "scheduler": scheduler, "optimizer": optimizer})
    result = (out.zero["reduce_bucket_size"], *out["scheduler"]["params"].values())
    assert repr(out["optimizer"]) == repr(optimizer)
    assert result == (50_000_000, 100, 1.0) and [type(value) for value in result] == [int, int, float]


def test_it_cannot_be_changed():
    given = {"zero_optimization": {"stage": 2}}
    config = DeepSpeedConfig.of(given)
    given["zero_optimization"]["stage"] = 1
    config.raw()["zero_optimization"]["stage"] = 0
    config["zero_optimization"]["stage"] = 3
    assert config.stage == 2
    assert config.replaced({"stage": 1}).stage == 1


def test_the_command_line_beside_a_value_of_the_json_is_told():
    config = DeepSpeedConfig.of(
        {
            **ZERO1,
            **{"train_micro_batch_size_per_gpu": 8, "gradient_clipping": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "eps": "auto"}},
        }
    )
    given = {"lr": ("--lr", 0.1), "micro_batch": ("--micro-batch", 8), "eps": ("--set optim.eps", 1e-3)}
    assert [*overruled(config, given)] == ["--lr 0.1 does not count: the DeepSpeed JSON says optimizer.params.lr 0.5"]
    assert len([*overruled(config, {"micro_batch": ("--micro-batch", 4)})]) == 1
    assert not [*overruled(DeepSpeedConfig.of({**ZERO1, "train_batch_size": "auto"}), given)]


CONTENTS = {
    "nested": b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    "digits": b'{"train_batch_size": ' + b"9" * 5000 + b"}",
    "latin": b'{"a": "\xe9"}',
    "nan": b'{"gradient_clipping": NaN}',
    "infinite": b'{"gradient_clipping": 1e400}',
    "constant": b'{"gradient_clipping": -Infinity}',
    "twice": b'{"bf16": {}, "bf16": {}}',
    "list": b"[1]",
    "empty": b"",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_no_json_is_one_line(tmp_path, name):
    path = tmp_path / "x.json"
    path.write_bytes(CONTENTS[name])
    with pytest.raises(UserError) as error:
        DeepSpeedConfig.load(path)
    assert str(error.value).startswith(f"--deepspeed_config {path}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def values(kind):
    """Values of every JSON type, most of which no key takes."""
    return [None, True, False, 1, 0, -1, 2.5, 1e308, "true", "auto", [], [1], ["x"], {}, {"enabled": 1}, [[{}]]]


def test_any_value_anywhere_is_taken_or_one_line():
    for section, known in keys.sections().items():
        for key in [*known, "unknown"]:
            for value in values(known.get(key)):
                content: Any = {key: value}
                for part in reversed(section.split(".") if section else []):
                    content = {part: content}
                try:
                    DeepSpeedConfig.of(ZERO1 | content).on("cpu", False, True).filled(OptimConfig(), 1, 10, lambda: 32)
                except UserError as error:
                    assert "\n" not in str(error)
                    continue
                assert key != "unknown"


@pytest.mark.parametrize("section, table", [("optimizer", optimizers.OPTIMIZERS), ("scheduler", optimizers.SCHEDULERS)])
def test_any_parameter_is_taken_or_one_line(section, table):
    taken = refused = 0
    for kind, entry in table.items():
        for key in entry.takes:
            for value in values(key):
                try:
                    content = {**ZERO1, section: {"type": kind, "params": {key: value}}}
                    DeepSpeedConfig.of(content).filled(OptimConfig(), 1, 10)
                    taken += 1
                except UserError as error:
                    assert "\n" not in str(error) and section in str(error), (kind, key, value)
                    refused += 1
    assert taken and refused


def test_tables_hold_what_deepspeed_and_torch_take():
    import torch
    from deepspeed.runtime import constants

    ours = keys.sections()[""].keys() | keys.sections().keys()
    for name in ("TRAIN_BATCH_SIZE", "DATALOADER_DROP_LAST", "LOG_LEVEL", "DATA_TYPES", "CHECKPOINT", "DUMP_STATE"):
        assert getattr(constants, name) in ours

    for name in ("Adam", "AdamW"):
        entry = optimizers.OPTIMIZERS[name]
        ours = {*entry.parameters} - {*entry.deepspeeds, "torch_adam", "adam_w_mode"}
        assert ours <= inspect.signature(getattr(torch.optim, name)).parameters.keys()
    theirs = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n != "Optimizer"}
    assert theirs - {"Muon"} <= optimizers.OPTIMIZERS.keys()
    base = torch.optim.lr_scheduler.LRScheduler
    names = {n for n, c in vars(torch.optim.lr_scheduler).items() if inspect.isclass(c) and issubclass(c, base)}
    assert names - {"LRScheduler", "_LRScheduler"} <= optimizers.SCHEDULERS.keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fp16": {"enabled": False, "loss_scale": 8}}, "fp16: no effect: loss_scale, as enabled is false"),
        ({"fp16": {"enabled": True, "loss_scale": 8, "hysteresis": 3}}, "fp16: no effect: hysteresis, as loss_scale"),
        ({"comms_logger": {"enabled": True, "verbose": True, "prof_ops": ["x"]}}, "no effect: prof_ops, as prof_all"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none", "pin_memory": True}}},
            "no effect: pin_memory, as nothing is offloaded",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}},
            "is 1: DeepSpeed takes 2 for it",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"dampening": 0.5}}, "zero_allow_untested_optimizer": True},
            "dampening, as there is no momentum",
        ),
        (
            {"scheduler": {"type": "CyclicLR", "params": {"base_lr": 1, "max_lr": 2, "gamma": 0.5}}},
            "scheduler.params: no effect: gamma, as the mode is not exp_range",
        ),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1, "cycle_max_lr": 2, "decay_lr_rate": 1}}},
            "no effect: decay_lr_rate, as there is no decay_step_size",
        ),
        (
            {
                "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
                "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1, "cycle_momentum": False}},
            },
            "optimizer.params: no effect: lr, as the scheduler OneCycleLR sets the rates",
        ),
    ],
)
def test_keys_without_effect_beside_others_are_told(content, words):
    (line,) = DeepSpeedConfig.of(ZERO1 | content).notices
    assert words in line


@pytest.mark.parametrize(
    ("kind", "name", "more"),
    [
        ("WarmupDecayLR", "total_num_steps", {}), ("WarmupCosineLR", "total_num_steps", {}),
        ("PolynomialLR", "total_iters", {}), ("OneCycleLR", "total_steps", {"max_lr": 1}),
    ],
)  # fmt: skip
def test_a_scheduler_that_ends_before_the_run_is_refused(kind, name, more):
    def fill(params, total_steps):
        return DeepSpeedConfig.of({**ZERO1, "scheduler": {"type": kind, "params": params}}).filled(
            OptimConfig(), 1, total_steps
        )

    words = f"scheduler.params.{name} is 5: {kind} ends there; the run has 6 steps"
    with pytest.raises(UserError, match=words):  # as where a run goes on with more steps
        fill({**more, name: 5}, 6)
    assert fill({**more, name: 5}, 5)["scheduler"]["params"][name] == 5
    assert fill(more, 7)["scheduler"]["params"][name] == 7


def test_lengths_of_schedulers_that_do_not_suit_the_run_are_told():
    def notices(kind, **params):
        return (
            DeepSpeedConfig.of({**ZERO1, "scheduler": {"type": kind, "params": params}})
            .filled(OptimConfig(), 1, 9)
            .notices
        )

    assert "T_max is 5: the rate rises again after it; the run has 9 steps" in notices("CosineAnnealingLR", T_max=5)[0]
    assert "the 9 steps of the run are all warmup" in notices("WarmupLR", warmup_num_steps=9)[0]
