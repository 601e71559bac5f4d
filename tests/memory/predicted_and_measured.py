"""python tests/memory/predicted_and_measured.py: peaks on this CPU beside predicted ones, for many settings.

Takes minutes, so it is no test; ends with exit code 1 where one differs by more than half a percent.
"""

import argparse
import sys

from ds_cmli.common import quiet

quiet.silence()

from ds_cmli.config.presets import load_preset  # noqa: E402
from ds_cmli.memory.predict import Options, predict  # noqa: E402
from profiling.memory.measure_cpu import measure  # noqa: E402

BAR = 0.005
ALL = ("global", "cmli", "target_cmli")
# (micro-batch, ZeRO stage, checkpointing, accumulation, losses, precision, ranks)
SETTINGS = [
    (8, 2, True, 1, ALL, "bf16", 1),
    (8, 2, False, 1, ALL, "bf16", 2),
    (16, 1, False, 1, ALL, "bf16", 2),
    (16, 2, False, 2, ALL, "bf16", 8),
    (32, 2, False, 1, ALL, "bf16", 8),
    (16, 1, True, 2, ALL, "bf16", 8),
    (16, 2, False, 1, ("global",), "bf16", 8),
    (16, 2, True, 1, ("global", "cmli"), "bf16", 8),
    (16, 1, False, 1, ("target_cmli",), "bf16", 8),
    (16, 2, False, 1, ("cmli", "cls_kd"), "bf16", 64),
    (16, 2, False, 1, ALL, "fp32", 8),
    (16, 1, True, 1, ALL, "fp32", 1),
    (16, 0, False, 1, ALL, "fp32", 1),
    (16, 3, False, 1, ALL, "bf16", 2),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    preset = parser.parse_args().preset
    missed = 0
    for batch, stage, checkpointing, accumulation, losses, precision, world_size in SETTINGS:
        ds_config = {
            "gradient_accumulation_steps": accumulation,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                "overlap_comm": True,
                "reduce_bucket_size": 5_000_000,
            },
            **({} if precision == "fp32" else {precision: {"enabled": True}}),
            **({"activation_checkpointing": {}} if checkpointing else {}),
        }
        weights = dict.fromkeys(losses, 1.0)
        config = load_preset(preset, {"optim": {"micro_batch": batch}, "loss": {"weights": weights}})
        measured = measure(config, ds_config, world_size).totals["requested"]
        options = Options(backend="fake")
        predicted = predict(config, ds_config, world_size, target="cpu", options=options).report.totals["requested"]
        error = predicted / measured - 1
        missed += abs(error) > BAR
        print(
            f"batch {batch:2}, stage {stage}, checkpointing {'on ' if checkpointing else 'off'}, accumulation "
            f"{accumulation}, {precision}, {world_size:2} ranks, {'+'.join(losses):23}: "
            f"measured {measured:13,} B, predicted {predicted:13,} B, {error:+.3%}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
