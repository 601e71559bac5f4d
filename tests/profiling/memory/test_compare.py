import json
import subprocess
from dataclasses import replace

import pytest

from ds_cmli.memory_model.caching_allocator import Event
from profiling.memory.document import charts, compare, steps, tables
from profiling.memory.document import implementations as allocations
from profiling.memory.document.compare import Row
from profiling.memory.document.estimates import Setting, claims
from profiling.memory.document.implementations import implementations
from profiling.scripts import Table
from tests.ranks import ROOT, python

SMALL = Setting(B=6, P=2, N=9, M=7, H=32, D=16)
SCRIPT = ROOT / "profiling" / "compare_estimates.py"
KEYS = {"id", "implementation", "document_bytes", "arithmetic_bytes", "corrected_bytes", "predicted_bytes"}
KEYS |= {"measured_bytes", "measured_peak_bytes", "measured_on", "verdict"}


def command(*options: str) -> subprocess.CompletedProcess:
    return python("profiling/compare_estimates.py", *options)


def test_a_row_is_measured_in_a_process_of_its_own():
    (row,) = (r for r in compare.predicted_rows(SMALL, {"E3"}, "cpu") if r.implementation == "broadcast")
    compare.measure([row], SMALL, "cpu")
    assert row.measured_bytes == row.predicted_bytes == row.corrected_bytes == 6 * 9 * 7 * 16 * 2
    assert row.measured_peak_bytes == row.predicted_peak_bytes
    assert row.measured_on == "CPU allocator, forward"


def test_a_measurement_that_takes_too_long_is_ended():
    row = Row("E3", "broadcast", None, None, None)
    assert compare.measure_in_subprocess(row, SMALL, "cpu", "forward", 0.01) is None


def test_no_time_left_is_said(monkeypatch):
    monkeypatch.setattr(compare, "ALL_SECONDS", 0.0)
    rows = compare.predicted_rows(SMALL, {"E1"}, "cpu")
    compare.measure(rows, SMALL, "cpu")
    assert {row.measured_bytes for row in rows} == {None}
    assert {row.measured_on for row in rows} == {"not measured: the 0 s for measuring were spent"}


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_op_of_a_cpu_is_predicted_as_it_is_measured(backend, monkeypatch):
    """With its compiled kernels, and by PyTorch's operators; each way at the setting's own batch."""
    s = Setting(B=24, P=2, N=49, M=16, H=32, D=64)
    monkeypatch.setattr(compare, "backend", lambda *_: backend)
    rows = [row for row in compare.predicted_rows(s, {"E2"}, "cpu") if row.implementation in ("ours", "materialised")]
    # In this process, as one of its own would find the compiler again.
    monkeypatch.setattr(
        compare, "measure_in_subprocess", lambda row, s, device, passes, left: measured(row, s, passes, backend)
    )
    compare.measure(rows, s, "cpu")
    for row in rows:
        assert row.measured_bytes == row.predicted_bytes == row.corrected_bytes, row
        assert row.measured_peak_bytes == row.predicted_peak_bytes and row.equal == (True, True) and not row.less
    first = tables.sentences_found(rows, [], None)
    assert first == [
        "Measured by the CPU allocator: 2 of 2 largest allocations and 2 of 2 peaks equal the predicted ones."
    ]


def measured(row, s, passes, backend="auto"):
    for small in implementations(allocations.SMALL).values():  # workspaces that libraries take once
        allocations.run(small, "cpu", backward=True)
    return allocations.run(implementations(s, backend)[row.id, row.implementation], "cpu", passes != "forward")


