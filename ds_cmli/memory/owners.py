"""Which of a training step's tensors is what: parameters, gradients, optimizer states, master weights, teacher.

Reads DeepSpeed's ZeRO optimizers (stages 1 to 3) and its wrappers without ZeRO by the attributes they keep tensors in.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ds_cmli.step import Step

HOST = "host"  # in no category: an offloaded optimizer's tensors lie in the host's memory
PARAMETERS = ("bit16_groups_flat", "fp16_partitioned_groups_flat", "fp16_groups_flat", "lp_param_buffer")
GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
OFFLOADED = ("temp_grad_buffer_for_cpu_offload", "param_buffer_of_bit16_for_cpu_offload_groups",
             "accumulated_grads_in_cpu")  # fmt: skip


def owners(trainer: Step) -> Iterator[tuple[str, Tensor]]:
    """(category, tensor) of all that lives now; where one storage comes twice, the first is right."""
    optimizer, inner = trainer.engine.optimizer, trainer.engine.basic_optimizer
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if trainer.teacher is not None:
        for tensor in (*trainer.teacher.parameters(), *trainer.teacher.buffers()):
            yield "teacher", tensor
    module = trainer.engine.module
    for parameter in module.parameters():
        yield "parameters", parameter
        yield from _tensors("parameters", getattr(parameter, "ds_tensor", None))
    for buffer in module.buffers():
        yield "parameters", buffer
    for name in PARAMETERS:
        yield from _tensors("parameters", getattr(optimizer, name, None))
    for parameter in module.parameters():
        yield from _tensors("gradients", [parameter.grad, getattr(parameter, "grad_accum", None)])
    if offloaded:
        for name in OFFLOADED:
            yield from _tensors(HOST, getattr(optimizer, name, None))
    master, states = (HOST, HOST) if offloaded else ("master weights", "optimizer states")
    for group in inner.param_groups if inner is not None else []:
        for parameter in group["params"]:
            # Without master weights the optimizer holds the module's own parameters, which came first.
            yield from _tensors(master, parameter)
            yield from _tensors(HOST if offloaded else "gradients", parameter.grad)
            yield from _tensors(states, inner.state.get(parameter))
    for name in GRADIENTS:
        yield from _tensors("gradients", getattr(optimizer, name, None))


def _tensors(category: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value: one, or any nesting of lists and dictionaries."""
    if isinstance(value, Tensor):
        yield category, value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(category, item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(category, item)
