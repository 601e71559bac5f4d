"""What a DeepSpeed JSON may say here: every key with the kind of its value, every optimizer and scheduler.

DeepSpeed ignores keys that it does not know and reads `1` or "true" differently from key to key. These tables are
strict instead, and hold without importing DeepSpeed or PyTorch; tests compare them with what both really take.
"""

import math
from collections.abc import Callable
from typing import Any

Kind = Callable[[Any], str | None]  # what to give instead of a value; None: the value is fine


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "give true or false"


def integer(least: int = 0, most: int = 2**53) -> Kind:
    """A whole number, which may be written as 5e7."""

    def kind(value: Any) -> str | None:
        if _is_number(value) and least <= value <= most and value == int(value):
            return None
        bounds = f"whole number from {least}" + (f" to {most}" if most < 2**53 else "")
        return "give a " + ("positive whole number" if least == 1 else bounds)

    return kind


def number(least: float = -math.inf, below: float = math.inf, above: bool = False) -> Kind:
    """A finite number from `least` to `below`; `above`: `least` itself is too small."""

    def kind(value: Any) -> str | None:
        if _is_number(value) and abs(value) < 1e300 and least <= value < below and not (above and value == least):
            return None
        bounds = "" if least == -math.inf else f" above {least:g}" if above else f" of at least {least:g}"
        return f"give a finite number{bounds}" + ("" if below == math.inf else f" and below {below:g}")

    return kind


def one_of(*known: Any) -> Kind:
    def kind(value: Any) -> str | None:
        fits = any(value == k and type(value) is type(k) for k in known)
        shown = ", ".join("null" if k is None else f'"{k}"' if isinstance(k, str) else str(k).lower() for k in known)
        return None if fits else f"give {'one of ' if len(known) > 1 else ''}{shown}"

    return kind


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else "give a text"


def texts(value: Any) -> str | None:
    return None if isinstance(value, list) and all(isinstance(v, str) for v in value) else "give a list of texts"


def numbers(count: int | None = None, each: Kind | None = None) -> Kind:
    each = each or number()

    def kind(value: Any) -> str | None:
        if isinstance(value, list) and value and count in (None, len(value)) and not any(each(v) for v in value):
            return None
        return f"give a list of {count or 'some'} numbers" + (": " + str(each(None)) if each(None) else "")

    return kind


def optional(kind: Kind) -> Kind:
    return lambda value: None if value is None else kind(value)


def either(*kinds: Kind) -> Kind:
    return lambda value: None if any(kind(value) is None for kind in kinds) else kinds[0](value)


def refused(why: str, *harmless: Any) -> Kind:
    """A key without effect here, or one that would do harm; `harmless`: values that ask for nothing."""

    def kind(value: Any) -> str | None:
        return None if any(value == h and type(value) is type(h) for h in harmless) else why

    return kind


def no_effect(why: str, *harmless: Any) -> Kind:
    return refused(f"it has no effect here ({why}): remove it", *(harmless or (False, {}, {"enabled": False})))


PRECISION = one_of("fp32", "fp16", "bf16")
AUTOCAST = one_of(
    *("fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16", "fp32", "float32", "float"),
    *("torch.float32",),
)
OLD_ZERO = 'an old name: give "offload_{0}": {{"device": "cpu"}}'.format
OFFLOAD_DEVICE = one_of("none", "cpu")  # what is swapped to NVMe is in no checkpoint

