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


ZERO = "deepspeed.runtime.zero"
COORDINATOR = f"{ZERO}.partitioned_param_coordinator:PartitionedParameterCoordinator"
_READS_VALUES = (
    "It reads values from tensors, which have none in a prediction, where ranks are alike."
)
_MAKES_VIEWS = (
    "A loop over all ranks makes views, which takes minutes in a prediction for many ranks."
)
_CHOOSES_KERNELS = (
    "A GPU chooses other kernels than the CPU that predicts; autograd leaves modes of torch "
    "functions, so that they would not see what activation checkpointing computes again."
)
_NO_GPU = "It asks the driver, and a predicted step is to find a GPU without one."
_WAITS_FOR_RANKS = "It waits for the other ranks, which are not there."
OBJECTS = """
all_gather_object gather_object broadcast_object_list scatter_object_list
"""
_NO_DATA = "It does not know tensors without data as what they stand for."
_NO_ADDRESS = "All tensors without data have the address 0, by which programs tell them apart."
CUDA_FUNCTIONS = """
is_available is_initialized init _lazy_init is_bf16_supported device_count current_device set_device
get_device_properties get_device_capability get_device_name get_arch_list can_device_access_peer
synchronize ipc_collect current_stream default_stream set_stream stream device Stream Event
is_current_stream_capturing _is_in_bad_fork default_generators _exchange_device
_maybe_exchange_device
"""
CUDA_RANDOM = """
manual_seed manual_seed_all seed seed_all get_rng_state get_rng_state_all set_rng_state
set_rng_state_all initial_seed
"""
CUDA_MEMORY = """
memory_stats mem_get_info empty_cache reset_peak_memory_stats reset_accumulated_memory_stats
reset_max_memory_allocated reset_max_memory_cached set_per_process_memory_fraction
_record_memory_history _dump_snapshot _snapshot
"""
PATCHES = {
    "timm: loaded keys": Patch(
        "timm.models._builder",
        "load_pretrained",
        "It does not return which keys of the pretrained weights it has used.",
    ),
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
        "It copies a script into each checkpoint that writes the weights of student.safetensors.",
    ),
    "deepspeed: ranks compared": Patch(
        f"{ZERO}.utils", "assert_lst_len_same_as_other_ranks", _READS_VALUES
    ),
    "deepspeed: rank 0 copied": Patch(f"{ZERO}.utils", "get_lst_from_rank0", _READS_VALUES),
    "deepspeed: gathered parameters": Patch(
        f"{COORDINATOR} {ZERO}.partition_parameters:AllGatherCoalescedHandle",
        "_PartitionedParameterCoordinator__all_gather_params_ wait",
        _MAKES_VIEWS,
    ),
    "deepspeed: scattered gradients": Patch(
        f"{ZERO}.stage3", "reduce_scatter_coalesced", _MAKES_VIEWS
    ),
    "deepspeed: flattened parameters": Patch(
        f"{ZERO}.stage_1_and_2:DeepSpeedZeroOptimizer",
        "flatten_dense_tensors_aligned",
        "It flattens on the host if the device has no room; in a prediction both have type cpu.",
    ),
    "deepspeed: norm asked again": Patch(
        f"{ZERO}.stage_1_and_2",
        "is_invalid_grad_norm",
        "It waits for the GPU, for each group of parameters, to learn nothing that decides.",
    ),
    "torch: linear": Patch(
        "torch.nn.functional",
        "linear",
        "ZeRO-3 replaces it for good by a function that keeps less for backward.",
    ),
    "torch: attention": Patch(
        "torch.nn.functional", "scaled_dot_product_attention", _CHOOSES_KERNELS
    ),
    "torch: dropout": Patch("torch.nn.functional", "dropout", _CHOOSES_KERNELS),
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
    "torch: address of a tensor": Patch("torch:Tensor", "data_ptr", _NO_ADDRESS),
    "torch: address of a storage": Patch("torch:UntypedStorage", "data_ptr", _NO_ADDRESS),
    "torch: copy to the host": Patch(
        "torch:Tensor",
        "cpu",
        "In a prediction the device has the type cpu too, so that the copy would take no memory.",
    ),
    "torch: GPU": Patch("torch.cuda", CUDA_FUNCTIONS, _NO_GPU),
    "torch: GPU's random numbers": Patch("torch.cuda torch.cuda.random", CUDA_RANDOM, _NO_GPU),
    "torch: GPU's memory": Patch("torch.cuda torch.cuda.memory", CUDA_MEMORY, _NO_GPU),
    "torch: accelerator's memory": Patch(
        "torch.accelerator torch.accelerator.memory", CUDA_MEMORY, _NO_GPU
    ),
    "torch: GPU's own functions": Patch(
        "torch._C",
        "_cuda_attach_out_of_memory_observer _cuda_getCurrentRawStream "
        "_cuda_cudaCachingAllocator_is_enabled",
        _NO_GPU,
        added=True,
    ),
    "triton: kernels": Patch(
        "triton.runtime.jit:JITFunction triton.runtime.autotuner:Autotuner", "run", _NO_GPU
    ),
    "torch: CUDA": Patch(
        "torch.version torch.cuda.nvtx torch._subclasses.fake_tensor:FakeTensorMode "
        "torch._subclasses.fake_tensor torch.backends.cudnn:m",
        "cuda range_push range_pop mark avoid_device_init init_gpu_context _init is_available",
        _NO_GPU,
    ),
    "torch: copied parameter": Patch("torch:Tensor", "__deepcopy__", _NO_DATA),
    "torch: formatted number": Patch("torch:Tensor", "__format__", _NO_DATA),
    "torch: data of the host": Patch(
        "torch._subclasses.fake_tensor:FakeTensor", "numpy tolist", _NO_DATA
    ),
    "torch: loading processes": Patch(
        "torch.utils.data.dataloader",
        "_MultiProcessingDataLoaderIter",
        "Tensors without data do not travel between processes.",
    ),
    "torch: pinned memory": Patch("torch:Tensor", "pin_memory share_memory_", _NO_GPU),
    "torch: other streams": Patch("torch:Tensor", "record_stream", _NO_GPU),
    "torch: meeting of ranks": Patch(
        "torch.distributed.distributed_c10d", "rendezvous", _WAITS_FOR_RANKS
    ),
    "torch: store of ranks": Patch("torch.distributed", "TCPStore", _WAITS_FOR_RANKS),
    "torch: backend of a group": Patch(
        "torch.distributed.distributed_c10d",
        "_new_process_group_helper",
        "It makes a communicator of NCCL, which a build without CUDA does not have.",
    ),
    "torch: NCCL": Patch("torch.distributed torch.cuda.nccl", "is_nccl_available version", _NO_GPU),
    "torch: patience of NCCL": Patch(
        "torch.distributed.distributed_c10d", "default_pg_nccl_timeout", _NO_GPU
    ),
    "torch: objects of ranks": Patch(
        "torch.distributed torch.distributed.distributed_c10d", OBJECTS, _WAITS_FOR_RANKS
    ),
    "python: threads": Patch(
        "threading:Thread", "_bootstrap_inner", "Modes of torch are of one thread alone."
    ),
    "torch: types for all parameters at once": Patch(
        "torch.optim.optimizer torch.utils._foreach_utils", "_foreach_supported_types", _NO_DATA
    ),
    "torch: messages": Patch(
        "torch.distributed",
        "batch_isend_irecv",
        "The fake process group gathers and sums, but delivers no message.",
    ),
    "torch: collectives": Patch(
        "torch.distributed:ProcessGroup",
        "allgather _allgather_base all_gather_single allreduce broadcast _reduce_scatter_base "
        "reduce_scatter_single",
        "gloo's thread releases tensors, and its copies of what it scatters, a moment later, where "
        "the profiler does not see it.",
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
