"""Trainings in which any two features meet: interrupted as if never, evaluated, exported, their memory predicted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ds_cmli.checkpoint.weights import BANKS
from ds_cmli.config.schema import load_config
from tests.checkpoint.test_restore import AUGMENTED, assert_same, json_file, ranks
from tests.covering import not_met
from tests.data.sources.samples import members, picture, tar
from tests.data.sources.test_arrow import datasets, table
from tests.data.sources.test_coco import coco
from tests.data.sources.test_folder import rows, write
from tests.drive_train import drive
from tests.metrics_file import metrics
from tests.models.test_any_aspect import SETTINGS as ANY_ASPECT
from tests.models.test_any_aspect import of_many_aspects
from tests.stranger.drive import check_memory, used

AXES = {
    "stage": ("zero0", "zero1", "zero2", "zero3"),
    "ranks": ("alone", "two"),
    "precision": ("fp32", "bf16"),
    "negatives": ("one", "cached", "queue"),  # one micro-batch, or two
    "exchange": ("gather", "ring"),
    "checkpointing": ("-", "recomputed"),
    "optimizer": ("AdamW", "Muon"),
    "average": ("-", "ema"),
    "pictures": ("square", "kept", "aspect"),
    "losses": ("target", "contrast", "sparc"),
    "adapters": ("-", "lora"),
    "layers": ("-", "layers"),  # some are frozen, and each has its own rate
    "schedule": ("-", "warmup"),
    "order": ("-", "grouped"),
    "captions": ("single", "several", "wrong"),
    "pooled": ("-", "flair"),
}
IMPOSSIBLE = ({"aspect", "sparc"}, {"Muon", "warmup"}, {"layers", "warmup"}, {"queue", "several"}, {"queue", "wrong"})
# Twelve would be the fewest, as there are four stages, and three values of other axes.
RUNS = """
zero2 alone bf16 queue  ring   recomputed AdamW ema square target   lora -      warmup grouped single  flair
zero3 alone bf16 cached gather -          Muon  -   aspect target   -    layers -      grouped several flair
zero1 two   bf16 queue  gather -          Muon  -   square sparc    -    layers -      grouped single  -
zero3 alone bf16 one    gather recomputed AdamW ema square contrast lora layers -      -       several flair
zero0 two   fp32 queue  ring   -          Muon  ema aspect contrast -    layers -      -       single  flair
zero1 alone fp32 one    ring   recomputed Muon  -   aspect target   lora -      -      -       wrong   flair
zero3 two   fp32 queue  ring   recomputed AdamW -   kept   sparc    lora -      warmup grouped single  flair
zero0 alone fp32 cached gather recomputed AdamW -   square sparc    lora layers -      -       wrong   flair
zero2 two   bf16 cached gather recomputed AdamW -   aspect contrast -    -      warmup grouped wrong   flair
zero0 two   bf16 one    ring   recomputed AdamW -   kept   target   -    -      warmup grouped several -
zero1 alone fp32 cached ring   -          AdamW ema kept   contrast lora -      warmup -       wrong   -
zero2 alone fp32 one    gather -          Muon  ema kept   sparc    lora layers -      -       several flair
zero2 alone bf16 cached gather -          AdamW ema kept   target   -    -      -      -       single  -
zero1 two   fp32 one    gather recomputed Muon  -   aspect target   -    -      -      grouped single  -
zero1 alone bf16 cached gather -          AdamW -   square target   -    -      -      grouped several flair
zero3 two   fp32 one    ring   -          AdamW ema kept   target   lora -      -      -       wrong   -
""".strip().splitlines()
WARMUP = {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 3}
JSON: dict[str, dict] = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}} for stage in range(4)},
    "bf16": {"bf16": {"enabled": True}},
    "cached": {"gradient_accumulation_steps": 2},
    "queue": {"gradient_accumulation_steps": 2},
    "recomputed": {"activation_checkpointing": {}},
    "AdamW": {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
    "Muon": {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02}}, "gradient_clipping": 0},
    "warmup": {"scheduler": {"type": "WarmupLR", "params": WARMUP}},
}
SETTINGS: dict[str, dict[str, object]] = {
    "queue": {"optim.negatives": "queue:30,tokens:12"},
    "ring": {"loss.cmli_exchange": "ring"},
    "ema": {"optim.ema_decay": 0.9},
    "kept": {"student.patch_keep": 0.5},
    "aspect": {f"{section}.{name}": x for section, values in ANY_ASPECT.items() for name, x in values.items()},
    "target": {"loss.weights": {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}, "teacher.block": 0},
    "contrast": {
        "loss.weights": {"global": 1.0, "cmli": 1.0, "token_contrast": 1.0, "cls_contrast": 0.5},
        "loss.bank": 30,
        "loss.start": {"cls_contrast": 2},
        "teacher.average_blocks": 2,
    },
    "sparc": {"loss.weights": {"global": 1.0, "cmli": 1.0, "sparc": 0.5}},
    "lora": {"student.lora": {"image": ["qkv", "mlp.fc1"]}, "student.lora_rank": 4},
    "layers": {
        "student.freeze_image": 1,
        "student.freeze_text": 2,
        "optim.layer_decay": 0.5,
        "optim.lr_factors": {"image": 0.5},
    },
    "grouped": {"data.group_by_length": 2},
    "several": {"data.captions": 3, "data.split_sentences": True, "loss.captions": "each"},
    "wrong": {
        "data.captions": 2,
        "data.split_sentences": True,
        "data.negatives": "swap",
        "data.negatives_count": 2,
        "loss.negatives": "own",
    },
}
BATCH, STEPS, STOPS = 8, 4, (1, 3)
SCALARS = 512  # bytes: the few numbers that operators and the engine hold for a moment


def test_any_two_values_of_two_axes_meet():
    assert [pair for pair in not_met(AXES, RUNS) if {*pair} not in IMPOSSIBLE] == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, list[str]]:
    """`--data` options of each kind of source, with several captions where there can be, and some broken pictures."""
    folder, count = tmp_path_factory.mktemp("sources"), 20
    for k in range(2):
        some = [
            member
            for member in members(range(count * k, count * (k + 1)), "red apple {k}. Round.")
            if "7.png" not in member[0]
        ]
        tar(folder / "tars" / f"{k}.tar", some)
    write(folder / "folder", rows(count) + rows(count, "green pear"))
    (folder / "folder" / "003.png").write_bytes(b"no picture")
    said = [f"red apple {k}. It is round! Or not?" for k in range(count)]
    table(range(count), caption="text", text=said).to_parquet(str(folder / "x.parquet"))
    table(range(count), caption="text", text=said).save_to_disk(str(folder / "saved"))
    for k in range(count):
        (folder / f"{k}.png").write_bytes(picture(k))
    (folder / "x.csv").write_text(
        "filepath\ttitle\n" + "".join(f"{k % count}.png\tred apple {k}. Round.\n" for k in range(30))
    )
    (folder / "coco").mkdir()
    by_name = {name: ["--data", str(folder / name)] for name in ("tars", "folder", "x.parquet", "saved", "x.csv")}
    by_name["coco"] = ["--data", str(coco(folder / "coco", count=count))]
    by_name["mixture"] = ["--data", f"{folder}/tars::0.4", "--data", f"{folder}/folder::0.6"]
    return by_name


def asked(values: list[str], source: list[str], file: Path) -> tuple[list[str], dict]:
    """The arguments of a training, and its DeepSpeed JSON."""
    content: dict = {}
    settings: dict[str, object] = {"student.dropout": 0.2, "run.match_maps": 1, "data.max_bad_share": 0.2}
    settings["student.layers"] = 2 if "layers" in values else 1
    for value in values:
        content |= JSON.get(value, {})
        settings |= SETTINGS.get(value, {})
    if {"aspect", "contrast"} <= {*values}:  # without what needs as many patches of every picture
        settings["loss.weights"] = {"global": 1.0, "cmli": 1.0, "cls_contrast": 0.5}
        del settings["teacher.average_blocks"]
    if "flair" in values:
        settings["loss.weights"] = {**settings["loss.weights"], "flair": 0.5}
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
    source = of_many_aspects(tmp_path / "aspects") if "aspect" in values else [*sources.values()][number % len(sources)]
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
    assert_same_banks(straight, broken)
    config = load_config(straight / "config.json", "the run")
    for line in metrics(straight):
        if "loss" in line and line["step"] > 1:
            parts = sum(weight * line[f"loss/{name}"] for name, weight in config.loss.weights.items())
            assert line["loss"] == pytest.approx(parts, rel=1e-5)
    with safe_open(straight / "student.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name or "bank" in name]  # noqa: SIM118
    refused = used(straight).get("refused", "")
    assert ("takes square pictures" in refused) if "aspect" in values else not refused
    predicted = check_memory(config, content, 1 + ("two" in values), SCALARS)
    assert (predicted["EMA weights"] > 0) == ("ema" in values)


def assert_same_banks(run: Path, other: Path) -> None:
    files = [folder / "checkpoint" / f"step{STEPS}" / BANKS for folder in (run, other)]
    assert files[0].exists() == files[1].exists()
    if files[0].exists():
        banks = [torch.load(file) for file in files]
        for name, bank in banks[0].items():
            assert all(torch.equal(value, banks[1][name][key]) for key, value in bank.items())
            assert bank["entered"] == STEPS * BATCH