SECTIONS: dict[str, dict[str, Kind]] = {
    "": {
        "train_batch_size": integer(1),
        "train_micro_batch_size_per_gpu": integer(1),
        "gradient_accumulation_steps": integer(1),
        "managed_gradient_accumulation": refused("training takes DeepSpeed's accumulation: remove it", True),
        "gradient_clipping": number(0),
        "prescale_gradients": boolean,
        "gradient_predivide_factor": number(0, above=True),
        "gradient_allreduce_op": one_of("mean", "sum"),
        "communication_data_type": optional(PRECISION),
        "seq_parallel_communication_data_type": no_effect("there is no sequence parallelism", None),
        "disable_allgather": no_effect("DeepSpeed reads it nowhere"),
        "zero_allow_untested_optimizer": boolean,
        "zero_force_ds_cpu_optimizer": boolean,
        "steps_per_print": optional(integer(1)),
        "wall_clock_breakdown": boolean,
        "memory_breakdown": boolean,
        "dump_state": boolean,
        "disable_python_gc": boolean,
        "log_level": optional(one_of("debug", "info", "warning", "error", "critical")),
        "dataloader_drop_last": refused("the last batch that is not full is always dropped: remove it", True),
        "vocabulary_size": no_effect("it is the tokenizer's"),
        "pipeline": no_effect("there is no pipeline parallelism"),
        "autotuning": no_effect("profiling/predict.py --fit finds the batch"),
        "data_efficiency": no_effect("the data does not come through DeepSpeed"),
        "hybrid_engine": no_effect("it is for generation"),
        "weight_quantization": no_effect("it is for inference"),
        "tensor_parallel": no_effect("the models are not split"),
        "expert_parallel": no_effect("the models have no experts"),
        "use_data_before_expert_parallelism": no_effect("the models have no experts"),
        "datastates_ckpt": no_effect("checkpoints are written by this project"),
        "compile": no_effect("models are not compiled", {}, {"deepcompile": False}),
        "aio": no_effect("nothing is offloaded to NVMe", {}),
    },
    "zero_optimization": {
        "stage": one_of(0, 1, 2, 3),
        **dict.fromkeys(("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce"), boolean),
        **dict.fromkeys(("allgather_partitions", "load_from_fp32_weights", "ignore_unused_parameters"), boolean),
        **dict.fromkeys(("round_robin_gradients", "parameter_alignment", "compute_grad_norm"), boolean),
        "reduce_bucket_size": integer(1),
        "allgather_bucket_size": integer(1),
        "overlap_comm": optional(boolean),
        "sub_group_size": integer(1),
        "stage3_prefetch_bucket_size": integer(),
        "stage3_param_persistence_threshold": integer(),
        "stage3_model_persistence_threshold": integer(most=2**63 - 1),
        "stage3_max_live_parameters": integer(),
        "stage3_max_reuse_distance": integer(),
        "stage3_module_granularity_threshold": integer(),
        "stage3_gather_16bit_weights_on_model_save": boolean,
        "stage3_use_all_reduce_for_fetch_params": boolean,
        "stage3_allgather_sequential": boolean,
        "zero_hpz_partition_size": integer(1),
        **dict.fromkeys(("zero_quantized_weights", "zero_quantized_nontrainable_weights"), boolean),
        **dict.fromkeys(("zero_quantized_gradients", "memory_efficient_linear", "override_module_apply"), boolean),
        **dict.fromkeys(("log_trace_cache_warnings", "enable_sanity_checks"), boolean),
        "pipeline_loading_checkpoint": refused("checkpoints are read by this project: remove it", False),
        "elastic_checkpoint": refused("a run resumes on any number of ranks without it: remove it", False),
        "legacy_stage1": refused("DeepSpeed has no such stage any more: remove it", False),
        "leaf_module": no_effect("the models have no experts", {}),
        "zenflow": refused("ZenFlow is not supported here: remove it", None),
        "save_muon_momentum_buffer_in_memory": no_effect("nothing is offloaded to NVMe"),
        "cpu_offload": refused(OLD_ZERO("optimizer"), None, False),
        "cpu_offload_param": refused(OLD_ZERO("param"), None, False),
        "cpu_offload_use_pin_memory": refused('an old name: give "pin_memory" in "offload_optimizer"', None, False),
        "stage3_gather_fp16_weights_on_model_save": refused(
            "an old name: give stage3_gather_16bit_weights_on_model_save", False
        ),
    },
    "zero_optimization.offload_param": {
        "device": OFFLOAD_DEVICE,
        "pin_memory": boolean,
        **dict.fromkeys(("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"), no_effect("it is for NVMe", None)),
    },
    "zero_optimization.offload_optimizer": {
        "device": OFFLOAD_DEVICE,
        "pin_memory": boolean,
        "ratio": one_of(1, 1.0),
        "super_offload": refused("it is not supported here: remove it", False),
        "cpuadam_cores_perc": no_effect("it is for super_offload"),
        **dict.fromkeys(("nvme_path", "buffer_count"), no_effect("it is for NVMe", None)),
        **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init"), no_effect("it is for NVMe")),
    },
    "fp16": {
        "enabled": boolean,
        "auto_cast": boolean,
        "loss_scale": number(0),
        "initial_scale_power": integer(0, 100),
        "loss_scale_window": integer(1),
        "hysteresis": integer(1),
        "consecutive_hysteresis": boolean,
        "min_loss_scale": integer(1),
        "fp16_master_weights_and_grads": boolean,
    },
    "bf16": {
        "enabled": boolean,
        "immediate_grad_update": boolean,
        "check_grad_overflow": refused("a step that is not finite would spoil the weights: remove it", True),
        "bf16_master_weights_and_grads": boolean,
        "bf16_optimizer_states": boolean,
    },
    "torch_autocast": {"enabled": boolean, "dtype": AUTOCAST, "lower_precision_safe_modules": texts},
    "activation_checkpointing": {
        **dict.fromkeys(("partition_activations", "cpu_checkpointing"), boolean),
        **dict.fromkeys(("synchronize_checkpoint_boundary", "profile"), boolean),
        "contiguous_memory_optimization": refused("activations of images and texts differ in size: remove it", False),
        "number_checkpoints": no_effect("it is for contiguous_memory_optimization", None),
    },
    "data_types": {
        **dict.fromkeys(("grad_accum_dtype", "param_dtype", "buffer_dtype"), optional(PRECISION)),
        "keep_in_fp32_modules": either(texts, one_of("auto")),
    },
    "checkpoint": {
        "tag_validation": one_of(*(n for name in ("Ignore", "Warn", "Fail") for n in (name, name.upper()))),
        "load_universal": refused("resuming decides it: remove it", False),
        "use_node_local_storage": refused("all nodes share a run's folder: remove it", False),
        **dict.fromkeys(
            ("parallel_write", "checkpoint_serialization", "writer"),
            no_effect("checkpoints are written by this project"),
        ),
    },
    "comms_logger": {
        **dict.fromkeys(("enabled", "prof_all", "verbose", "debug"), boolean),
        "prof_ops": texts,
    },
    "flops_profiler": {
        "enabled": boolean,
        "recompute_fwd_factor": number(0),
        "profile_step": integer(1),
        "module_depth": integer(-1),
        "top_modules": integer(1),
        "detailed": boolean,
        "output_file": optional(text),
    },
    "tensorboard": {"enabled": boolean, "output_path": text, "job_name": text},
    "csv_monitor": {"enabled": boolean, "output_path": text, "job_name": text},
    "wandb": {"enabled": boolean, "group": optional(text), "team": optional(text), "project": text},
    "comet": {
        "enabled": boolean,
        "samples_log_interval": integer(1),
        **dict.fromkeys(("project", "workspace", "api_key", "experiment_name", "experiment_key"), optional(text)),
        "online": optional(boolean),
        "mode": optional(one_of("get", "create", "get_or_create")),
    },
    "timers": {},
    "timers.throughput": {"enabled": boolean, "synchronized": boolean},
    "optimizer": {"legacy_fusion": no_effect("it is for fused optimizers that are not used"), "type": text},
    "scheduler": {"type": text},
}
FP16_DEFAULTS = {  # DeepSpeed's own, beside "enabled"
    **{"auto_cast": False, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2},
    **{"consecutive_hysteresis": False, "min_loss_scale": 1, "fp16_master_weights_and_grads": False},
}
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # that a section needs where enabled

