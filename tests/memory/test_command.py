"""ds-cmli-memory: the largest that fits, the sentences, the files and the exit codes."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.memory import command, fit, step_memory
from ds_cmli.memory.report import CATEGORIES, gigabytes
from ds_cmli.memory_model import gpus
from tests.ranks import python

RTX_3090 = gpus.find("RTX 3090")


@pytest.mark.parametrize("room", [0, 5, 1000, 1003, 77_777, 10**9])
def test_the_largest_that_fits(room):
    for needs in (lambda n: 10 * n, lambda n: 1000 + n // 7, lambda n: 3 * n * n + (500 if n > 64 else 0)):
        calls = []
        result = fit.largest(lambda n: (calls.append(n), needs(n))[1], room, most=100_000)  # noqa: B023
        expected = next((n for n in range(100_000, 0, -1) if needs(n) <= room), 0)
        assert result <= expected <= result + result // 200 and (result > 0) == (expected > 0)
        assert len(calls) <= 30


def test_a_line_finds_the_largest_in_few_predictions():
    calls = []
    needs = lambda n: 10**9 + n * 14_000_000 // 4096 * 4096 + (n // 50) * 2**21  # noqa: E731
    assert fit.largest(lambda n: (calls.append(n), needs(n))[1], 24 * 10**9) in range(1630, 1639)
    assert len(calls) <= 6


def test_sizes_as_they_are_typed():
    assert gpus.parse_memory("24GB") == (24 * 10**9, None)
    assert gpus.parse_memory("1.5 GiB") == (3 * 2**29, None)
    assert gpus.parse_memory("RTX 3090")[1] == "RTX 3090 24GB"
    with pytest.raises(UserError, match="--fit is '24 apples'"):
        gpus.parse_memory("24 apples")


def started(*arguments: str) -> subprocess.CompletedProcess:
    one_block = ("--set", "student.layers=1", "--set", "teacher.block=0")
    return python("profiling/predict.py", "--preset", "tiny", *one_block, *arguments)


@pytest.mark.slow
def test_the_command_writes_json_snapshot_and_picture(tmp_path):
    done = started(
        "--world-size", "2", "--checkpointing", "off", "--micro-batch", "4", "--plot", str(tmp_path / "memory.png"),
        "--json", str(tmp_path / "memory.json"), "--snapshot", str(tmp_path / "memory.pickle"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "memory.json").read_text())
    assert set(content["categories"]) == set(CATEGORIES)
    assert set(content["totals"]) == {"requested", "allocated", "reserved", "device"}
    assert sum(content["categories"].values()) == content["totals"]["requested"] == max(content["phases"].values())
    assert content["setting"]["micro_batch"] == 4 and content["setting"]["checkpointing"] is False
    assert f"{content['totals']['device']:,}" in done.stdout
    assert done.stdout.startswith("micro-batch 4 with ZeRO-2 over 2 GPUs (rank 1, which needs the most) needs ")
    assert (tmp_path / "memory.pickle").stat().st_size > 1000
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_predicts_with_the_loss_of_a_plugin_and_finds_what_fits():
    done = started("--plugin", "tests.stranger.toy", "--losses", "global,filip", "--fit", "600MB")
    assert done.returncode == 0 and "requested" in done.stdout, done.stderr
    assert done.stdout.startswith("fits in 0.60")


def test_fit_keeps_what_it_has_predicted(monkeypatch):
    asked = []

    def bytes_of(step, gpu, room, rank):
        asked.append((step.ds_config.micro_batch, rank))
        size = 10**9 * step.ds_config.micro_batch
        return SimpleNamespace(totals={"device": size}, setting={"rank": 3})

    monkeypatch.setattr(fit, "predicted_worst", bytes_of)
    lines: list[str] = []
    step = step_memory.Step(None, {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 8}, 4)
    result = fit.fit(step, RTX_3090, 5 * 10**9 + 5, lines.append)
    assert result.micro_batch == 5 and result.report.totals["device"] == 5 * 10**9
    assert result.tried == {n: n * 10**9 for n in sorted(n for n, _ in asked)} and {5, 6} <= result.tried.keys()
    assert [rank for _, rank in asked] == [None] + [3] * (len(asked) - 1)  # the same whatever the micro-batch
    assert len(lines) == len(asked) and lines[0] == "micro-batch 1: 1,000,000,000 B on the device"


def test_the_answer_comes_first():
    setting = {"micro_batch": 64, "zero_stage": 2, "world_size": 4}
    report = SimpleNamespace(totals={"device": 20 * 10**9}, setting=setting, retries=0)
    total = RTX_3090.total.bytes / 1e9
    step = "micro-batch 64 with ZeRO-2 over 4 GPUs needs"
    expected = f"{step} 20.00 GB and fits on a RTX 3090 24GB ({total:.2f} GB), {total - 20:.2f} GB are left"
    assert command.sentence(report, RTX_3090) == expected
    retried = ", only as PyTorch's allocator returns its cache (2 retries)"
    report.retries = 2
    assert command.sentence(report, RTX_3090) == expected + retried
    report.totals["device"] = 30 * 10**9
    expected = f"{step} 30.00 GB and does not fit on a RTX 3090 24GB ({total:.2f} GB), by {30 - total:.2f} GB"
    assert command.sentence(report, RTX_3090) == f"{expected}: --fit 'RTX 3090 24GB' finds what does"
    report.totals["device"] = RTX_3090.total.bytes + 70_000
    setting["rank"] = 3
    assert command.sentence(report, RTX_3090).startswith(
        "micro-batch 64 with ZeRO-2 over 4 GPUs (rank 3, which needs the most) needs 25.42594 GB and does not fit on a "
        "RTX 3090 24GB (25.42587 GB), by 0.00007 GB"
    )


@pytest.mark.parametrize(
    "gpu, fitting, micro_batch, device, fits",
    [
        ("T4", None, 0, 10**9, True),
        ("48GB 8.9", None, 0, 48 * 10**9, True),
        ("48GB 8.9", None, 0, 48 * 10**9 + 1, False),
        ("T4", None, 0, 10**11, False),
        (None, None, 0, 10**11, True),  # no GPU was asked about
        (None, "24GB", 8, 10**9, True),
        (None, "24GB", 0, 10**11, False),
    ],
)
def test_what_does_not_fit_has_an_exit_code(monkeypatch, gpu, fitting, micro_batch, device, fits):
    setting = {"micro_batch": 1, "zero_stage": 2, "world_size": 1}
    report = SimpleNamespace(totals={"device": device}, setting=setting, to_dict=dict, retries=0)
    fitted = fit.Fit(micro_batch, report, {1: device, 8: device})
    monkeypatch.setattr(step_memory, "predicted_worst", lambda *_, **__: report)
    monkeypatch.setattr(fit, "fit", lambda *_, **__: fitted)
    monkeypatch.setattr(command, "show", lambda _: None)
    given = (None, *gpu.split()) if gpu and " " in gpu else (gpu, None, None)
    options = command.PredictionOptions(1, None, *given, fitting, None, None, None)
    config = SimpleNamespace(run=SimpleNamespace(compile="off"))
    assert command.single(config, None, options)[1] == fits


def test_the_gpu_here_is_the_one_that_is_asked_about(monkeypatch):
    import pynvml

    assert command.default_gpu() == gpus.DEFAULT  # without a driver
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", ["NVIDIA L40S"].__getitem__)
    assert command.default_gpu() == "L40S 48GB"
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", ["NVIDIA L40"].__getitem__)
    with pytest.raises(UserError, match=r"^this GPU, 'NVIDIA L40', is not listed"):
        command.default_gpu()


def test_two_sizes_never_read_alike():
    report = SimpleNamespace(retries=0)
    result = fit.Fit(1663, report, {1663: 23_999_100_000, 1664: 24_000_500_000})
    assert command.fit_sentence(result, 24 * 10**9) == "fits in 24.0000 GB with micro-batch 1663; 1664 needs 24.0005 GB"
    none = fit.Fit(0, report, {1: 10**9 + 1})
    assert command.fit_sentence(none, 10**9) == "does not fit in 1.000000000 GB: one pair needs 1.000000001 GB"
    assert gigabytes(5, 5) == ["0.00", "0.00"] and gigabytes(1_250_000_000, 0, digits=1) == ["1.2", "0.0"]


def test_what_fit_means_is_said_with_what_tensors_can_have():
    assert command.meant("24GB", 24 * 10**9, "", RTX_3090, 1) == (
        "--fit '24GB' means 24,000,000,000 B of a GPU: 23,685,427,200 B of them for tensors, the rest is CUDA's context"
        " as on a RTX 3090 24GB"
    )
    assert command.meant("A10G", 23_686_283_264, "A10G 24GB", gpus.find("A10G"), 2) == (
        "--fit 'A10G' means the 23,686,283,264 B that a A10G 24GB has: 23,057,137,664 B of them for tensors, the rest "
        "is CUDA's context and NCCL as on a A10G 24GB"
    )


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--gpu", "abacus"), ("--world-size", "0"), ("--plot", "memory.txt")])
def test_mistakes_are_one_line(arguments):
    done = started(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and arguments[0] in done.stderr and "Traceback" not in done.stderr
