"""What can be wrong in a prediction, and in profiling a training: see tests/test_mistakes.py."""

import json
from pathlib import Path

SMALL = "--set student.layers=1 --set teacher.block=0"


def offloaded(here: Path) -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    (here / "ds.json").write_text(json.dumps({"zero_optimization": zero}))


MISTAKES = [
    ("memory --gpu 'No Such Card'", "--gpu"),
    ("memory --gpu-memory 48GB", "--sm"),
    ("memory --gpu-memory 48GB --sm 6.1", "--sm"),
    ("memory --fit much", "--fit"),
    ("memory --world-size 0", "--world-size"),
    ("memory --plot memory.txt", "--plot"),
    (f"memory {SMALL} --losses global --json {{here}}/nowhere/report.json", "report.json"),
    ("memory --set student.layers=9", "student.layers"),
    ("memory --set student.text_backbone=someone/no-such-model", "someone/no-such-model"),
    ("memory --deepspeed_config {here}/ds.json", "ds.json"),
    ("memory --deepspeed_config {here}/ds.json", "offload_param", offloaded),
    ("train --steps 4 --profile 3:2", "--profile"),
    ("train --steps 4 --profile 1:2 --profile-memory 2", "--profile"),
]
