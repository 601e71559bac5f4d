"""The document's estimates as written, corrected, predicted and measured; and the whole step on its card."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.losses.target_cmli import match_patches
from ds_cmli.memory_model import gpus
from profiling.compare_estimates import command
from profiling.memory import implementations as ways
from profiling.memory import measure, steps
from profiling.memory.estimates import DOCUMENT, Setting, arithmetic, claims
from profiling.speed.op import cpu_sizes, materialised_scores
from tests.null_gpu.build import stand_in
from tests.ranks import ROOT, python

SCRIPT = ROOT / "profiling" / "compare_estimates.py"
OTHER = Setting(B=96, P=2, N=100, M=40, H=512, D=128)
SMALL = Setting(B=6, P=2, N=9, M=7, H=32, D=16)


def test_the_document_s_figures_and_which_line_of_its_arithmetic_is_wrong():
    figures = {id: claim.document_bytes for id, claim in claims().items()}
    assert figures == {"E1": 805_306_368, "E2": 6_576_668_672, "E3": 1_644_167_168, "E4": None, "E5": None}
    assert [id for id, claim in claims().items() if claim.figure not in claim.quote] == []
    wrong = {id: [line.verdict.startswith("wrong") for line in claim.lines] for id, claim in claims().items()}
    # 256 * 12,544 is half of what it has.
    assert wrong == {"E1": [False] * 2, "E2": [False, True, False], "E3": [False] * 2, "E4": [], "E5": [True]}
    assert [line.value for line in claims()["E2"].lines] == [12_544, 3_211_264, 6_576_668_672]
    assert steps.document_config(OTHER).student.text_weights == "random", "nothing is downloaded"
    assert "wrong" in arithmetic(claims(), DOCUMENT) and "wrong" not in arithmetic(claims(OTHER), OTHER)
    # The coincidence in E2 is explained where there is one.
    assert "by coincidence: it multiplies by D = 256 features where B = 256 images belong" in claims()["E2"].truth
    assert "coincidence" not in claims(OTHER)["E2"].truth


@pytest.mark.parametrize("scores", [ways.broadcast_scores, materialised_scores])
def test_scores_and_gradients_are_the_reference_s(scores):
    image, text = (torch.randn(*shape, 8).double().requires_grad_() for shape in ((3, 6), (5, 4)))
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4])[:, None]
    upstream = [torch.randn(3, 5).double()] * 2
    results = []
    for function in (scores, cmli_scores_reference):
        out = function(image, text, mask)
        results.append([*out, *torch.autograd.grad(out, (image, text), upstream)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_matches_and_global_losses_agree():
    # Products of small integers are exact in fp16, and no two patches of an image are equally good.
    patches = torch.eye(9, 16).half().expand(2, 9, 16)
    tokens = torch.zeros(2, 4, 16, dtype=torch.float16)
    best = torch.tensor([[3, 0, 8, 5], [1, 1, 7, 2]])
    tokens.scatter_(2, best[..., None], 2.0)
    for match in (ways.broadcast_match, ways.materialised_match, match_patches):
        assert match(tokens, patches).equal(best)
    broadcast, product, ours = (ways.implementations(SMALL)["E1", n] for n in ("broadcast", "materialised", "ours"))
    image, text, _, scale = inputs = broadcast.inputs("cpu")
    torch.testing.assert_close(broadcast.forward(*inputs), product.forward(*inputs))
    # A rank's block of rows; the loss of its own pairs.
    logits = scale.exp() * image[:6] @ text.t()
    positives = torch.arange(6)
    expected = (F.cross_entropy(logits, positives) + F.cross_entropy(logits.t()[:6], positives)) / 2
    torch.testing.assert_close(ours.forward(image[:6], text, _, scale), expected)


@pytest.mark.parametrize("key", ways.implementations(SMALL), ids=" ".join)
def test_predicted_is_what_the_allocator_reports(key):
    estimate, way, *_ = key
    implementation = ways.implementations(SMALL)[key]
    forward, whole = ways.predict(implementation)
    assert forward.largest == whole.largest == claims(SMALL)[estimate].stored.get(way, whole.largest)
    if "E3 materialised" in " ".join(key):  # the 16-bit product takes a workspace of its own, here the largest
        inputs = implementation.inputs("cpu")
        assert whole.largest in cpu_sizes(lambda: implementation.forward(*inputs))
    else:
        *_, measured = measure.measure(implementation, "cpu", whole.passes)
        assert measured == whole


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_op_of_a_cpu_is_predicted_as_it_is_measured(backend):
    """With its compiled kernels, and by PyTorch's operators."""
    implementation = ways.implementations(Setting(B=24, P=2, N=49, M=16, H=32, D=64))["E2", "ours"]
    implementation = replace(implementation, function=partial(implementation.function, backend=backend))
    measured = measure.measure(implementation, "cpu", "forward and backward")
    assert tuple(measured) == ways.predict(implementation)


def test_a_measurement_that_takes_too_long_or_too_much_is_ended():
    large = ways.implementations(replace(SMALL, B=4096, N=196, M=64))["E3", "broadcast"]  # 3.3 GB
    assert measure.results_of_process(0.01, measure.measure, large, "cpu", "forward", 10**9) == []
    assert measure.results_of_process(60, measure.measure, large, "cpu", "forward", 10**8) == []


