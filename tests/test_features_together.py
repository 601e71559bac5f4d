"""Trainings in which any two features meet: interrupted as if never, evaluated, exported, their memory predicted."""

import json
from itertools import combinations, product
from pathlib import Path

import pytest
from safetensors import safe_open

from ds_cmli.config.schema import load_config
from tests import make
from tests.checkpoint.runs import AUGMENTED, json_file, straight_and_stopped
from tests.metrics_file import metrics
from tests.stranger.drive import check_memory, used

AXES = {
    "stage": ("zero1", "zero2", "zero3"),
    "ranks": ("alone", "two"),
    "precision": ("fp32", "bf16"),
    "step": ("one", "micro", "cached"),  # one micro-batch, or two, and what is compared
    "checkpointing": ("-", "again"),
    "average": ("-", "ema"),
    "losses": ("target", "sigmoid"),
    "trained": ("all", "lora", "part"),  # adapters; some layers, each at its own rate
}
RUNS = """
zero2 two   fp32 one    again -   target  all
zero3 alone bf16 one    -     ema sigmoid lora
zero1 two   bf16 cached again ema sigmoid part
zero3 alone fp32 micro  -     -   target  part
zero2 alone bf16 cached -     -   sigmoid all
zero1 two   bf16 micro  -     -   target  lora
zero3 alone fp32 cached again ema target  lora
zero3 two   bf16 micro  again ema sigmoid all
zero1 alone fp32 one    -     ema sigmoid all
zero2 two   bf16 one    -     ema target  part
zero2 two   bf16 micro  -     -   target  lora
""".strip().splitlines()
JSON: dict[str, dict] = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}} for stage in (1, 2, 3)},
    "bf16": {"bf16": {"enabled": True}},
    "micro": {"gradient_accumulation_steps": 2},
    "cached": {"gradient_accumulation_steps": 2},
    "again": {"activation_checkpointing": {}},
}
SETTINGS: dict[str, dict[str, object]] = {
    "micro": {"optim.negatives": "micro_batch"},
    "ema": {"optim.ema_decay": 0.9},
    "target": {
        "loss.weights": {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0},
        "loss.start": {"target_cmli": 2},
        "teacher.block": 0,
    },
    "sigmoid": {"loss.weights": {"global": 1.0, "cmli": 1.0, "global_sigmoid": 0.3, "cmli_sigmoid": 0.2}},
    "lora": {"student.lora": {"image": ["qkv", "mlp.fc1"]}, "student.lora_rank": 4},
    "part": {
        "student.freeze_image": 1,
        "student.freeze_text": 2,
        "optim.layer_decay": 0.5,
        "optim.lr_factors": {"image": 0.5},
    },
}
BATCH, STEPS, STOP = 8, 4, 3


def test_any_two_values_of_two_axes_meet():
    met = {pair for run in RUNS for pair in combinations(enumerate(run.split()), 2)}
    each = [[(number, value) for value in values] for number, values in enumerate(AXES.values())]
    assert {pair for one, other in combinations(each, 2) for pair in product(one, other)} <= met


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, list[str]]:
    """`--data` options of each kind of source, one with a broken picture."""
    folder, count = tmp_path_factory.mktemp("sources"), 20
    (folder / "tars").mkdir()
    for k in range(2):
        make.tar(folder / "tars" / f"{k}.tar", count, count * k)
    make.pairs(folder / "folder", 2 * count, broken=(3,))
    make.parquet(folder / "parquet", 2 * count)
    lines = [f"folder/{k % count + 4}.png\tred apple {k}. Round.\n" for k in range(2 * count)]
    (folder / "x.csv").write_text("filepath\ttitle\n" + "".join(lines))
    images = [{"id": k, "file_name": f"folder/{k}.png"} for k in range(4, count)]
    texts = [{"image_id": k % 16 + 4, "caption": f"pear {k}"} for k in range(2 * count)]
    make.json_file(folder / "coco.json", {"images": images, "annotations": texts})
    by_name = {name: ["--data", str(folder / name)] for name in ("tars", "folder", "parquet", "x.csv", "coco.json")}
    by_name["mixture"] = ["--data", f"{folder}/tars::0.4", "--data", f"{folder}/folder::0.6"]
    return by_name


def asked(values: list[str], source: list[str], file: Path) -> tuple[list[str], dict]:
    """The arguments of a training, and its DeepSpeed JSON."""
    content: dict = {}
    settings: dict[str, object] = {"student.dropout": 0.2, "run.match_maps": 1, "data.max_bad_share": 0.2}
    settings["student.layers"] = 2 if "part" in values else 1
    for value in values:
        content |= JSON.get(value, {})
        settings |= SETTINGS.get(value, {})
    micro_batch = BATCH // (1 + ("two" in values)) // content.get("gradient_accumulation_steps", 1)
    arguments = ["--preset", "tiny", "--steps", str(STEPS), "--eval-every", "3", "--micro-batch", str(micro_batch)]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return [*arguments, *AUGMENTED, *source, *json_file(file, content)], content


@pytest.mark.parametrize(
    "number", [pytest.param(n, id=run, marks=[pytest.mark.slow] * (n > 0)) for n, run in enumerate(RUNS)]
)
def test_a_training(number, sources, tmp_path, monkeypatch, alone):
    values = RUNS[number].split()
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))  # of other processes
    source = list(sources.values())[number % len(sources)]
    given, content = asked(values, source, tmp_path / "ds.json")
    straight = straight_and_stopped(given, tmp_path, STOP, "two" in values, "--workers", "1")
    config = load_config(straight / "run.json", "the run")
    for line in metrics(straight):
        if "loss" in line and line["step"] > 1:
            parts = sum(weight * line[f"loss/{name}"] for name, weight in config.loss.weights.items())
            assert line["loss"] == pytest.approx(parts, rel=1e-5)
    with safe_open(straight / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name]  # noqa: SIM118
    assert "refused" not in used(straight)
    predicted = check_memory(config, content, 1 + ("two" in values))
    assert (predicted["EMA weights"] > 0) == ("ema" in values)
