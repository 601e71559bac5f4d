"""The keys that a DeepSpeed JSON may have here: kinds of values, use by ZeRO stage, and "auto".

DeepSpeed ignores keys that it does not know, and reads `1` or "true" differently from key to key.
These tables are strict, and need neither DeepSpeed nor PyTorch; tests compare them with what both
really accept.
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
)


def _each(kind: Kind, names: str) -> dict[str, Kind]:
    """Give several keys, named in one text, the same kind."""
    return dict.fromkeys(names.split(), kind)


def _old_zero(what: str) -> Kind:
    need = f'an old name: give "offload_{what}": {{"device": "cpu"}}'
    return refused(need, None, False)


PRECISION = one_of("fp32", "fp16", "bf16")
_HALF = ("fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16")
AUTOCAST = one_of(*_HALF, "fp32", "float32", "float", "torch.float32")
# Not "nvme", because states swapped to NVMe are in no checkpoint.
OFFLOAD_DEVICE = one_of("none", "cpu")
_NVME = "it is for NVMe"
_NO_EXPERTS = "the models have no experts"
_OUR_CHECKPOINTS = "checkpoints are written by this project"
_TAGS = one_of("Ignore", "IGNORE", "Warn", "WARN", "Fail", "FAIL")

# The sections and their keys; "" is the top level. A nested section is named with a dot.
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
        "steps_per_print": optional(integer(1)),
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
        "datastates_ckpt": no_effect(_OUR_CHECKPOINTS),
        "compile": no_effect("models are not compiled", {}, {"deepcompile": False}),
        "aio": no_effect("nothing is offloaded to NVMe", {}),
    }
    | _each(no_effect(_NO_EXPERTS), "expert_parallel use_data_before_expert_parallelism")
    | _each(boolean, "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer")
    | _each(boolean, "wall_clock_breakdown memory_breakdown dump_state disable_python_gc"),
    "zero_optimization": {
        "stage": one_of(0, 1, 2, 3),
        "overlap_comm": optional(boolean),
        "stage3_model_persistence_threshold": integer(most=2**63 - 1),
        "pipeline_loading_checkpoint": refused(
            "checkpoints are read by this project: remove it", False
        ),
        "elastic_checkpoint": refused(
            "a run resumes on any number of ranks without it: remove it", False
        ),
        "legacy_stage1": refused("DeepSpeed has no such stage any more: remove it", False),
        "leaf_module": no_effect(_NO_EXPERTS, {}),
        "zenflow": refused("ZenFlow is not supported here: remove it", None),
        "save_muon_momentum_buffer_in_memory": no_effect("nothing is offloaded to NVMe"),
        "cpu_offload": _old_zero("optimizer"),
        "cpu_offload_param": _old_zero("param"),
        "cpu_offload_use_pin_memory": refused(
            'an old name: give "pin_memory" in "offload_optimizer"', None, False
        ),
        "stage3_gather_fp16_weights_on_model_save": refused(
            "an old name: give stage3_gather_16bit_weights_on_model_save", False
        ),
    }
    | _each(boolean, "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce")
    | _each(boolean, "allgather_partitions load_from_fp32_weights ignore_unused_parameters")
    | _each(boolean, "round_robin_gradients parameter_alignment compute_grad_norm")
    | _each(boolean, "stage3_gather_16bit_weights_on_model_save stage3_allgather_sequential")
    | _each(boolean, "stage3_use_all_reduce_for_fetch_params zero_quantized_weights")
    | _each(boolean, "zero_quantized_nontrainable_weights zero_quantized_gradients")
    | _each(boolean, "memory_efficient_linear override_module_apply log_trace_cache_warnings")
    | _each(boolean, "enable_sanity_checks")
    | _each(integer(1), "reduce_bucket_size allgather_bucket_size sub_group_size")
    | _each(integer(1), "zero_hpz_partition_size")
    | _each(integer(), "stage3_prefetch_bucket_size stage3_param_persistence_threshold")
    | _each(integer(), "stage3_max_live_parameters stage3_max_reuse_distance")
    | _each(integer(), "stage3_module_granularity_threshold"),
    "zero_optimization.offload_param": {"device": OFFLOAD_DEVICE, "pin_memory": boolean}
    | _each(no_effect(_NVME, None), "nvme_path buffer_count buffer_size max_in_cpu"),
    "zero_optimization.offload_optimizer": {
        "device": OFFLOAD_DEVICE,
        "pin_memory": boolean,
        "ratio": one_of(1, 1.0),
        "super_offload": refused("it is not supported here: remove it", False),
        "cpuadam_cores_perc": no_effect("it is for super_offload"),
    }
    | _each(no_effect(_NVME, None), "nvme_path buffer_count")
    | _each(no_effect(_NVME), "pipeline_read pipeline_write fast_init"),
    "fp16": {"loss_scale": number(0), "initial_scale_power": integer(0, 100)}
    | _each(integer(1), "loss_scale_window hysteresis min_loss_scale")
    | _each(boolean, "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
    "bf16": {
        "check_grad_overflow": refused(
            "a step that is not finite would spoil the weights: remove it", True
        )
    }
    | _each(boolean, "enabled immediate_grad_update bf16_master_weights_and_grads")
    | _each(boolean, "bf16_optimizer_states"),
    "torch_autocast": {
        "enabled": boolean,
        "dtype": AUTOCAST,
        "lower_precision_safe_modules": texts,
    },
    "activation_checkpointing": {
        "contiguous_memory_optimization": refused(
            "activations of images and texts differ in size: remove it", False
        ),
        "number_checkpoints": no_effect("it is for contiguous_memory_optimization", None),
    }
    | _each(boolean, "partition_activations cpu_checkpointing profile")
    | _each(boolean, "synchronize_checkpoint_boundary"),
    "data_types": {"keep_in_fp32_modules": either(texts, one_of("auto"))}
    | _each(optional(PRECISION), "grad_accum_dtype param_dtype buffer_dtype"),
    "checkpoint": {
        "tag_validation": _TAGS,
        "load_universal": refused("resuming decides it: remove it", False),
        "use_node_local_storage": refused("all nodes share a run's folder: remove it", False),
    }
    | _each(no_effect(_OUR_CHECKPOINTS), "parallel_write checkpoint_serialization writer"),
    "comms_logger": {"prof_ops": texts} | _each(boolean, "enabled prof_all verbose debug"),
    "flops_profiler": {
        "recompute_fwd_factor": number(0),
        "module_depth": integer(-1),
        "output_file": optional(text),
    }
    | _each(boolean, "enabled detailed")
    | _each(integer(1), "profile_step top_modules"),
    "tensorboard": {"enabled": boolean, "output_path": text, "job_name": text},
    "csv_monitor": {"enabled": boolean, "output_path": text, "job_name": text},
    "wandb": {"enabled": boolean, "group": optional(text), "team": optional(text), "project": text},
    "comet": {
        "enabled": boolean,
        "samples_log_interval": integer(1),
        "online": optional(boolean),
        "mode": optional(one_of("get", "create", "get_or_create")),
    }
    | _each(optional(text), "project workspace api_key experiment_name experiment_key"),
    "timers": {},
    "timers.throughput": {"enabled": boolean, "synchronized": boolean},
    "optimizer": {
        "legacy_fusion": no_effect("it is for fused optimizers that are not used"),
        "type": text,
    },
    "scheduler": {"type": text},
}
# DeepSpeed's defaults of the section fp16, without "enabled".
FP16_DEFAULTS = {
    "auto_cast": False,
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
    "fp16_master_weights_and_grads": False,
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
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
    "optimizer.params.lr",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
}
_FIRST_STAGES = (
    "reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size "
    "round_robin_gradients parameter_alignment compute_grad_norm ignore_unused_parameters"
)
_LAST_STAGE = (
    "sub_group_size memory_efficient_linear override_module_apply log_trace_cache_warnings "
    "enable_sanity_checks"
)
# Keys of zero_optimization that only some stages read; at others a line says that they are idle.
STAGES: dict[tuple[int, ...], set[str]] = {
    (1, 2, 3): {
        "contiguous_gradients",
        "reduce_bucket_size",
        "overlap_comm",
        "load_from_fp32_weights",
    },
    (1, 2): set(_FIRST_STAGES.split()),
    (3,): {key for key in SECTIONS["zero_optimization"] if key.startswith("stage3_")}
    | set(_LAST_STAGE.split()),
}
# Keys of zero_optimization that are refused below stage 3.
STAGE3_ONLY = (
    "offload_param",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
