"""Gradients of a training on several ranks."""

import torch

from tests.conftest import ROOT, rank_environments
from tests.processes import Program

STEPS = 3


def gradients(tmp_path, micro_batch, stage, accumulation, source="demo", world_size=1):
    """Of `world_size` forked ranks."""
    file = tmp_path / f"{micro_batch}.pt"
    command = [
        str(ROOT / "tests" / "distributed" / "dump_gradients.py"),
        str(file),
        str(micro_batch),
        str(stage),
        str(STEPS),
        str(accumulation),
        source,
    ]
    output = tmp_path / "output"
    ranks = [Program(command, item | {"PYTHONPATH": str(ROOT)}, ROOT, output) for item in rank_environments(world_size)]
    assert [rank.wait(300) for rank in ranks] == [0] * world_size, output.read_text()
    return torch.load(file)
