"""A table of all run-time changes to libraries, and functions that replace attributes."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

_INHERITED = object()


@dataclass(frozen=True)
class Patch:
    owners: str  # "module" or "module:Class", by blanks
    attributes: str  # names, by blanks; those that an owner has are replaced
    reason: str
    added: bool = False  # also where the installed version has them not

    def targets(self) -> list[tuple[object, str]]:
        """The pairs (owner, attribute) to replace.

        Raises `AttributeError` if an owner has none.
        """
        out: list[tuple[object, str]] = []
        for place in self.owners.split():
            module, _, name = place.partition(":")
            owner = importlib.import_module(module)
            if name:
                owner = getattr(owner, name)
            names = [name for name in self.attributes.split() if self.added or hasattr(owner, name)]
            if not names:
                raise AttributeError(f"{place} has none of {self.attributes}")
            out += [(owner, name) for name in names]
        return out


_NO_GPU = "It asks the driver, and a predicted step is to find a GPU without one."
_NO_DATA = "It does not know tensors without data as what they stand for."
CUDA_FUNCTIONS = """
is_available is_initialized init _lazy_init is_bf16_supported device_count current_device set_device
get_device_properties get_device_capability get_device_name ipc_collect
synchronize current_stream default_stream set_stream stream device Stream Event
is_current_stream_capturing _is_in_bad_fork default_generators _exchange_device
_maybe_exchange_device manual_seed manual_seed_all get_rng_state set_rng_state initial_seed
memory_stats empty_cache reset_peak_memory_stats reset_max_memory_allocated reset_max_memory_cached
range_push range_pop
"""
PATCHES = {
    "transformers: mask": Patch(
        "transformers.masking_utils",
        "is_tracing",
        "It asks the GPU whether a text is padded, which the host knows: a CPU-GPU sync; and takes "
        "a tensor without data for a traced one, and keeps the mask of unpadded texts.",
    ),
    "huggingface_hub: offline": Patch(
        "huggingface_hub.constants",
        "HF_HUB_OFFLINE",
        "Requests to a hub that does not answer are repeated, for up to a minute.",
    ),
    "deepspeed: compiled operators": Patch(
        "deepspeed.ops",
        "__compatible_ops__",
        "On a CPU it compiles shared-memory collectives at the first start, which takes minutes.",
        added=True,  # DeepSpeed runs compilers to fill the table, even if it is only looked for
    ),
    "deepspeed: kernels": Patch(
        "deepspeed.ops.op_builder.builder:OpBuilder",
        "load",
        "It compiles kernels for a GPU, which update in place and allocate nothing.",
    ),
    "deepspeed: recovery script": Patch(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "_copy_recovery_script",
        "It copies a script into each checkpoint that writes the weights of model.safetensors.",
    ),
    "torch: linear": Patch(
        "torch.nn.functional",
        "linear",
        "ZeRO-3 replaces it for good by a function that keeps less for backward.",
    ),
    "torch: module conversion": Patch(
        "torch.nn:Module",
        "_apply",
        "It replaces parameters without data even where nothing changes, and then fails.",
    ),
    "torch: data of a tensor": Patch(
        "torch:Tensor",
        "data",
        "A tensor that gets the data of another device, or of one without data, stays as it was.",
    ),
    "torch: GPU": Patch(
        "torch.cuda torch.cuda.memory torch.cuda.random torch.cuda.nvtx", CUDA_FUNCTIONS, _NO_GPU
    ),
    "torch: types for all parameters at once": Patch(
        "torch.optim.optimizer torch.utils._foreach_utils", "_foreach_supported_types", _NO_DATA
    ),
}


@contextmanager
def patched(name: str, replacement: Callable[[Any], object]) -> Iterator[None]:
    """Replace each attribute of the entry `name`, inside, by `replacement(what it was)`."""
    with ExitStack() as stack:
        for owner, attribute in PATCHES[name].targets():
            stack.enter_context(replaced(owner, attribute, replacement(getattr(owner, attribute))))
        yield


@contextmanager
def patched_each(name: str, replacements: Mapping[str, object]) -> Iterator[None]:
    """Replace each attribute of the entry `name`, inside, by that of its name."""
    with ExitStack() as stack:
        for owner, attribute in PATCHES[name].targets():
            stack.enter_context(replaced(owner, attribute, replacements[attribute]))
        yield


def patch_for_good(name: str, value: object) -> None:
    """Replace the attributes of the entry `name` by `value` for the rest of the process."""
    for owner, attribute in PATCHES[name].targets():
        setattr(owner, attribute, value)


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Set `owner.name` to `value` inside; afterwards it is, or is inherited, as before.

    This is for objects of this package. Attributes of libraries need an entry in the table above.
    """
    before = vars(owner).get(name, _INHERITED)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def environment(values: Mapping[str, str], *others: str) -> Iterator[None]:
    """Set these variables in this process's environment, inside; `others` are restored too."""
    before = {name: os.environ.get(name) for name in (*values, *others)}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
