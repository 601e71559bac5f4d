"""Trainings in which any two features meet: interrupted as if never, evaluated, exported, their memory predicted."""

from pathlib import Path

import pytest
from safetensors import safe_open

from ds_cmli.config.schema import load_config
from tests import make
from tests.checkpoint.runs import assert_same
from tests.models.sources import write_source
from tests.stranger.drive import check_memory, used

# Any two values of two columns meet, but for the last. The fourth: one micro-batch, or two and what is compared; then
# all layers, adapters, or some layers, each at its own rate; and what the training starts from.
RUNS = """
zero1 alone fp32 one    again -   sigmoid all  -
zero1 alone fp32 micro  -     ema target  lora siglip
zero2 two   bf16 micro  again -   target  all  -
zero3 alone bf16 micro  again ema sigmoid part coca
zero2 two   fp32 one    -     ema sigmoid part -
zero2 alone fp32 cached again ema sigmoid lora -
zero3 alone fp32 cached -     ema sigmoid all  -
zero1 two   bf16 cached -     -   target  part SigLIP
zero3 two   bf16 one    -     -   target  lora CLIP
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
    "target": {"loss.weights": {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}},
    "sigmoid": {"loss.weights": {"global": 1.0, "cmli": 1.0, "global_sigmoid": 0.3, "cmli_sigmoid": 0.2}},
    "lora": {"student.lora": {"image": ["qkv", "mlp.fc1"]}, "student.lora_rank": 4},
    "part": {
        "student.freeze_image": 1,
        "student.freeze_text": 2,
        "optim.layer_decay": 0.5,
        "optim.lr_factors": {"image": 0.5},
    },
    "CLIP": {"student.lora": {"image": ["q_proj", "v_proj"], "text": ["q_proj"]}},
    "siglip": {
        "student.lora": {"image": ["qkv"], "text": ["c_fc"]},
        # The side of its pictures is no multiple of the teacher's patches.
        "teacher.overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16},
    },
}
BATCH = 8
STEPS = 4
STOP = 3  # a signal comes after this step
AUGMENTED = {"random_resized_crop": 0.5, "horizontal_flip": 0.5, "color_jitter": 0.4}


def arguments_of(values: list[str], folder: Path) -> tuple[list[str], dict]:
    """Return the arguments of a training, and its DeepSpeed JSON. Its data are tars, and pictures with a broken one."""
    content: dict = {}
    settings: dict[str, object] = {"run.match_maps": 1, "data.max_bad_share": 0.2, "data.augmentation": AUGMENTED}
    if values[-1] == "-":
        settings |= {"student.dropout": 0.2, "student.layers": 2 if "part" in values else 1}
    else:
        settings |= {"student.layers": None, "student.shared_blocks": None}
        settings["student.source"] = str(write_source(folder / "source", values[-1]))
    for value in values:
        content |= JSON.get(value, {})
        settings |= SETTINGS.get(value, {})
    micro_batch = BATCH // (1 + ("two" in values)) // content.get("gradient_accumulation_steps", 1)
    options = {"--steps": STEPS, "--eval-every": 3, "--micro-batch": micro_batch}
    options["--deepspeed_config"] = make.json_file(folder / "ds.json", content)
    make.pairs(folder / "pictures", 40, broken=(3,))
    data = ["--data", make.tar(folder / "x.tar", 40) + "::0.4", "--data", f"{folder}/pictures::0.6"]
    return [*make.small(options, settings), *data], content


@pytest.mark.parametrize(
    "number", [pytest.param(n, id=run, marks=[pytest.mark.slow] * (n > 0)) for n, run in enumerate(RUNS)]
)
def test_an_interrupted_training_equals_one_that_was_left_alone(number, tmp_path, alone):
    values = RUNS[number].split()
    arguments, content = arguments_of(values, tmp_path)
    whole = tmp_path / "whole"
    interrupted = tmp_path / "interrupted"
    world = 2 if "two" in values else 1
    assert make.train(*arguments, "--output-dir", str(whole), world=world) == 0
    arguments += ["--output-dir", str(interrupted)]
    assert make.train(*arguments, "--workers", "1", world=world, stop_at=STOP) == 85
    assert make.train(*arguments, world=world) == 0
    assert_same(whole, interrupted)
    config = load_config(whole / "run.json", "the run")
    for line in make.metrics(whole):
        if "loss" in line and line["step"] > 1:
            parts = sum(weight * line[f"loss/{name}"] for name, weight in config.loss.weights.items())
            assert line["loss"] == pytest.approx(parts, rel=1e-5)
    with safe_open(whole / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name]  # noqa: SIM118
    used(whole)
    predicted = check_memory(config, content, world)
    assert (predicted["EMA weights"] > 0) == ("ema" in values)
