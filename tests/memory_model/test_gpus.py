from types import SimpleNamespace

from ds_cmli.memory_model import gpus
from tests import make

M = 2**20
# Names that nvidia-smi prints.
REPORTED = {
    "Tesla T4": "T4 16GB", "NVIDIA A10G": "A10G 24GB", "NVIDIA GeForce RTX 3090": "RTX 3090 24GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB", "NVIDIA A100 80GB PCIe": "A100 80GB", "NVIDIA H100 PCIe": "H100 PCIe 80GB",
    "NVIDIA H100 80GB HBM3": "H100 80GB", "NVIDIA GH200 480GB": "GH200 96GB",
}  # fmt: skip
TYPED = {"a10g": "A10G 24GB", "A10": "A10 24GB", "RTX 3090": "RTX 3090 24GB", "H100 80GB": "H100 80GB"}


def test_a_gpu_is_found_by_what_nvidia_smi_names_it_and_by_what_is_typed_and_an_unclear_name_is_none():
    assert {name: gpus.find(name).name for name in REPORTED | TYPED} == REPORTED | TYPED
    for name in ("NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A100-SXM4-80GB MIG 3g", "A100", ""):
        assert "--gpu" in make.refused(gpus.find, name)


def test_every_size_is_below_what_the_name_says():
    for gpu in gpus.GPUS.values():
        nominal = int(gpu.name.split()[-1].removesuffix("GB")) * 10**9
        assert 0.85 * nominal < gpu.total_bytes - gpu.outside_bytes(0) < gpu.total_bytes < 1.1 * nominal
        without, *with_nccl = map(gpu.outside_bytes, range(3))
        assert with_nccl == [without + gpu.nccl_bytes, without + 2 * gpu.nccl_bytes] and gpu.nccl_bytes > 0


def test_one_that_is_not_listed_is_given_by_its_size():
    gpu = gpus.from_options(None, "48GB", "8.9")
    assert (gpu.total_bytes, gpu.capability) == (48 * 10**9, (8, 9))
    assert (gpu.multiprocessors, gpu.max_threads, gpu.shared_bytes) == (142, 1536, 99 * 1024)
    threads = {sm: gpus.from_options(None, "48GB", sm).max_threads for sm in ("7.5", "8.0", "8.6", "12.0")}
    assert threads == {"7.5": 1024, "8.0": 2048, "8.6": 1536, "12.0": 1536}
    assert gpu.cublas_bytes() == gpus.find("L40S").cublas_bytes() and gpu.outside_bytes(2) == 950 * M
    assert gpus.from_options(None, None, None) is None and gpus.from_options("A10G", None, None) == gpus.find("A10G")


def properties(name: str, major: int, minor: int, count: int, total: int) -> SimpleNamespace:
    """Return what is read of `torch.cuda.get_device_properties`."""
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=count, total_memory=total)


def test_a_device_that_is_not_listed_has_what_its_driver_reports():
    gpu = gpus.of_device(properties("NVIDIA L40", 8, 9, 140, 48 * 10**9))
    assert (gpu.name, gpu.capability, gpu.multiprocessors, gpu.total_bytes) == ("NVIDIA L40", (8, 9), 140, 48 * 10**9)
    assert gpus.of_device(properties("NVIDIA Thor", 10, 3, 20, 10**9)).capability == (10, 0)
    assert gpus.of_device(properties("NVIDIA A10G", 8, 6, 1, 1)) == gpus.find("A10G")


def test_cublas_takes_what_its_variable_says():
    gpu = gpus.find("A100 80GB")
    assert gpu.cublas_bytes() == gpu.cublas_bytes("nonsense") == gpu.cublas_bytes(":4096:2:16:8") == 8_519_680
    assert gpu.cublas_bytes(":4096:8") == 32 * M == gpus.find("H100 80GB").cublas_bytes()
