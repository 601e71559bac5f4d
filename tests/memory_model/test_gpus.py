import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.memory_model import gpus

M = 2**20
# As nvidia-smi prints them.
REPORTED = {
    "Tesla T4": "T4 16GB",
    "Tesla V100-SXM2-16GB": "V100 16GB",
    "Tesla V100S-PCIE-32GB": "V100 32GB",
    "NVIDIA A10": "A10 24GB",
    "NVIDIA A10G": "A10G 24GB",
    "NVIDIA L4": "L4 24GB",
    "NVIDIA L40S": "L40S 48GB",
    "NVIDIA A40": "A40 48GB",
    "NVIDIA RTX A6000": "A6000 48GB",
    "NVIDIA GeForce RTX 3090": "RTX 3090 24GB",
    "NVIDIA GeForce RTX 4090": "RTX 4090 24GB",
    "NVIDIA GeForce RTX 5090": "RTX 5090 32GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA H100 PCIe": "H100 PCIe 80GB",
    "NVIDIA H100 80GB HBM3": "H100 80GB",
    "NVIDIA H100 NVL": "H100 NVL 94GB",
    "NVIDIA H200": "H200 141GB",
    "NVIDIA GH200 480GB": "GH200 96GB",
    "NVIDIA B200": "B200 180GB",
}


def test_the_gpu_here_is_the_one_that_nvidia_smi_names():
    assert {name: gpus.present(name).name for name in REPORTED} == REPORTED
    assert {name: gpus.find(name).name for name in REPORTED} == REPORTED


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "CPU",
    ],
)
def test_an_unlisted_one_is_no_other(name):
    with pytest.raises(UserError, match=r"^this GPU, '.*', is not listed: .* --gpu-memory 48GB --sm 8\.9$"):
        gpus.present(name)


def test_names_as_they_are_typed():
    names = {"a10g": "A10G 24GB", "A10": "A10 24GB", "RTX 3090": "RTX 3090 24GB", "H100 80GB": "H100 80GB"}
    assert {name: gpus.find(name).name for name in names} == names
    for unclear in ("A100", "H100", "", "V100", "abacus", "RTX 3090 Ti"):
        with pytest.raises(UserError, match=r"--gpu is .*: give one of T4 16GB, .*, or give its memory"):
            gpus.find(unclear)


def test_every_size_is_marked_and_below_what_the_name_says():
    for gpu in gpus.GPUS.values():
        assert {size.known for size in (gpu.total, gpu.context, gpu.nccl)} <= {"measured", "assumed"}
        nominal = int(gpu.name.split()[-1].removesuffix("GB")) * 10**9
        assert 0.85 * nominal < gpu.total.bytes - gpu.outside(1) < gpu.total.bytes < 1.1 * nominal
        assert gpu.reported and gpu.capability in gpus.BY_CAPABILITY


def test_one_that_is_not_listed_is_given_by_its_size():
    gpu = gpus.chosen(None, "48GB", "8.9")
    assert (gpu.name, gpu.total, gpu.limits) == (
        "GPU of 48GB, sm 8.9", (48 * 10**9, "given"), ((8, 9), 142, 1536, 99 * 1024)
    )  # fmt: skip
    assert gpu.cublas_bytes() == gpus.find("L40S").cublas_bytes() and gpu.outside(2) == 650 * M
    assert gpus.find(gpu.name) == gpu  # a process that predicts is given its name
    assert gpus.chosen(None, None, None) is None and gpus.chosen("A10G", None, None) == gpus.find("A10G")
    for given, message in (
        ((None, "48GB", None), "--gpu-memory and --sm are given together, and in place of --gpu"),
        (("A10G", "48GB", "8.9"), "--gpu-memory and --sm are given together, and in place of --gpu"),
        ((None, "much", "8.9"), "--gpu-memory is 'much': give a size"),
        ((None, "48GB", "6.1"), "--sm is '6.1': give one of 7.0, 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            gpus.chosen(*given)


def test_beside_the_allocator_lie_the_gpus_constants():
    gpu = gpus.find("A10G 24GB")
    assert gpu.outside(1) == gpu.context.bytes
    assert gpu.outside(2) == gpu.outside(1) + gpu.nccl.bytes
    assert gpu.outside(64) == gpu.outside(1) + gpu.nccl.bytes


def test_cublas_takes_what_its_variable_says():
    gpu = gpus.find("A100 80GB")
    assert gpu.cublas_bytes() == gpu.cublas_bytes("nonsense") == gpu.cublas_bytes(":4096:2:16:8") == 17_039_360
    assert gpu.cublas_bytes(":4096:8") == 2 * 32 * M == gpus.find("H100 80GB").cublas_bytes()
