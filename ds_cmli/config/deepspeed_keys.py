"""The keys that a DeepSpeed JSON may have here: kinds of values, use by ZeRO stage, and "auto".

DeepSpeed's own models name the keys of most sections and the kinds of their values. The table adds
the sections without a model, what has no effect here or is refused, and narrower kinds.
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import pydantic

from ds_cmli.common import quiet
from ds_cmli.config.optimizers import SCHEDULERS
from ds_cmli.config.validation import PydanticType, integer, no_effect, number, one_of, refused


def _each(kind: PydanticType, names: str) -> dict[str, PydanticType]:
    """Give several keys, named in one text, the same kind."""
    return dict.fromkeys(names.split(), kind)


def _old_zero(part: str) -> PydanticType:
    need = f'an old name: give "offload_{part}": {{"device": "cpu"}}'
    return refused(need, None, False)


_PRECISION = one_of("fp32", "fp16", "bf16")
_HALF = ("fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16")
# Not "nvme", because states swapped to NVMe are in no checkpoint.
_OFFLOAD_DEVICE = one_of("none", "cpu")
_NVME = "it is for NVMe"
_NO_EXPERTS = "the models have no experts"
_OUR_CHECKPOINTS = "checkpoints are written by this project"

# The sections with further keys than DeepSpeed's model has, or of another kind; "" is the top
# level. A nested section is named with a dot.
_ADDED: dict[str, dict[str, PydanticType]] = {
    "": {
        "train_batch_size": integer(1),
        "train_micro_batch_size_per_gpu": integer(1),
        "gradient_accumulation_steps": integer(1),
        "managed_gradient_accumulation": refused(
            "training takes DeepSpeed's accumulation: remove it", True
        ),
        "gradient_clipping": number(0),
        "prescale_gradients": bool,
        "gradient_predivide_factor": number(0, above=True),
        "gradient_allreduce_op": one_of("mean", "sum"),
        "communication_data_type": _PRECISION | None,
        "seq_parallel_communication_data_type": no_effect("there is no sequence parallelism", None),
        "disable_allgather": no_effect("DeepSpeed reads it nowhere"),
        "steps_per_print": integer(1) | None,
        "log_level": one_of(None, "debug", "info", "warning", "error", "critical"),
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
    | _each(bool, "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer")
    | _each(bool, "wall_clock_breakdown memory_breakdown dump_state disable_python_gc"),
    "zero_optimization": {
        "stage": one_of(1, 2, 3),
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
    | _each(integer(1), "allgather_bucket_size sub_group_size zero_hpz_partition_size"),
    "zero_optimization.offload_param": {"device": _OFFLOAD_DEVICE}
    | _each(no_effect(_NVME, None), "nvme_path buffer_count buffer_size max_in_cpu"),
    "zero_optimization.offload_optimizer": {
        "device": _OFFLOAD_DEVICE,
        "ratio": one_of(1, 1.0),
        "super_offload": refused("it is not supported here: remove it", False),
        "cpuadam_cores_perc": no_effect("it is for super_offload"),
    }
    | _each(no_effect(_NVME, None), "nvme_path buffer_count")
    | _each(no_effect(_NVME), "pipeline_read pipeline_write fast_init"),
    "fp16": {"loss_scale": number(0), "initial_scale_power": integer(0, 100)}
    | _each(integer(1), "loss_scale_window hysteresis min_loss_scale"),
    "bf16": {
        "check_grad_overflow": refused(
            "a step that is not finite would spoil the weights: remove it", True
        )
    },
    "torch_autocast": {
        "enabled": bool,
        "dtype": one_of(*_HALF, "fp32", "float32", "float", "torch.float32"),
        "lower_precision_safe_modules": list[str],
    },
    "activation_checkpointing": {
        "contiguous_memory_optimization": refused(
            "activations of images and texts differ in size: remove it", False
        ),
        "number_checkpoints": no_effect("it is for contiguous_memory_optimization", None),
    }
    | _each(bool, "partition_activations cpu_checkpointing profile")
    | _each(bool, "synchronize_checkpoint_boundary"),
    "data_types": {"keep_in_fp32_modules": list[str] | one_of("auto")}
    | _each(_PRECISION | None, "grad_accum_dtype param_dtype buffer_dtype"),
    "checkpoint": {
        "tag_validation": one_of("Ignore", "IGNORE", "Warn", "WARN", "Fail", "FAIL"),
        "load_universal": refused("resuming decides it: remove it", False),
        "use_node_local_storage": refused("all nodes share a run's folder: remove it", False),
    }
    | _each(no_effect(_OUR_CHECKPOINTS), "parallel_write checkpoint_serialization writer"),
    "comms_logger": {"prof_ops": list[str]},
    "flops_profiler": {
        "recompute_fwd_factor": number(0),
        "module_depth": integer(-1),
        "output_file": str | None,
    }
    | _each(bool, "enabled detailed")
    | _each(integer(1), "profile_step top_modules"),
    "comet": {
        "samples_log_interval": integer(1),
        "mode": one_of(None, "get", "create", "get_or_create"),
    },
    "timers": {"throughput": dict},
    "optimizer": {
        "legacy_fusion": no_effect("it is for fused optimizers that are not used"),
        "type": str,
        "params": dict,
    },
    "scheduler": {"type": str, "params": dict},
}


@cache
def models() -> dict[str, type[pydantic.BaseModel]]:
    """DeepSpeed's own models by section; imports DeepSpeed."""
    with quiet.without_trackers():
        from deepspeed.comm.config import CommsLoggerConfig
        from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero import config, offload_config
        from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": config.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


@cache
def sections() -> dict[str, dict[str, PydanticType]]:
    """The sections, their keys and the kinds of these; "" is the top level."""
    out: dict[str, dict[str, PydanticType]] = {}
    for section in [*_ADDED, *models()]:
        out[section] = {}
        if section and "." not in section:
            out[""][section] = dict
    for section, model in models().items():
        for name, field in model.model_fields.items():
            kind: Any = field.annotation
            if kind is int:
                kind = integer()
            for limit in field.metadata:
                kind = Annotated[kind, limit]
            out[section][field.alias or name] = kind
    for section, kinds in _ADDED.items():
        out[section] |= kinds
    return out


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Parameters of the optimizer that are filled from `OptimConfig`.
FILLED = ("lr", "betas", "eps", "weight_decay")
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
    *(*BATCH_KEYS, "gradient_clipping", "fp16.enabled", "bf16.enabled"),
    *map("optimizer.params.{}".format, FILLED),
    *map("scheduler.params.{}".format, SCHEDULERS["WarmupDecayLR"].filled),
    *map("zero_optimization.{}".format, WIDTHS),
}
# Keys of zero_optimization that only some stages read; at others a line says that they are idle.
STAGES = {
    (1, 2): "reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
    "allgather_bucket_size round_robin_gradients parameter_alignment compute_grad_norm "
    "ignore_unused_parameters",
    (3,): "sub_group_size memory_efficient_linear override_module_apply log_trace_cache_warnings "
    "enable_sanity_checks",  # and all keys that begin with stage3_
}
# Keys of zero_optimization that are refused below stage 3.
STAGE3_ONLY = (
    "offload_param",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