# What "auto" means for these, by the model's hidden size.
WIDTHS: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}
# Where "auto" is filled, as Hugging Face's integration does.
AUTO = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("fp16.enabled", "bf16.enabled"),
    *("optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay"),
    *("scheduler.params.warmup_min_lr", "scheduler.params.warmup_max_lr", "scheduler.params.warmup_num_steps"),
    *("scheduler.params.total_num_steps",),
    *(f"zero_optimization.{key}" for key in WIDTHS),
}
# Keys of zero_optimization that only some stages read; at the others they are told.
STAGES = {
    (1, 2, 3): ("contiguous_gradients", "reduce_bucket_size", "overlap_comm", "load_from_fp32_weights"),
    (1, 2): (
        *("reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size"),
        *("round_robin_gradients", "parameter_alignment", "compute_grad_norm", "ignore_unused_parameters"),
    ),
    (3,): (
        *(key for key in SECTIONS["zero_optimization"] if key.startswith("stage3_")),
        *("sub_group_size", "memory_efficient_linear", "override_module_apply"),
        *("log_trace_cache_warnings", "enable_sanity_checks"),
    ),
}
STAGE3_ONLY = (
    *("offload_param", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
    *("zero_quantized_gradients",),
)

_TORCH = "foreach maximize differentiable"
_ADAM = f"lr betas eps weight_decay capturable {_TORCH}"
OPTIMIZERS = {
    "Adadelta": f"lr rho eps weight_decay capturable {_TORCH}",
    "Adafactor": "lr beta2_decay eps d weight_decay foreach maximize",
    "Adagrad": f"lr lr_decay weight_decay initial_accumulator_value eps fused {_TORCH}",
    "Adam": f"{_ADAM} amsgrad fused torch_adam adam_w_mode bias_correction set_grad_none fp32_optimizer_states",
    "AdamW": f"{_ADAM} amsgrad fused torch_adam adam_w_mode bias_correction set_grad_none fp32_optimizer_states",
    "Adamax": _ADAM,
    "ASGD": f"lr lambd alpha t0 weight_decay capturable {_TORCH}",
    "Lamb": "lr bias_correction betas eps eps_inside_sqrt weight_decay max_coeff min_coeff amsgrad",
    "Lion": "lr betas weight_decay set_grad_none fp32_optimizer_states",
    "NAdam": f"{_ADAM} momentum_decay decoupled_weight_decay",
    "RAdam": f"{_ADAM} decoupled_weight_decay",
    "RMSprop": f"lr alpha eps weight_decay momentum centered capturable {_TORCH}",
    "Rprop": f"lr etas step_sizes capturable {_TORCH}",
    "SGD": f"lr momentum dampening weight_decay nesterov fused {_TORCH}",
}
ZERO_TESTED = ("Adam", "AdamW", "Lion")
OURS_ALONE = {"bias_correction", "set_grad_none", "fp32_optimizer_states"}  # of DeepSpeed's Adam, not of PyTorch's
NO_OPTIMIZERS = {
    "LBFGS": "it needs the loss several times a step",
    "SparseAdam": "no gradient here is sparse",
    "Muon": "it takes matrices alone, and these models have other parameters",
    **dict.fromkeys(("MuAdam", "MuAdamW", "MuSGD"), "the models have no muP shapes"),
}
# By their lower case; DeepSpeed takes its own in any case, PyTorch's as they are written.
DEEPSPEED_OPTIMIZERS = {n.lower(): n for n in ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", *NO_OPTIMIZERS)}

# "!": required, "+": filled where missing.
SCHEDULERS = {
    "LRRangeTest": "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase",
    "OneCycle": "cycle_min_lr! cycle_max_lr! decay_lr_rate cycle_first_step_size cycle_second_step_size "
    "cycle_first_stair_count cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom "
    "decay_mom_rate",
    "WarmupLR": "warmup_min_lr+ warmup_max_lr+ warmup_num_steps+ warmup_type",
    "WarmupDecayLR": "total_num_steps+ warmup_min_lr+ warmup_max_lr+ warmup_num_steps+ warmup_type",
    "WarmupCosineLR": "total_num_steps+ warmup_min_ratio warmup_num_steps+ cos_min_ratio warmup_type",
    "ConstantLR": "factor total_iters",
    "CosineAnnealingLR": "T_max! eta_min",
    "CosineAnnealingWarmRestarts": "T_0! T_mult eta_min",
    "CyclicLR": "base_lr! max_lr! step_size_up step_size_down mode gamma scale_mode cycle_momentum base_momentum "
    "max_momentum",
    "ExponentialLR": "gamma!",
    "LinearLR": "start_factor end_factor total_iters",
    "MultiStepLR": "milestones! gamma",
    "OneCycleLR": "max_lr! total_steps epochs steps_per_epoch pct_start anneal_strategy cycle_momentum base_momentum "
    "max_momentum div_factor final_div_factor three_phase",
    "PolynomialLR": "total_iters power",
    "StepLR": "step_size! gamma",
}
DEEPSPEED_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
NO_SCHEDULERS = {
    **dict.fromkeys(("LambdaLR", "MultiplicativeLR"), "JSON has no functions"),
    **dict.fromkeys(("SequentialLR", "ChainedScheduler"), "JSON has no scheduler objects"),
    "ReduceLROnPlateau": "there is no validation loss at each step",
}

_share = number(0, 1)
_rates = either(number(0), numbers(None, number(0)))
_flags = (
    *("amsgrad", "maximize", "capturable", "torch_adam", "adam_w_mode", "bias_correction", "set_grad_none"),
    *("fp32_optimizer_states", "eps_inside_sqrt", "decoupled_weight_decay", "centered", "nesterov", "three_phase"),
    *("cycle_momentum", "lr_range_test_staircase"),
)
_counts = ("cycle_first_stair_count", "cycle_second_stair_count", "decay_step_size")
_lengths = (
    *(
        "lr_range_test_step_size",
        "cycle_first_step_size",
        "warmup_num_steps",
        "total_num_steps",
        "total_iters",
        "T_max",
    ),
    *("T_0", "T_mult", "step_size_up", "step_size", "epochs", "steps_per_epoch", "total_steps"),
)
# Parameters of optimizers and schedulers by their names; any other one is a number.
PARAMETERS: dict[str, Kind] = {
    "lr": number(0, above=True),
    "betas": numbers(2, _share),
    "etas": numbers(2, number(0, above=True)),
    "step_sizes": numbers(2, number(0, above=True)),
    **dict.fromkeys(("eps", "weight_decay", "momentum", "lr_decay", "initial_accumulator_value"), number(0)),
    **dict.fromkeys(_flags, boolean),
    "differentiable": one_of(False),
    **dict.fromkeys(("foreach", "fused"), optional(boolean)),
    **dict.fromkeys(_counts, optional(integer())),
    **dict.fromkeys(_lengths, integer(1)),
    **dict.fromkeys(("cycle_second_step_size", "step_size_down"), optional(integer(1))),
    "milestones": numbers(None, integer(1)),
    "warmup_type": one_of("log", "linear"),
    "mode": one_of("triangular", "triangular2", "exp_range"),
    "scale_mode": one_of("cycle", "iterations"),
    "anneal_strategy": one_of("cos", "linear"),
    "pct_start": number(0, 1),
    **dict.fromkeys(
        ("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr", "base_lr", "max_lr"),
        _rates,
    ),
    **dict.fromkeys(
        ("warmup_min_ratio", "cos_min_ratio", "eta_min", "factor", "start_factor", "end_factor"), number(0)
    ),
}
PARAMETER = number()
