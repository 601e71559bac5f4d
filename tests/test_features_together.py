"""Trainings in which any two features meet: interrupted as if never, evaluated, exported, their memory predicted."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from ds_cmli.config.schema import load_config
from tests.checkpoint.runs import AUGMENTED, assert_same, json_file, ranks
from tests.covering import not_met
from tests.data.sources.samples import coco, datasets, members, picture, rows, table, tar, write
from tests.drive_train import drive
from tests.metrics_file import metrics
from tests.models.aspects import SETTINGS as ANY_ASPECT
from tests.models.aspects import of_many_aspects
from tests.stranger.drive import check_memory, used

AXES = {
    "stage": ("zero1", "zero2", "zero3"),
    "ranks": ("alone", "two"),
    "precision": ("fp32", "bf16"),
    "step": ("one", "micro", "cached"),  # one micro-batch, or two, and what is compared
    "checkpointing": ("-", "again"),
    "average": ("-", "ema"),
    "pictures": ("square", "aspect"),
    "losses": ("target", "sigmoid"),
    "adapters": ("-", "lora"),
    "layers": ("-", "part"),  # some are frozen, and each has its own rate
    "schedule": ("-", "warmup"),
    "duplicates": ("mask", "keep"),
}
IMPOSSIBLE = ({"part", "warmup"},)
RUNS = """
zero2 two   fp32 one    again -   square target  -    -    -      mask
zero3 alone bf16 cached -     ema aspect sigmoid lora part -      keep
zero1 alone fp32 micro  again -   square target  lora -    warmup keep
zero1 two   bf16 one    -     ema square sigmoid -    -    warmup mask
zero3 two   bf16 micro  -     ema square target  -    part -      mask
zero2 alone bf16 cached again -   aspect sigmoid lora part -      mask
zero3 alone fp32 cached -     ema aspect sigmoid -    -    warmup keep
zero2 alone fp32 micro  again -   square sigmoid lora -    warmup keep
zero1 two   bf16 cached -     -   square sigmoid lora part -      keep
zero3 two   bf16 one    again ema aspect target  -    part -      mask
zero2 alone fp32 one    -     ema square target  lora -    warmup keep
zero1 two   fp32 micro  again -   square sigmoid -    part -      mask
zero3 alone fp32 cached -     -   square target  lora -    warmup keep
zero2 two   fp32 cached -     -   square sigmoid -    -    -      mask
zero1 two   bf16 micro  again -   aspect sigmoid -    -    -      keep
zero1 alone bf16 one    again -   square target  lora -    warmup keep
zero3 two   bf16 cached again -   square sigmoid lora -    -      keep
zero3 alone bf16 micro  -     -   aspect sigmoid -    part -      mask
zero1 two   bf16 one    -     -   aspect target  lora -    -      keep
""".strip().splitlines()
WARMUP = {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 3}
JSON: dict[str, dict] = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}} for stage in (1, 2, 3)},
    "bf16": {"bf16": {"enabled": True}},
    "micro": {"gradient_accumulation_steps": 2},
    "cached": {"gradient_accumulation_steps": 2},
    "again": {"activation_checkpointing": {}},
    "warmup": {"scheduler": {"type": "WarmupLR", "params": WARMUP}},
}
SETTINGS: dict[str, dict[str, object]] = {
    "micro": {"optim.negatives": "micro_batch"},
    "ema": {"optim.ema_decay": 0.9},
    "aspect": {f"{section}.{name}": x for section, values in ANY_ASPECT.items() for name, x in values.items()},
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
    "keep": {"loss.duplicates": "keep"},
}
BATCH, STEPS, STOPS = 8, 4, (1, 3)
SCALARS = 512  # bytes: the few numbers that operators and the engine hold for a moment


def test_any_two_values_of_two_axes_meet():
    assert [pair for pair in not_met(AXES, RUNS) if {*pair} not in IMPOSSIBLE] == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, list[str]]:
    """`--data` options of each kind of source, with several captions where they can be, and broken pictures."""
    folder, count = tmp_path_factory.mktemp("sources"), 20
    for k in range(2):
        some = []
        for name, content in members(range(count * k, count * (k + 1)), "red apple {k}. Round."):
            if "7.png" not in name:
                some.append((name, content))
        tar(folder / "tars" / f"{k}.tar", some)
    write(folder / "folder", rows(count) + rows(count, "green pear"))
    (folder / "folder" / "003.png").write_bytes(b"no picture")
    said = [f"red apple {k}. It is round! Or not?" for k in range(count)]
    table(range(count), caption="text", text=said).to_parquet(str(folder / "x.parquet"))
    table(range(count), caption="text", text=said).save_to_disk(str(folder / "saved"))
    for k in range(count):
        (folder / f"{k}.png").write_bytes(picture(k))
    lines = [f"{k % count}.png\tred apple {k}. Round.\n" for k in range(30)]
    (folder / "x.csv").write_text("filepath\ttitle\n" + "".join(lines))
    (folder / "coco").mkdir()
    annotations = coco(folder / "coco", count=count)
    by_name = {name: ["--data", str(folder / name)] for name in ("tars", "folder", "x.parquet", "saved", "x.csv")}
    by_name["coco"] = ["--data", str(annotations)]
    by_name["mixture"] = ["--data", f"{folder}/tars::0.4", "--data", f"{folder}/folder::0.6"]
    return by_name


def chosen(values: list[str], number: int, sources: dict[str, list[str]], folder: Path) -> list[str]:
    """The options of a source that has what the values ask for."""
    if "aspect" in values:
        source, file = of_many_aspects(folder), folder / "metadata.jsonl"
        first = [json.loads(line) for line in file.read_text().splitlines()]
        second = [{**line, "text": "a square"} for line in first]
        file.write_text("\n".join(map(json.dumps, first + second)))
    else:
        source = list(sources.values())[number % len(sources)]
    return source


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
    monkeypatch.setattr(datasets().config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    source = chosen(values, number, sources, tmp_path / "aspects")
    given, content = asked(values, source, tmp_path / "ds.json")
    straight, broken = tmp_path / "run", tmp_path / "broken"
    tasks: list[dict] = [{"arguments": [*given, "--output-dir", str(straight)]}]
    tasks += [{"arguments": [*given, "--output-dir", str(broken), "--workers", "1"], "stop_at": stop} for stop in STOPS]
    tasks += [{"arguments": [*given, "--output-dir", str(broken)]}]
    if "two" in values:
        codes, _ = ranks(tmp_path, 2, tasks)
    else:
        codes = [drive(task["arguments"], task.get("stop_at")) for task in tasks]
    assert codes == [0, 85, 85, 0]
    assert_same(straight, broken)
    config = load_config(straight / "config.json", "the run")
    for line in metrics(straight):
        if "loss" in line and line["step"] > 1:
            parts = sum(weight * line[f"loss/{name}"] for name, weight in config.loss.weights.items())
            assert line["loss"] == pytest.approx(parts, rel=1e-5)
    with safe_open(straight / "student.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name]  # noqa: SIM118
    refused = used(straight).get("refused", "")
    assert ("takes square pictures" in refused) if "aspect" in values else not refused
    predicted = check_memory(config, content, 1 + ("two" in values), SCALARS)
    assert (predicted["EMA weights"] > 0) == ("ema" in values)
