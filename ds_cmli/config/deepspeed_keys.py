"""The keys that a DeepSpeed JSON may have here, with the kinds of their values, and their use by stage and of "auto".

DeepSpeed ignores keys that it does not know, and reads `1` or "true" differently from key to key. These tables are
strict, and need neither DeepSpeed nor PyTorch; tests compare them with what both really accept.
"""

from collections.abc import Callable

from ds_cmli.config.json_values import (
    Kind,
    boolean,
    either,
    integer,
    no_effect,
    number,
    one_of,
    optional,
    refused,
    text,
    texts,
)  # fmt: skip

PRECISION = one_of("fp32", "fp16", "bf16")
AUTOCAST = one_of(
    *(
        "fp16",
        "float16",
        "half",
        "torch.float16",
        "bf16",
        "bfloat16",
        "torch.bfloat16",
        "fp32",
        "float32",
        "float",
    ),
    *("torch.float32",),
)
OLD_ZERO = 'an old name: give "offload_{0}": {{"device": "cpu"}}'.format
OFFLOAD_DEVICE = one_of(
    "none", "cpu"
)  # not "nvme", because states swapped to NVMe are in no checkpoint

SECTIONS: dict[str, dict[str, Kind]] = {
    "": {
        "train_batch_size": integer(1),
        "train_micro_batch_size_per_gpu": integer(1),
        "gradient_accumulation_steps": integer(1),
        "managed_gradient_accumulation": refused(
            "training takes DeepSpeed's accumulation: remove it", True
        ),
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
        "dataloader_drop_last": refused(
            "the last batch that is not full is always dropped: remove it", True
        ),
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
        **dict.fromkeys(
            ("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce"), boolean
        ),
        **dict.fromkeys(
            ("allgather_partitions", "load_from_fp32_weights", "ignore_unused_parameters"), boolean
        ),
        **dict.fromkeys(
            ("round_robin_gradients", "parameter_alignment", "compute_grad_norm"), boolean
        ),
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
        **dict.fromkeys(
            ("zero_quantized_gradients", "memory_efficient_linear", "override_module_apply"),
            boolean,
        ),
        **dict.fromkeys(("log_trace_cache_warnings", "enable_sanity_checks"), boolean),
        "pipeline_loading_checkpoint": refused(
            "checkpoints are read by this project: remove it", False
        ),
        "elastic_checkpoint": refused(
            "a run resumes on any number of ranks without it: remove it", False
        ),
        "legacy_stage1": refused("DeepSpeed has no such stage any more: remove it", False),
        "leaf_module": no_effect("the models have no experts", {}),
        "zenflow": refused("ZenFlow is not supported here: remove it", None),
        "save_muon_momentum_buffer_in_memory": no_effect("nothing is offloaded to NVMe"),
        "cpu_offload": refused(OLD_ZERO("optimizer"), None, False),
        "cpu_offload_param": refused(OLD_ZERO("param"), None, False),
        "cpu_offload_use_pin_memory": refused(
            'an old name: give "pin_memory" in "offload_optimizer"', None, False
        ),
        "stage3_gather_fp16_weights_on_model_save": refused(
            "an old name: give stage3_gather_16bit_weights_on_model_save", False
        ),
    },
    "zero_optimization.offload_param": {
        "device": OFFLOAD_DEVICE,
        "pin_memory": boolean,
        **dict.fromkeys(
            ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
            no_effect("it is for NVMe", None),
        ),
    },
    "zero_optimization.offload_optimizer": {
        "device": OFFLOAD_DEVICE,
        "pin_memory": boolean,
        "ratio": one_of(1, 1.0),
        "super_offload": refused("it is not supported here: remove it", False),
        "cpuadam_cores_perc": no_effect("it is for super_offload"),
        **dict.fromkeys(("nvme_path", "buffer_count"), no_effect("it is for NVMe", None)),
        **dict.fromkeys(
            ("pipeline_read", "pipeline_write", "fast_init"), no_effect("it is for NVMe")
        ),
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
        "check_grad_overflow": refused(
            "a step that is not finite would spoil the weights: remove it", True
        ),
        "bf16_master_weights_and_grads": boolean,
        "bf16_optimizer_states": boolean,
    },
    "torch_autocast": {
        "enabled": boolean,
        "dtype": AUTOCAST,
        "lower_precision_safe_modules": texts,
    },
    "activation_checkpointing": {
        **dict.fromkeys(("partition_activations", "cpu_checkpointing"), boolean),
        **dict.fromkeys(("synchronize_checkpoint_boundary", "profile"), boolean),
        "contiguous_memory_optimization": refused(
            "activations of images and texts differ in size: remove it", False
        ),
        "number_checkpoints": no_effect("it is for contiguous_memory_optimization", None),
    },
    "data_types": {
        **dict.fromkeys(("grad_accum_dtype", "param_dtype", "buffer_dtype"), optional(PRECISION)),
        "keep_in_fp32_modules": either(texts, one_of("auto")),
    },
    "checkpoint": {
        "tag_validation": one_of(
            *(n for name in ("Ignore", "Warn", "Fail") for n in (name, name.upper()))
        ),
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
        **dict.fromkeys(
            ("project", "workspace", "api_key", "experiment_name", "experiment_key"), optional(text)
        ),
        "online": optional(boolean),
        "mode": optional(one_of("get", "create", "get_or_create")),
    },
    "timers": {},
    "timers.throughput": {"enabled": boolean, "synchronized": boolean},
    "optimizer": {
        "legacy_fusion": no_effect("it is for fused optimizers that are not used"),
        "type": text,
    },
    "scheduler": {"type": text},
}
FP16_DEFAULTS = {  # DeepSpeed's defaults of the section fp16, without "enabled"
    **{
        "auto_cast": False,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
    },
    **{
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
        "fp16_master_weights_and_grads": False,
    },
}
# The package that a section needs if it is enabled.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}

# The values of "auto" for these keys, as functions of the model's hidden size.
WIDTHS: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}
# The keys for which "auto" is filled, as by Hugging Face's integration.
AUTO = {
    *(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ),
    *("fp16.enabled", "bf16.enabled"),
    *(
        "optimizer.params.lr",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.weight_decay",
    ),
    *(
        "scheduler.params.warmup_min_lr",
        "scheduler.params.warmup_max_lr",
        "scheduler.params.warmup_num_steps",
    ),
    *("scheduler.params.total_num_steps",),
    *(f"zero_optimization.{key}" for key in WIDTHS),
}
# Keys of zero_optimization that only some stages read; at other stages a line says that they have no effect.
STAGES = {
    (1, 2, 3): (
        "contiguous_gradients",
        "reduce_bucket_size",
        "overlap_comm",
        "load_from_fp32_weights",
    ),
    (1, 2): (
        *(
            "reduce_scatter",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
        ),
        *(
            "round_robin_gradients",
            "parameter_alignment",
            "compute_grad_norm",
            "ignore_unused_parameters",
        ),
    ),
    (3,): (
        *(key for key in SECTIONS["zero_optimization"] if key.startswith("stage3_")),
        *("sub_group_size", "memory_efficient_linear", "override_module_apply"),
        *("log_trace_cache_warnings", "enable_sanity_checks"),
    ),
}
STAGE3_ONLY = (
    *(
        "offload_param",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
    ),
    *("zero_quantized_gradients",),
)
