import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.memory_model import gpus
from profiling.memory import measure, steps
from profiling.memory.estimates import Setting, claims
from profiling.memory.implementations import implementations
from profiling.tables import section
from tests.ranks import ROOT, python

SMALL = Setting(B=6, P=2, N=9, M=7, H=32, D=16)
SCRIPT = ROOT / "profiling" / "compare_estimates.py"


def command(*options: str) -> subprocess.CompletedProcess:
    return python(SCRIPT, *options)


def test_rows_are_measured_as_predicted_in_processes_of_their_own():
    rows = measure.rows(SMALL, {"E2"})
    assert [row.implementation for row in rows] == ["broadcast", "materialised", "ours", "materialised, all"]
    for row in rows:
        assert row.measured_bytes == row.predicted_bytes == row.corrected_bytes, row
        assert row.measured_peak_bytes == row.predicted_peak_bytes, row
        assert row.measured_on == "CPU allocator, forward and backward"
    assert measure.sentences(rows) == [
        "Measured by the CPU allocator: 4 of 4 largest allocations and 4 of 4 peaks equal the predicted ones."
    ]


def test_what_does_not_fit_is_measured_forward_alone_or_not_at_all(monkeypatch):
    """The document's own batch: of similarities and their gradients, the gradients are more."""
    started, every = [], implementations(Setting())
    monkeypatch.setattr(measure, "implementations", lambda *_: every)
    monkeypatch.setattr(measure, "given_by_process", lambda _, __, *of: started.append((of[0], of[2])) or [])
    monkeypatch.setattr(measure, "free_bytes", lambda device: 7 * 10**9)
    rows = {row.implementation: row for row in measure.rows(Setting(), {"E2"})}
    assert started == [(every["E2", "materialised"], "forward"), (every["E2", "ours"], "forward and backward")]
    assert rows["broadcast"].measured_on == "not measured: needs 3,380.4 GB, 7.0 GB are free"
    assert rows["ours"].measured_on == "not measured: it failed, or took more than 180 s"
    assert rows["materialised"].corrected_bytes == rows["materialised"].predicted_bytes == 6_576_668_672


def test_a_measurement_that_takes_too_long_or_too_much_is_ended():
    large = implementations(replace(SMALL, B=4096, N=196, M=64))["E3", "broadcast"]  # 3.3 GB
    assert measure.given_by_process(0.01, measure.measure, large, "cpu", "forward", 10**9) == []
    assert measure.given_by_process(60, measure.measure, large, "cpu", "forward", 10**8) == []


def test_limits_of_a_container_count(tmp_path, monkeypatch):
    own = Path("/proc/self/cgroup").read_text().split("::")[1].strip()
    inner, outer = tmp_path / "job" / own.lstrip("/"), tmp_path / "job"
    inner.mkdir(parents=True, exist_ok=True)
    for folder, most, used in ((inner, "max", "5"), (outer, str(5 * 10**9), str(2 * 10**9))):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(used + "\n")
    monkeypatch.setattr(measure, "CGROUPS", str(outer))
    monkeypatch.setattr(measure.psutil, "virtual_memory", lambda: SimpleNamespace(available=9 * 10**9))
    assert measure.free_bytes("cpu") == 10**9
    monkeypatch.setattr(measure, "CGROUPS", str(tmp_path / "missing"))
    assert measure.free_bytes("cpu") == 7 * 10**9


def test_document_config_takes_every_size():
    config = steps.document_config(Setting(B=96, P=2, N=100, M=40, H=512, D=128))
    assert (config.optim.micro_batch, config.data.image_size, config.data.context_length) == (96, 160, 40)
    assert config.student.embed_dim == 128
    assert config.student.image_overrides == config.teacher.overrides == {"embed_dim": 512, "num_heads": 8}
    assert config.student.text_overrides["hidden_size"] == 512


@pytest.mark.parametrize(("sizes", "why"), [({"N": 195}, "--N is 195"), ({"H": 100}, "--H is 100")])
def test_sizes_that_no_model_has_are_refused(sizes, why):
    with pytest.raises(UserError, match=why):
        steps.document_config(Setting(**sizes))


