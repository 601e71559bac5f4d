"""Finds a training step's parameters, gradients, optimizer states, master weights, teacher, EMA and
ZeRO buckets.

Reads the attributes in which DeepSpeed's ZeRO optimizers (stages 1 to 3) and its wrappers without
ZeRO keep tensors.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ds_cmli.engine import TrainEngine

HOST = (
    "host"  # no category of a report: tensors of an offloaded optimizer, which are in host memory
)
# Attributes of DeepSpeed's optimizers.
PARAMETERS = ("bit16_groups_flat", "fp16_partitioned_groups_flat", "fp16_groups_flat", "bf16_groups_flat",
              "lp_param_buffer")  # fmt: skip
MASTER = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat", "fp32_groups",
          "fp32_groups_flat_partition")  # fmt: skip
GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat",
)
OFFLOADED = ("temp_grad_buffer_for_cpu_offload", "param_buffer_of_bit16_for_cpu_offload_groups",
             "accumulated_grads_in_cpu")  # fmt: skip


def owners(train_engine: TrainEngine) -> Iterator[tuple[str, Tensor]]:
    """Yield (category, tensor) for every live tensor; if a storage occurs twice, its first
    category is right.
    """
    for category, value in _held(train_engine):
        for tensor in _tensors(value):
            yield category, tensor


def _held(train_engine: TrainEngine) -> Iterator[tuple[str, Any]]:
    module, optimizer, inner = (
        train_engine.engine.module,
        train_engine.engine.optimizer,
        train_engine.engine.basic_optimizer,
    )
    if train_engine.teacher is not None:
        yield "teacher", [*train_engine.teacher.parameters(), *train_engine.teacher.buffers()]
    parameters = list(module.parameters())
    yield "parameters", [*parameters, *module.buffers()]
    yield (
        "parameters",
        [getattr(p, "ds_tensor", None) for p in parameters],
    )  # this rank's partition under ZeRO-3
    yield "parameters", [getattr(optimizer, name, None) for name in PARAMETERS]
    yield "gradients", [(p.grad, getattr(p, "grad_accum", None)) for p in parameters]
    master, gradients, states, averages = (
        "master weights",
        "gradients",
        "optimizer states",
        "EMA weights",
    )
    if is_offloaded(optimizer):
        yield HOST, [getattr(optimizer, name, None) for name in OFFLOADED]
        master = gradients = states = averages = HOST
    # Without master weights the optimizer holds the module's own parameters, which were yielded
    # above.
    groups = [group["params"] for group in inner.param_groups]
    updated = list(_tensors([groups, [getattr(optimizer, name, None) for name in MASTER]]))
    yield master, updated
    yield gradients, [p.grad for p in updated]
    yield averages, train_engine.ema.averages if train_engine.ema is not None else None
    yield states, list(inner.state.values())
    yield "gradients", [getattr(optimizer, name, None) for name in GRADIENTS]
    yield (
        "ZeRO buckets",
        [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()],
    )


def is_offloaded(optimizer: Any) -> bool:
    return bool(
        getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value: a tensor, or any nesting of lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
