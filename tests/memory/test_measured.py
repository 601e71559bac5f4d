"""A training on a CPU: the memory that it measures, its trace, and its end when memory runs out."""

import json
import re
import resource
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from matplotlib import colormaps
from matplotlib.image import imread

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group as distributed
from ds_cmli.memory import out_of_memory
from ds_cmli.memory.categories import TrainingRecorder
from ds_cmli.memory.command import fit_sentence
from ds_cmli.memory.inputs import longest_batch
from ds_cmli.memory.largest_batch import LargestBatch
from ds_cmli.memory.report import CATEGORIES, PHASES, plot, summarise
from ds_cmli.memory_model.caching_allocator import Event
from tests import make
from tests.ranks import start_function

RETRIED = ", only as PyTorch's allocator returns its cache"

ZERO2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}}


def train(folder: Path, source: list[str], *more: str) -> Path:
    options = {"--deepspeed_config": make.json_file(folder / "ds.json", ZERO2), "--output-dir": folder / "run"}
    assert not make.train(*make.small({**options, "--micro-batch": 8}), *source, *more)
    return folder / "run"


def test_the_memory_of_the_first_steps(tmp_path, source):
    run = train(tmp_path, source, "--steps", "3", "--profile-memory", "2")
    content = json.loads((run / "memory.json").read_text())["measurement"]
    assert content["source"] == "measured: CPU" and content["setting"]["steps"] == 2
    assert list(content["categories"]) == list(CATEGORIES) and list(content["phases"]) == list(PHASES)
    assert sum(content["categories"].values()) == content["totals"]["requested"]
    count = sum(p.numel() for p in make.models()[0].parameters())
    assert content["categories"]["optimizer states"] == pytest.approx(8 * count, rel=0.01)
    assert content["categories"]["activations student"] > 100_000


def test_a_trace_has_the_given_steps_with_memory_shapes_and_stacks(tmp_path, source, capsys):
    run = train(tmp_path, source, "--steps", "4", "--profile", "2:3")
    (path,) = (run / "profile").glob("rank0.*.json")
    events = json.loads(path.read_text())["traceEvents"]
    marks = {e["name"] for e in events if e["name"].startswith("ProfilerStep")}
    assert marks == {"ProfilerStep#2", "ProfilerStep#3"}, "a trace counts steps as the log does"
    assert f"trace of steps 2 to 3: {run / 'profile'}" in capsys.readouterr().out
    assert max(e["args"]["Bytes"] for e in events if e["name"] == "[memory]") > 100_000
    assert [e for e in events if e["name"] == "aten::addmm" and e["args"]["Input Dims"][1]], "no shapes"
    assert [e for e in events if "train_engine.py" in e["name"]], "no stacks"


def test_peaks_and_categories_by_hand():
    rows = (
        (0, 100, "parameters", "init"), (1, 30, "activations student", "forward"), (2, 50, "temporaries", "forward"),
        (2, -50, "temporaries", "forward"), (3, 20, "gradients", "backward"),
        (1, -30, "activations student", "backward"), (4, 90, "optimizer states", "optimizer"),
        (3, -20, "gradients", "optimizer"),
    )  # fmt: skip
    figures = summarise([Event(*row) for row in rows], {}, "predicted")
    at_peak = {"parameters": 100, "gradients": 20, "optimizer states": 90}
    assert figures.categories == {**dict.fromkeys(CATEGORIES, 0), **at_peak}
    assert figures.totals == {"requested": 210}
    # Blocks that lived when a phase began count: backward starts at 130 and reaches 150.
    assert figures.phases == {"init": 100, "forward": 180, "loss": 0, "backward": 150, "optimizer": 210}


@pytest.mark.parametrize(
    ("size", "retries", "answer"),
    [
        (0, 0, "does not fit in 1.00 GB: one pair needs 1.20 GB"),
        (8, 0, "fits in 1.00 GB with micro-batch 8; 9 needs 1.10 GB"),
        (9, 1, f"fits in 1.00 GB with micro-batch 9{RETRIED} (1 retry)"),
        (9, 2, f"fits in 1.00 GB with micro-batch 9{RETRIED} (2 retries)"),
    ],
)
def test_a_sentence_says_what_fits_and_what_one_pair_more_needs(size, retries, answer):
    report = SimpleNamespace(retries=retries, margin="")
    assert fit_sentence(LargestBatch(size, report, {1: 1_200_000_000, 9: 1_100_000_000}), 10**9) == answer


