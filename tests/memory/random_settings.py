"""Random small models, and DeepSpeed JSONs in which the ranks need different memory."""

import random

from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config

ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}
LOSSES = (("global",), ("global", "cmli"), ("global", "cmli", "target_cmli"), ("cmli_sigmoid", "cls_kd"))


def random_setting(seed: int) -> tuple[Config, dict, int]:
    """(configuration, DeepSpeed JSON, number of ranks)"""
    draw = random.Random(seed)
    width, image_width = draw.choice((32, 64, 96, 160, 256)), draw.choice((32, 64, 128, 192))
    layers = draw.randint(1, 2)
    text = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": width * draw.choice((2, 4)),
    }
    image = {"embed_dim": image_width, "depth": layers, "num_heads": 2, "patch_size": draw.choice((14, 28))}
    student = {"text_overrides": text, "image_overrides": image, "embed_dim": draw.choice((16, 64, 256))}
    loss = {"weights": dict.fromkeys(draw.choice(LOSSES), 1.0)}
    optim = {"micro_batch": draw.choice((1, 2, 3, 8, 16)), "negatives": draw.choice(("global_batch", "micro_batch"))}
    teacher = {"block": layers - 1, "overrides": {**image, "embed_dim": 32}}
    student["layers"] = layers
    config = load_preset("tiny", {"student": student, "loss": loss, "optim": optim, "teacher": teacher})
    zero = {
        "stage": draw.choices((1, 2, 3), (4, 8, 2))[0],
        "reduce_bucket_size": draw.choice((1000, 20_000, 100_000, 500_000, 5_000_000)),
        "overlap_comm": draw.random() < 0.5,
        "contiguous_gradients": draw.random() < 0.8,
        "round_robin_gradients": draw.random() < 0.2,
        "reduce_scatter": draw.random() < 0.8,
    }
    if zero["stage"] in (1, 2) and draw.random() < 0.15:
        zero["offload_optimizer"] = {"device": "cpu"}
    precision = draw.choices(("bf16", "fp16", "fp32"), (4, 2, 2))[0]
    json = {
        "optimizer": ADAMW,
        "gradient_accumulation_steps": draw.choice((1, 1, 2, 3)),
        "zero_optimization": zero,
    }
    if precision != "fp32":
        json[precision] = {"enabled": True}
        if draw.random() < 0.2:
            json["data_types"] = {"grad_accum_dtype": "fp32"}
    if draw.random() < 0.3:
        json["activation_checkpointing"] = {}
    return config, json, draw.choice((2, 3, 4, 5, 6, 8))
