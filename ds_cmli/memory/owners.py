"""Finds a training step's tensors: parameters, gradients, optimizer states and the like.

Reads the attributes in which DeepSpeed's ZeRO optimizers (stages 1 to 3) keep tensors.
"""

from collections.abc import Iterator, Sequence

from torch.utils._pytree import tree_leaves

from ds_cmli.engine import TrainEngine

# No category of a report: tensors of an offloaded optimizer, which are in host memory.
HOST = "host"
# Attributes of DeepSpeed's optimizers.
PARAMETERS = (
    "bit16_groups_flat",
    "fp16_partitioned_groups_flat",
    "fp16_groups_flat",
    "bf16_groups_flat",
    "lp_param_buffer",
)
MASTER = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)
GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat",
)
OFFLOADED = (
    "temp_grad_buffer_for_cpu_offload",
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "accumulated_grads_in_cpu",
)


def owners(train_engine: TrainEngine) -> Iterator[tuple[str, Sequence[object]]]:
    """Yield (category, what is held), with every live tensor, in nestings of lists and the like.

    The first category of a storage is right.
    """
    engine, teacher = train_engine.engine, train_engine.teacher
    module, optimizer, inner = engine.module, engine.optimizer, engine.basic_optimizer
    if teacher is not None:
        yield "teacher", [*teacher.parameters(), *teacher.buffers()]
    parameters = list(module.parameters())
    yield "parameters", [*parameters, *module.buffers()]
    # This rank's partition under ZeRO-3.
    yield "parameters", [getattr(p, "ds_tensor", None) for p in parameters]
    yield "parameters", _attributes(optimizer, PARAMETERS)
    yield "gradients", [(p.grad, getattr(p, "grad_accum", None)) for p in parameters]
    master, gradients = "master weights", "gradients"
    states, averages = "optimizer states", "EMA weights"
    if is_offloaded(optimizer):
        yield HOST, _attributes(optimizer, OFFLOADED)
        master = gradients = states = averages = HOST
    # Without master weights the optimizer holds the module's own parameters, yielded above.
    groups = [group["params"] for group in inner.param_groups]
    updated = tree_leaves([groups, _attributes(optimizer, MASTER)])
    yield master, updated
    yield gradients, [getattr(p, "grad", None) for p in updated]
    if train_engine.ema is not None:
        yield averages, train_engine.ema.averages
    yield states, list(inner.state.values())
    yield "gradients", _attributes(optimizer, GRADIENTS)
    buckets = getattr(optimizer, "ipg_buckets", {})
    yield "ZeRO buckets", [bucket.buffer for bucket in buckets.values()]


def _attributes(optimizer: object, names: tuple[str, ...]) -> list[object]:
    return [getattr(optimizer, name, None) for name in names]


def is_offloaded(optimizer: object) -> bool:
    return any(_attributes(optimizer, ("cpu_offload", "offload_optimizer")))
