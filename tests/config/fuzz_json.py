"""DeepSpeed JSONs by chance: `python -m tests.config.fuzz_json FOLDER [NUMBER] [TRAININGS] [SEED]`.

A JSON is a valid one with one to three random changes. It is refused in one line, or every value that it gives arrives
in the configuration with its type. Of the accepted ones some are trained for two steps.
"""

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.errors import UserError
from tests import make

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
    """A valid JSON of some sections, with one to three changes."""
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
    """The section of that dotted name, made if it is missing or is no section."""
    for part in filter(None, name.split(".")):
        if not isinstance(content.get(part), dict):
            content[part] = {"type": USUAL[part]["type"]} if part in KINDS else {}
        content = content[part]
    return content


def lost_values(given: Any, kept: Any, path: str = "") -> list[str]:
    """The settings that were given and are not kept with their value and, for a boolean, their type."""
    if isinstance(given, dict) and isinstance(kept, dict):
        lost = []
        for key, value in given.items():
            asks_for_nothing = value in (None, False, {}, {"enabled": False})
            if key in kept or not asks_for_nothing:
                lost += lost_values(value, kept.get(key), f"{path}{key}.")
        return lost
    same = given == kept and isinstance(given, bool) == isinstance(kept, bool)
    return [] if same else [path.strip(".")]


def read(content: dict[str, Any]) -> DeepSpeedConfig | None:
    """The configuration, or None for a JSON that is refused in one line. Raises AssertionError."""
    try:
        config = DeepSpeedConfig.of(content)
    except UserError as error:
        line = str(error)
        assert "\n" not in line and "Traceback" not in line, line
        return None
    assert not lost_values(content, config), (content, lost_values(content, config))
    return config


def train_two_steps(content: dict[str, Any], folder: Path) -> str:
    """Train in this process; how it ended: "trained", "error: ..." of a mistake, or "FAILED: ..."."""
    folder.mkdir(parents=True)
    file = make.json_file(folder / "ds.json", content)
    options = {"--deepspeed_config": file, "--steps": 2, "--output-dir": folder / "run", "--micro-batch": 4}
    try:
        make.train(*make.small(options, {"optim.warmup_share": 0.5}))
    except UserError as error:
        return "error: " + str(error).replace("\n", "FAILED: two lines ")
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "trained"


def main(folder: str, number: str = "2000", start: str = "100", seed: str = "0") -> None:
    draw = random.Random(int(seed))
    accepted = []
    for _ in range(int(number)):
        content = draw_json(draw)
        try:
            if read(content) is not None:
                accepted.append(content)
        except Exception as error:
            print(f"FAILED to read {content}: {type(error).__name__}: {error}", flush=True)
    print(f"{number} JSONs: {len(accepted)} accepted, the others refused in one line", flush=True)
    for run, content in enumerate(draw.sample(accepted, min(int(start), len(accepted)))):
        print(train_two_steps(content, Path(folder, str(run)))[:400], json.dumps(content), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
