"""Trainings from a CLIP or SigLIP, broken and resumed."""

import json
from pathlib import Path

from ds_cmli.config.schema import load_config
from tests.checkpoint.runs import assert_same, json_file, ranks
from tests.drive_train import drive
from tests.make import pairs
from tests.stranger.drive import check_memory, used

RUNS = """
export zero3 two   bf16 one    recomputed ema -      -
run    zero2 two   fp32 cached -          -   locked compiled
siglip zero1 alone fp32 one    -          ema lora   -
clip   zero1 alone bf16 cached recomputed -   lora   compiled
siglip zero3 alone fp32 cached -          -   -      compiled
run    zero2 alone bf16 one    recomputed ema locked -
clip   zero3 two   fp32 one    recomputed -   locked -
export zero2 alone bf16 cached -          ema lora   compiled
clip   zero2 two   bf16 one    -          ema -      compiled
siglip zero1 two   bf16 cached recomputed -   locked -
run    zero3 two   bf16 cached -          ema lora   compiled
export zero1 two   fp32 one    recomputed -   locked compiled
run    zero1 alone bf16 one    -          -   -      compiled
siglip zero2 two   bf16 cached recomputed -   -      compiled
""".strip().splitlines()


JSON: dict[str, dict] = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}} for stage in (1, 2, 3)},
    "bf16": {"bf16": {"enabled": True}},
    "cached": {"gradient_accumulation_steps": 2},
    "recomputed": {"activation_checkpointing": {}},
}


SETTINGS: dict[str, dict[str, object]] = {
    "ema": {"optim.ema_decay": 0.9, "optim.layer_decay": 0.7},
    "locked": {"student.freeze_image": 2},
    "lora": {"student.lora": {"image": ["q_proj", "v_proj"], "text": ["q_proj"]}, "student.lora_rank": 4},
    "compiled": {"run.compile": "blocks"},
}


# Of sources whose layers have other names.
LORA = {
    "export": {"image": ["qkv"], "text": ["query"]},
    "open_clip": {"image": ["in_proj", "out_proj"], "text": ["in_proj", "c_fc"]},
    "open_clip_convnext": {"image": ["fc1", "fc2"], "text": ["out_proj"]},
    "open_clip_siglip": {"image": ["qkv"], "text": ["in_proj"]},
}


BATCH, STEPS, STOP = 8, 3, 1


def asked(values: list[str], source: Path, data: str, file: Path) -> tuple[list[str], dict]:
    """The arguments of a training, and its DeepSpeed JSON."""
    content: dict = {}
    settings: dict[str, object] = {"run.match_maps": 0, "teacher.block": 0}
    for value in values:
        content |= JSON.get(value, {})
        settings |= SETTINGS.get(value, {})
    if "lora" in values and values[0] in LORA:
        settings["student.lora"] = LORA[values[0]]
    loss = "global_sigmoid" if values[0] in ("siglip", "open_clip_siglip") else "global"
    micro_batch = BATCH // (1 + ("two" in values)) // content.get("gradient_accumulation_steps", 1)
    arguments = ["--preset", "tiny", "--steps", str(STEPS), "--micro-batch", str(micro_batch), "--data", data]
    arguments += ["--start-from", str(source), "--losses", f"{loss},cmli,target_cmli"]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return [*arguments, *json_file(file, content)], content


def train_and_break(values: list[str], source: Path, tmp_path: Path) -> None:
    """A training, and another one that is interrupted, whose weights are then the same; its memory is predicted."""
    data = pairs(tmp_path / "pairs", count=40)
    given, content = asked(values, source, data, tmp_path / "ds.json")
    straight, broken = tmp_path / "run", tmp_path / "broken"
    tasks: list[dict] = [
        {"arguments": [*given, "--output-dir", str(straight)]},
        {"arguments": [*given, "--output-dir", str(broken)], "stop_at": STOP},
        {"arguments": [*given, "--output-dir", str(broken)]},
    ]
    if "two" in values:
        codes, _ = ranks(2, tasks, timeout=1800 if "compiled" in values else 300)
    else:
        codes = [drive(task["arguments"], task.get("stop_at")) for task in tasks]
    assert codes == [0, 85, 0]
    assert_same(straight, broken)
    assert "refused" not in used(straight)
    if "compiled" not in values:
        config = load_config(straight / "config.json", "the run")
        check_memory(config, content, 1 + ("two" in values))


PLAIN = [run for run in RUNS if "compiled" not in run]