def test_less_than_the_setting_is_said_in_the_first_lines(monkeypatch):
    s = Setting(B=24, P=2, N=9, M=7, H=32, D=16)
    rows = compare.predicted_rows(s, {"E2"}, "cpu")
    monkeypatch.setattr(compare, "measure_in_subprocess", lambda row, s, device, passes, left: measured(row, s, passes))
    monkeypatch.setattr(compare, "free_bytes", lambda device: 3_100_000)
    compare.measure(rows, s, "cpu")
    by_name = {row.implementation: row for row in rows}
    assert {name: row.less for name, row in by_name.items()} == {
        "broadcast": "12 pairs a rank, forward alone",
        "materialised": "",
        "ours": "",
        "materialised, all": "",
    }
    assert "with B=12 (needs " in by_name["broadcast"].measured_on and by_name["broadcast"].measured_bytes is None
    assert all(row.equal == (True, True) for row in rows)
    assert tables.sentences_found(rows, [], None)[1] == (
        "Measured with less than the setting: E2 broadcast (12 pairs a rank, forward alone)."
    )


def test_after_too_long_a_measurement_fewer_pairs_are_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(
        compare,
        "measure_in_subprocess",
        lambda row, s, device, passes, left: (tried.append(s.B), measured(row, s, passes) if s.B < 16 else None)[1],
    )
    s = Setting(B=100, P=2, N=9, M=7, H=32, D=16)
    (row,) = (row for row in compare.predicted_rows(s, {"E3"}, "cpu") if row.implementation == "ours")
    compare.measure([row], s, "cpu")
    assert tried == [100, 32, 16, 8] and row.less == "8 pairs a rank"


def test_what_does_not_fit_is_not_run(monkeypatch):
    broadcast = implementations(Setting())["E2", "broadcast"]
    passes, why_not = compare.affordable(broadcast, "cpu")
    assert passes == ""
    assert why_not.startswith("needs 3,380.4 GB, ")
    materialised = implementations(Setting())["E2", "materialised"]
    for free, expected in ((13_461_651_468, "forward and backward"), (13_461_651_467, "forward"), (6 * 10**9, "")):
        monkeypatch.setattr(compare, "free_bytes", lambda device, free=free: free)
        assert compare.affordable(materialised, "cpu")[0] == expected


def test_limits_of_a_container_count(tmp_path):
    (tmp_path / "group").write_text("0::/job/step\n")
    inner, outer = tmp_path / "job" / "step", tmp_path / "job"
    inner.mkdir(parents=True)
    for folder, most, used in ((inner, "max", "5"), (outer, "1000", "400")):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(used + "\n")
    assert compare.control_group_free(str(tmp_path / "group"), str(tmp_path)) == [600]
    assert compare.control_group_free(str(tmp_path / "missing"), str(tmp_path)) == []


def test_document_config_takes_every_size():
    config = steps.document_config(Setting(B=96, P=2, N=100, M=40, H=512, D=128))
    assert (config.optim.micro_batch, config.data.image_size, config.data.context_length) == (96, 160, 40)
    assert config.student.embed_dim == 128
    assert config.student.image_overrides == config.teacher.overrides == {"embed_dim": 512, "num_heads": 8}
    assert config.student.text_overrides["hidden_size"] == 512


@pytest.mark.parametrize(("sizes", "why"), [({"N": 195}, "--N is 195"), ({"H": 100}, "--H is 100")])
def test_sizes_that_no_model_has_are_rows_that_say_so(sizes, why):
    rows, ours = steps.document_rows(Setting(**sizes))
    assert ours is None
    assert len(rows) == len(steps.VARIANTS)
    assert all(row.predicted_bytes is None and row.verdict.startswith(f"not predicted: {why}") for row in rows)
    assert tables.remember_document(rows) == "this setting was not predicted."