def test_the_command_measures_what_it_predicts(tmp_path):
    sizes = [word for name, value in vars(OTHER).items() for word in (f"--{name}", str(value))]
    files = "--json", str(tmp_path / "rows"), "--markdown", str(tmp_path / "page")
    done = CliRunner().invoke(command, ["--only", "e3", *sizes, *files], catch_exceptions=False)
    rows = json.loads((tmp_path / "rows").read_text())
    assert [row["implementation"] for row in rows] == list(claims(OTHER)["E3"].stored)
    for row in rows:
        assert row["measured_bytes"] == row["predicted_bytes"] == row["corrected_bytes"]
        assert row["measured_on"] == "CPU allocator, forward", "no gradient passes a match"
    assert [row["measured_bytes"] for row in rows[:2]] == [98_304_000, 768_000]
    page = (tmp_path / "page").read_text()
    first, second, *_ = page.split("\n- ")[1:]
    assert first.startswith("E3: from the estimates of GPU memory in a draft of Tim Cares' Master's thesis (2024)")
    assert "96 image-text pairs on each of 2 GPUs. Do they hold" in first
    assert second.startswith("E3, Target-CMLI: the estimate is 1.64 GB; 128 times too much")
    assert "| E3 |" in page and "| E3 broadcast | 0.098 |" in page
    trials = done.stderr.splitlines()
    assert trials[0] == "trial 1 of 3: E3 broadcast"
    assert re.fullmatch(r"trial 2 of 3: E3 materialised; about \d+ s left", trials[1])


@pytest.mark.slow
def test_the_loss_s_way_decides_what_is_left_of_the_card(monkeypatch, tmp_path):
    """The document's batch, and narrow models of one block, so that only its similarities are large."""
    document_config = steps.document_config

    def narrow(*arguments):
        config = document_config(*arguments)
        return replace(config, student=replace(config.student, layers=1), teacher=replace(config.teacher, block=0))

    monkeypatch.setattr(steps, "document_config", narrow)
    monkeypatch.setattr(steps, "VARIANTS", [v for v in steps.VARIANTS if v.name in ("materialised", "ours")])
    monkeypatch.setattr(measure, "rows", lambda *_: [])
    words = ["--H", "128", "--D", "64", "--preset", "tiny", "--json", str(tmp_path / "rows")]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert "preset tiny on the RTX 3090 24GB" in done.output
    materialised, ours = json.loads((tmp_path / "rows").read_text())
    # Either direction's maxima give all similarities a gradient of their own; autograd holds both before it adds
    # them. The similarities are gone by then, as a maximum keeps indices.
    gradient_bytes = 2 * 6_576_668_672
    assert gradient_bytes < materialised["categories"]["temporaries"] < 1.01 * gradient_bytes
    # The two peaks are different moments, so their distance may be smaller: ours is in the encoders' backward, with
    # DeepSpeed's bucket. The materialised one comes before the first parameter's gradient, that of the temperature.
    bucket = ours["categories"]["ZeRO buckets"]
    # Beside the bucket DeepSpeed holds some numbers.
    assert materialised["categories"]["ZeRO buckets"] < 100 and 0 <= bucket - 200_000_000 < 100
    assert materialised["totals"]["requested"] - ours["totals"]["requested"] > gradient_bytes - bucket
    left = gpus.find("RTX 3090").total_bytes - ours["totals"]["device"]
    assert materialised["totals"]["device"] > gradient_bytes and left > 20e9


@pytest.mark.null_gpu
def test_rows_of_a_gpu_are_measured_as_predicted(null_gpu, tmp_path):
    """Without the values that programs ask for, which nothing here does."""
    rows_file = tmp_path / "rows.json"
    words = ["--only", "E1,E2,E3", "--B", "8", "--N", "49", "--json", rows_file]
    done = python(SCRIPT, *words, env=null_gpu("H100 80GB"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(rows_file.read_text())
    assert len(rows) == 10
    for row in rows:
        assert row["measured_bytes"] == row["predicted_bytes"], row
        if row["implementation"] != "broadcast":  # whose gradients' sums take a buffer that no formula knows
            assert row["measured_peak_bytes"] == row["predicted_peak_bytes"], row


@pytest.mark.null_gpu
def test_an_unlisted_gpu_gets_a_section_for_the_page_that_says_where_nvml_gives_nothing(null_gpu, tmp_path):
    env = null_gpu() | {"NULLGPU": "NVIDIA Nobody;8;9;142;1536;101376;48000000000"}
    page = tmp_path / "page.md"
    done = python(*stand_in("profiling/gpu_check.py", "--only", "context", "--markdown", page), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    heading, summary, *rows = page.read_text().split("\n\n")
    assert heading == "### On a NVIDIA Nobody" and "2 figures, 0 missed their bar." in summary
    assert "| total bytes | 4.8e+10 | | no bar | 48,000,000,000 B in the table |" in " ".join(rows[0].split())
    assert "NVML does not report this process's bytes" in rows[0]