@pytest.mark.slow
def test_the_loss_s_way_decides_what_is_left_of_the_card(monkeypatch):
    # The document's batch; narrow models of one block, so that only its similarities are large.
    s, config, gpu = Setting(H=128, D=64), steps.document_config(Setting(H=128, D=64)), gpus.find("RTX 3090")
    small = replace(config, student=replace(config.student, layers=1), teacher=replace(config.teacher, block=0))
    monkeypatch.setattr(steps, "document_config", lambda *_: small)
    variants = tuple(v for v in steps.VARIANTS if v.checkpointing and v.name != "broadcast")
    reports = steps.predict_document(s, variants, gpu, lambda _: None)
    materialised, ours = reports.values()
    # Either direction's maxima give all similarities a gradient of their own; autograd holds both before it adds
    # them. The similarities are gone by then, as a maximum keeps indices.
    both = 2 * 6_576_668_672
    assert both < materialised.categories["temporaries"] < 1.01 * both
    # The two peaks are different moments, so their distance may be smaller: ours is in the encoders' backward, with
    # DeepSpeed's bucket. The materialised one comes before the first parameter's gradient, that of the temperature.
    bucket = ours.categories["ZeRO buckets"]
    # Beside the bucket DeepSpeed holds some numbers.
    assert materialised.categories["ZeRO buckets"] < 100 and 0 <= bucket - 200_000_000 < 100
    assert materialised.totals["requested"] - ours.totals["requested"] > both - bucket
    assert materialised.totals["device"] > both and gpu.total.bytes - ours.totals["device"] > 20e9


def test_tables_as_markdown():
    text = section("Sizes", ["id", "true B", "said"], [["E1", "1,024", "-"], ["E2", "-", "it fits"]], "remember this")
    assert text == (
        "## Sizes\n\n| id | true B | said |\n| --- | ---: | --- |\n| E1 | 1,024 | - |\n| E2 | - | it fits |\n\n"
        "- remember this\n"
    )


@pytest.mark.slow
def test_the_command(tmp_path):
    """As a user runs it, at sizes of a few seconds."""
    s = Setting(B=96, P=2, N=100, M=40, H=512, D=128)
    rows_file, text_file = tmp_path / "rows.json", tmp_path / "rows.md"
    sizes = [word for name, value in vars(s).items() for word in (f"--{name}", str(value))]
    done = command("--only", "e3", *sizes, "--json", str(rows_file), "--markdown", str(text_file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(rows_file.read_text())
    assert [row["implementation"] for row in rows] == list(claims(s)["E3"].stored)
    for row in rows:
        assert row["measured_bytes"] == row["predicted_bytes"] == row["corrected_bytes"]
    assert [row["measured_bytes"] for row in rows[:2]] == [98_304_000, 768_000]
    assert "E3 Target-CMLI, 1.64 GB: 128 times too much: 0.8 MB of similarities." in done.stdout
    assert "## E1, E2, E3, E5: what is stored" in text_file.read_text()


@pytest.mark.null_gpu
def test_rows_of_a_gpu_are_measured_as_predicted(null_gpu, tmp_path):
    """Without the values that programs ask for, which nothing here does."""
    rows_file, sizes = tmp_path / "rows.json", ["--B", "8", "--N", "49"]
    done = python(SCRIPT, "--only", "E1,E2,E3", *sizes, "--json", rows_file, env=null_gpu("H100 80GB"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(rows_file.read_text())
    assert len(rows) == 10
    for row in rows:
        assert row["measured_bytes"] == row["predicted_bytes"], row
        if row["implementation"] != "broadcast":  # whose gradients' sums take a buffer that no formula knows
            assert row["measured_peak_bytes"] == row["predicted_peak_bytes"], row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "E1,E9"], "error: --only is 'E1,E9': give some of E1, E2, E3, E4, E5\n"),
        (["--json", "/no/such/x.json"], "error: cannot write '/no/such/x.json': No such file or directory\n"),
        (["--sm", "8.9"], "error: --gpu-memory and --sm are given together, and in place of --gpu\n"),
        (["--B", "0"], "error: --B is 0: give 1 or more\n"),
    ],
)
def test_mistakes_are_one_line(options, message):
    done = command(*options)
    assert (done.returncode, done.stderr) == (2, message)