@pytest.mark.parametrize(("padding", "last"), [("full", True), ("longest", False)])
def test_the_first_text_of_the_largest_batch_lacks_a_token_and_the_others_are_full(padding, last):
    batch = longest_batch(load_preset("tiny", {"data": {"padding": padding}}), 2, positions=6)
    assert batch.attention_mask.tolist() == [[True] * 5 + [last], [True] * 6]
    assert batch.token_mask.tolist() == [[False, *[True] * 3, False, False], [False, *[True] * 4, False]]


def test_what_forward_leaves_and_the_losses_free_is_no_temporary():
    """Forward and losses are one segment, at whose end blocks that are freed inside count as temporaries."""
    recorder = TrainingRecorder("cpu")
    segments = []
    recorder.phase = "forward"
    for phase in ("loss", "backward", "loss"):
        recorder.begin(phase)
        segments.append(recorder.segment)
    assert segments == [0, 1, 2]


def test_a_picture_of_more_events_than_it_draws_reaches_the_peak(tmp_path):
    sizes = dict.fromkeys(range(5000), 10**9) | {2: 5 * 10**9}
    events = [Event(block, sign * size, "data", "forward") for block, size in sizes.items() for sign in (1, -1)]
    plot(summarise(events, {}, "predicted"), str(tmp_path / "memory.png"))
    colour = colormaps["tab20"].colors[CATEGORIES.index("data")]
    drawn = np.isclose(imread(tmp_path / "memory.png")[..., :3], colour, atol=0.15)
    heights = drawn.all(-1).sum(0)
    assert heights.max() == pytest.approx(5 * np.median(heights[heights > 0]), rel=0.05), "in pixels"


def train_in_little(rank: int, folder: Path) -> None:
    """Train. Rank 1 may have only 220 MB beside what it has before the model is built."""
    device = distributed.init()
    config = make.config(optim={"micro_batch": 384}, student={"layers": 2, "shared_blocks": 4})
    import deepspeed  # noqa: F401  before the limit: the libraries are not the training

    if rank == 1:
        limit = psutil.Process().memory_info().data + 220 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with out_of_memory.exit_on_shortage(folder, device) as engines:
        ds_config = DeepSpeedConfig.of(ZERO2).filled(config, distributed.world_size(), 20)
        train_engine = engine.build(config, ds_config, 1000, 20, device)
        engines.append(train_engine)
        for _ in range(2):
            train_engine.step([longest_batch(config, config.optim.micro_batch)])
    print("trained", flush=True)
    distributed.shutdown()


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_says_so_and_the_other_one_ends_too(tmp_path):
    log = tmp_path / "log"
    ranks = start_function(train_in_little, 2, log, tmp_path)
    for rank in ranks:
        rank.join(200)
    text = log.read_text()
    assert ranks[1].exitcode == 2 and ranks[0].exitcode and "trained" not in text, text
    (table,) = re.findall(r"^error: out of memory: rank 1 asked for [\d,]+ B\n((?: +\D+ [\d,]+ B\n)+)", text, re.M)
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) B\n", table)]
    assert sizes == sorted(sizes, reverse=True) and text.count("error: out of memory") == 1


SHORTAGES = [
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 22.06 GiB."),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
OTHERS = [RuntimeError("shape mismatch"), OSError(28, "No space left"), ValueError("memory")]


@pytest.mark.parametrize("error", [*SHORTAGES, *OTHERS], ids=str)
def test_a_shortage_of_memory_is_one_line_and_other_errors_are_raised(error, tmp_path, alone):
    tensors = []

    def step() -> None:
        activations = torch.ones(9)
        tensors.append(weakref.ref(activations))
        raise error

    expected = type(error) if error in OTHERS else Exception
    with pytest.raises(expected) as raised, out_of_memory.exit_on_shortage(tmp_path, torch.device("cpu"), raises=True):
        step()
    assert (raised.value is error) == (error in OTHERS)
    if error not in OTHERS:
        assert str(raised.value).startswith("out of memory: rank 0")
        assert tensors[0]() is None, "the memory of the step is not free for the line about it"
    assert not list(tmp_path.iterdir()) and sys.exc_info()[0] is None
