"""Trainings that start from a source of each kind, with several features: interrupted as if never, memory predicted."""

import json
from pathlib import Path

import pytest

from ds_cmli.config.schema import load_config
from ds_cmli.export import command as export
from tests.checkpoint.runs import assert_same, json_file, ranks
from tests.drive_train import drive
from tests.make import pairs
from tests.models.dual_models import clip, siglip
from tests.run_folder import write_run
from tests.stranger.drive import check_memory, used
from tests.test_export import run_of

# Of open_clip: a ViT, a CoCa, a ConvNeXt, a SigLIP. "locked" is the whole image tower.
RUNS = """
export   zero3 two   bf16 one    recomputed ema -
siglip   zero1 alone fp32 one    -          ema lora
run      zero2 alone bf16 one    recomputed ema locked
clip     zero3 two   fp32 one    recomputed -   locked
siglip   zero1 two   bf16 cached recomputed -   locked
vit      zero3 two   fp32 one    recomputed -   locked
coca     zero2 alone bf16 one    recomputed ema locked
convnext zero3 two   bf16 one    recomputed ema -
oc-siglip zero1 alone fp32 one   -          ema lora
oc-siglip zero1 two  bf16 cached recomputed -   locked
""".strip().splitlines()
JSON: dict[str, dict] = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}} for stage in (1, 2, 3)},
    "bf16": {"bf16": {"enabled": True}},
    "cached": {"gradient_accumulation_steps": 2},
    "recomputed": {"activation_checkpointing": {}},
}
# open_clip's smallest models have sides that are no multiples of the teacher's patches.
OTHER_PATCHES = {"teacher.overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}}
SETTINGS: dict[str, dict[str, object]] = {
    "ema": {"optim.ema_decay": 0.9, "optim.layer_decay": 0.7},
    "locked": {"student.freeze_image": 2},
    "lora": {"student.lora": {"image": ["q_proj", "v_proj"], "text": ["q_proj"]}, "student.lora_rank": 4},
    "convnext": OTHER_PATCHES,
    "oc-siglip": OTHER_PATCHES,
}
OF_OPEN_CLIP = {"vit": "vit", "coca": "coca", "convnext": "convnext", "oc-siglip": "siglip"}
BATCH, STEPS, STOP = 8, 3, 1


def source_of(name: str, folder: Path) -> Path:
    if name in OF_OPEN_CLIP:
        pytest.importorskip("open_clip", reason="pip install 'ds-cmli[test]'")
        from tests.models.open_clip_models import saved

        return saved(folder / name, OF_OPEN_CLIP[name])
    if name == "siglip":
        return siglip(folder / name)
    if name == "export":
        (folder / "plain").mkdir()
        write_run(folder / "plain")
        export.main([str(folder / "plain"), str(folder / name)], standalone_mode=False)
        return folder / name
    begun = clip(folder / "clip")
    return run_of(begun, folder / "run", {"global": 1.0, "cmli": 1.0}) if name == "run" else begun


def asked(values: list[str], source: Path, data: str, file: Path) -> tuple[list[str], dict]:
    """The arguments of a training, and its DeepSpeed JSON."""
    content: dict = {}
    settings: dict[str, object] = {"run.match_maps": 0, "teacher.block": 0}
    for value in values:
        content |= JSON.get(value, {})
        settings |= SETTINGS.get(value, {})
    if values[0] == "oc-siglip" and "lora" in values:
        settings["student.lora"] = {"image": ["qkv"], "text": ["c_fc"]}
    loss = "global_sigmoid" if "siglip" in values[0] else "global"
    micro_batch = BATCH // (1 + ("two" in values)) // content.get("gradient_accumulation_steps", 1)
    arguments = ["--preset", "tiny", "--steps", str(STEPS), "--micro-batch", str(micro_batch), "--data", data]
    arguments += ["--start-from", str(source), "--losses", f"{loss},cmli,target_cmli"]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return [*arguments, *json_file(file, content)], content


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_training_from_a_source(run, tmp_path, alone):
    values = run.split()
    data = pairs(tmp_path / "pairs", count=40)
    given, content = asked(values, source_of(values[0], tmp_path), data, tmp_path / "ds.json")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    tasks: list[dict] = [
        {"arguments": [*given, "--output-dir", str(straight)]},
        {"arguments": [*given, "--output-dir", str(broken)], "stop_at": STOP},
        {"arguments": [*given, "--output-dir", str(broken)]},
    ]
    if "two" in values:
        codes, _ = ranks(2, tasks)
    else:
        codes = [drive(task["arguments"], task.get("stop_at")) for task in tasks]
    assert codes == [0, 85, 0]
    assert_same(straight, broken)
    assert "refused" not in used(straight)
    check_memory(load_config(straight / "run.json", "the run"), content, 1 + ("two" in values))