@pytest.mark.slow
def test_the_loss_s_way_decides_what_is_left_of_the_card(monkeypatch):
    # The document's batch; narrow models of one block, so that only its similarities are large.
    s, config = Setting(H=128, D=64), steps.document_config(Setting(H=128, D=64))
    small = replace(config, student=replace(config.student, layers=1), teacher=replace(config.teacher, block=0))
    monkeypatch.setattr(steps, "document_config", lambda *_: small)
    rows, _ = steps.document_rows(s, [v for v in steps.VARIANTS if v.checkpointing])
    assert [row.implementation for row in rows] == ["materialised, checkpointing", "ours, checkpointing"]
    materialised, ours = (row.predicted_bytes for row in rows)
    # Either direction's maxima give all similarities a gradient of their own; autograd holds both before it adds
    # them. The similarities are gone by then, as a maximum keeps indices.
    both = 2 * 6_576_668_672
    assert both < rows[0].extra["categories"]["temporaries"] < 1.01 * both
    # The two peaks are different moments, so their distance may be smaller: ours is in the encoders' backward, with
    # DeepSpeed's bucket. The materialised one comes before the first parameter's gradient, that of the temperature.
    bucket = rows[1].extra["categories"]["ZeRO buckets"]
    assert (rows[0].extra["categories"]["ZeRO buckets"], bucket) == (0, 200_000_000)
    assert rows[0].predicted_peak_bytes - rows[1].predicted_peak_bytes > both - bucket
    assert rows[0].extra["gpu_bytes"] - materialised > both and 20e9 < ours < rows[0].extra["gpu_bytes"]
    assert rows[1].verdict == f"fits: {ours / 1e9:,.1f} GB free"
    for row in rows:
        assert sum(row.extra["categories"].values()) == row.extra["totals"]["requested"] == row.predicted_peak_bytes


def test_verdicts_in_words():
    assert steps.describe(1_250_000_000) == "1.2 GB free"
    assert steps.describe(-15_060_000_000) == "15.1 GB too much"
    rows = [Row("E4", name, None, None, None, free) for name, free in (("ours", 9 * 10**9), ("materialised", -(10**9)))]
    assert tables.remember_document(rows) == (
        "all pairs of the batch leave 9.0 GB free with ours; with every similarity stored the same step has "
        "1.0 GB too much."
    )


def test_markdown_table():
    table = Table("Sizes", ["id", "true B"], [["E1", "1,024"]], ["remember this"])
    assert table.markdown() == "## Sizes\n\n| id | true B |\n| --- | ---: |\n| E1 | 1,024 |\n\n- remember this\n"


def test_the_last_step_alone():
    phases = ["init", *["forward", "loss", "backward", "optimizer"] * 2, "forward"]
    before, step = charts.last_step([Event(i, 1, "data", phase) for i, phase in enumerate(phases)])
    assert [event.block for event in before] == [0, 1, 2, 3, 4]
    assert [event.block for event in step] == [5, 6, 7, 8]


def test_the_maxima_of_a_step_by_hand():
    rows = [(0, 5, "data"), (1, 3, "CMLI op"), (1, -3, "CMLI op"), (0, -5, "data"), (2, 4, "data")]
    step = [Event(block, size, category, "forward") for block, size, category in rows]
    result = charts.maxima([Event(9, 10, "parameters", "init")], step)
    held = [(i, {name: size for name, size in now.items() if size}) for i, now in result]
    assert held == [(1, {"parameters": 10, "data": 5, "CMLI op": 3}), (4, {"parameters": 10, "data": 4})]


def test_charts_are_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    events = [Event(0, 9, "teacher", "forward"), Event(1, 5, "data", "backward"), Event(1, -5, "data", "optimizer")]
    charts.timeline(events, "A step", tmp_path / "line.png")
    with Image.open(tmp_path / "line.png") as picture:
        assert len(picture.convert("LA").getcolors(2**16)) > 10  # something is drawn


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
        assert row.keys() >= KEYS
        assert row["measured_bytes"] == row["predicted_bytes"] == row["corrected_bytes"]
    assert [row["measured_bytes"] for row in rows[:2]] == [98_304_000, 768_000]
    assert claims(s)["E3"].remember in done.stdout
    assert "## E1, E2, E3, E5: what is stored" in text_file.read_text()


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
