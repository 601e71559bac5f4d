"""DeepSpeed JSONs by chance: a valid one with one to three random changes.

It is refused in one line, or every value that it gives arrives in the configuration with its type.
"""

import copy
import json
import random
from typing import Any

from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.errors import UserError

# Sections with their keys, and a value that is usual for each.
USUAL: dict[str, dict[str, Any]] = json.loads("""{
    "": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5, "communication_data_type": "fp32", "gradient_allreduce_op": "sum",
        "gradient_predivide_factor": 2.0, "prescale_gradients": true, "zero_allow_untested_optimizer": true,
        "zero_force_ds_cpu_optimizer": false, "wall_clock_breakdown": true, "memory_breakdown": true, "steps_per_print":
        1, "dump_state": true, "disable_python_gc": true, "log_level": "warning", "pipeline": {"enabled": false}, "aio":
        {"block_size": 5}, "elasticity": null, "amp": {"enabled": true}},
    "zero_optimization": {"stage": 2, "overlap_comm": true, "reduce_scatter": false, "cpu_offload": false,
        "contiguous_gradients": false, "reduce_bucket_size": 5e7, "allgather_bucket_size": 1000, "allgather_partitions":
        false, "round_robin_gradients": true, "sub_group_size": 1000, "ignore_unused_parameters": false,
        "load_from_fp32_weights": false, "parameter_alignment": true, "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 1e4, "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": true, "offload_optimizer": {"device": "cpu"}, "offload_param":
        {"device": "none", "pin_memory": true}, "elastic_checkpoint": false, "compute_grad_norm": true,
        "memory_efficient_linear": false, "leaf_module": {"names": ["blocks"]}, "mics_shard_size": 1},
    "bf16": {"enabled": true, "immediate_grad_update": true, "check_grad_overflow": true},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 100, "hysteresis": 2, "min_loss_scale": 1},
    "optimizer": {"type": "AdamW", "legacy_fusion": true},
    "optimizer.params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.01, "amsgrad": true,
        "foreach": true, "fused": true, "maximize": true, "torch_adam": true, "adam_w_mode": false, "capturable": true,
        "momentum": 0.9},
    "scheduler": {"type": "WarmupLR"},
    "scheduler.params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "warmup_type": "linear",
        "total_num_steps": "auto", "last_batch_iteration": -1},
    "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16", "keep_in_fp32_modules": []},
    "torch_autocast": {"enabled": true, "dtype": "bf16", "lower_precision_safe_modules": ["torch.nn.Linear"]},
    "activation_checkpointing": {"partition_activations": false, "number_checkpoints": null, "profile": true},
    "checkpoint": {"tag_validation": "Fail", "use_node_local_storage": false, "writer": {}},
    "flops_profiler": {"enabled": true, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": false},
    "comms_logger": {"enabled": true, "verbose": false, "prof_all": true, "debug": false},
    "timers": {"throughput": {"enabled": true, "synchronized": false}},
    "tensorboard": {"enabled": false, "output_path": "logs", "job_name": "x"},
    "csv_monitor": {"enabled": false, "output_path": "logs"},
    "wandb": {"enabled": false, "project": "x"}
}""")
KINDS = {
    "optimizer": ("Adam", "adamw", "SGD", "RMSprop", "NAdam", "Adamax", "ASGD", "Adafactor", "Lion", "LBFGS", "", 3),
    "scheduler": ("WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest", "StepLR", None),
}
WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 0.5, 2.0, -0.5, 1e30, 10**30, 10**400, float("nan"), float("inf")),
    *("", "auto", "no", "true", "cpu", "\u0000", "fp32", [], [1], [0.9, 0.98, 0.99], {}, {"enabled": True}, {"x": {}}),
)


def draw_json(draw: random.Random) -> dict[str, Any]:
    """Return a valid JSON of some sections, with one to three changes."""
    content: dict[str, Any] = {"zero_optimization": {"stage": draw.choice((1, 2, 3))}}
    for name in draw.sample(sorted(USUAL), draw.randint(1, 4)):
        section = section_of(content, name)
        for key in draw.sample(sorted(USUAL[name]), draw.randint(1, min(4, len(USUAL[name])))):
            section[key] = copy.deepcopy(USUAL[name][key])
        if name in ("bf16", "fp16"):
            section["enabled"] = draw.choice((True, "auto", False))
    for _ in range(draw.randint(0, 2)):
        name = draw.choice(sorted(USUAL))
        section = section_of(content, name)
        key = draw.choice([*USUAL[name], draw.choice("xyz") + draw.choice([*USUAL[name]])])
        values = KINDS.get(name, WRONG) if key == "type" else WRONG
        section[key] = copy.deepcopy(draw.choice(values))
    return content


def section_of(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the section of that dotted name. Make it if it is missing or is no section."""
    for part in filter(None, name.split(".")):
        if not isinstance(content.get(part), dict):
            content[part] = {"type": USUAL[part]["type"]} if part in KINDS else {}
        content = content[part]
    return content


def lost_values(content: Any, kept: Any, path: str = "") -> list[str]:
    """Return the settings that are not kept with their value and, for a boolean, their type."""
    if isinstance(content, dict) and isinstance(kept, dict):
        lost = []
        for key, value in content.items():
            asks_for_nothing = value in (None, False, {}, {"enabled": False})
            if key in kept or not asks_for_nothing:
                lost += lost_values(value, kept.get(key), f"{path}{key}.")
        return lost
    same = content == kept and isinstance(content, bool) == isinstance(kept, bool)
    return [] if same else [path.strip(".")]


def read(content: dict[str, Any]) -> DeepSpeedConfig | None:
    """Return the configuration, or None if the JSON is refused in one line. Raises AssertionError."""
    try:
        config = DeepSpeedConfig.of(content)
    except UserError as error:
        assert "\n" not in str(error) and "Traceback" not in str(error), error
        return None
    assert not lost_values(content, config), (content, lost_values(content, config))
    return config
