"""Which backend of `cmli_scores` runs on a GPU, and why Triton's kernels do not where they do not.

They need a C compiler for Triton's launcher, and a GPU and a Triton that go together. What is known
of these is in `unsuited`, for predictions too. What is not known is tried: both kernels are
launched for one pair, once for a kind of inputs.

Shape legend: N patches, M text positions, D features.
"""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ds_cmli.cmli.inputs import DEFAULT_SCRATCH_BYTES, Sides, Wanted
from ds_cmli.common.errors import one_line

LEAST_CAPABILITY = (8, 0)


def unsuited(capability: tuple[int, int], triton: str) -> str | None:
    """Why GPUs of a compute capability do not run the kernels that a version of Triton compiles.

    None if they do, as far as is known: `tests/cmli/test_triton_compile.py` compiles the kernels
    for each.
    """
    named = ".".join(map(str, capability))
    if capability < LEAST_CAPABILITY:
        return f"the kernels need compute capability 8.0 or later, this GPU has {named}"
    # Its tensor memory: 16-bit forward kernels do not compile, and fp32 gradients are of TF32.
    if capability[0] == 10 and TorchVersion(triton) < "3.9":
        return (
            f"Triton {triton} does not compile the kernels for compute capability {named} (3.9 "
            "does), and rounds fp32 to TF32 there"
        )
    return None


def why_not_on(capability: tuple[int, int]) -> str | None:
    """`unsuited` with the Triton installed here, for a GPU that need not be here.

    Without one it is the version that the CUDA build of PyTorch brings.
    """
    from ds_cmli.cmli.triton.library import triton

    return unsuited(capability, triton.__version__)


def why_no_kernels(device: torch.device, dtype: torch.dtype, N: int, M: int, D: int) -> str | None:
    """The reason why the kernels do not run on a GPU for inputs of these sizes, in one line.

    None if they do. The first time for such inputs they are compiled, launched and waited for.
    """
    reason = why_no_triton() or why_not_on(torch.cuda.get_device_capability(device))
    if reason is None:
        from ds_cmli.cmli.triton.tiles import power_of_two

        # As finely as the choice of tiles distinguishes sizes.
        reason = _why_they_fail(device, dtype, power_of_two(N), power_of_two(M), D)
    return reason


@functools.cache
def why_no_triton() -> str | None:
    """The reason why Triton cannot start a kernel here, in one line; None if it can.

    Triton compiles a launcher for its first kernel, so a missing C compiler is one such reason.
    """
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018  # compiled now, if it is in no cache
    except Exception as error:
        return one_line(error)[:300]
    return None


@functools.cache
def _why_they_fail(device: torch.device, dtype: torch.dtype, N: int, M: int, D: int) -> str | None:
    from ds_cmli.cmli import triton as kernels

    image = torch.zeros((1, N, D), dtype=dtype, device=device)
    text = torch.zeros((1, M, D), dtype=dtype, device=device)
    sides = Sides(image, text, torch.ones((1, M), dtype=torch.bool, device=device), None)
    try:
        *scores, arg_i2t, arg_t2i = kernels.forward(sides, DEFAULT_SCRATCH_BYTES, True)
        argmax, both = (arg_i2t, arg_t2i), Wanted(True, True)
        kernels.backward(sides, (scores[0], scores[1]), argmax, both, DEFAULT_SCRATCH_BYTES)
        torch.cuda.synchronize(device)  # raises what failed while it ran
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton's compiler, of ptxas, or of the launch
        return one_line(error)[:300]
    return None


def backend_of(backend: str, image: Tensor, text: Tensor) -> ModuleType:
    """The module of a backend, "chunked", "triton" or on GPUs "auto", for these inputs.

    It has `forward(sides, scratch_bytes, save_argmax)` and `backward(sides, grads, argmax, wanted,
    scratch_bytes)`. "auto" is triton where it runs, otherwise chunked with a warning.

    Raises:
        RuntimeError: triton is requested, and does not run here.
    """
    from ds_cmli.cmli import chunked

    if backend == "chunked":
        return chunked
    reason = None
    if image.device.type == "cuda":  # otherwise the backend says that it needs one
        (_, N, D), M = image.shape, text.shape[1]
        reason = why_no_kernels(image.device, image.dtype, N, M, D)
    if reason is not None and backend == "auto":
        warnings.warn(
            f"Triton does not run here, CMLI takes the slower chunked backend: {reason}",
            stacklevel=2,
        )
        return chunked
    if reason is not None:
        raise RuntimeError(
            f"backend='triton' cannot be used here ({reason}): use backend='chunked'"
        )
    from ds_cmli.cmli import triton

    return triton
