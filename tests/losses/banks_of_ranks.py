"""An engine of one of several ranks at some ZeRO stages, whose losses and banks are compared with one rank's."""

import torch
from torch import Tensor

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data.load import build_data
from ds_cmli.distributed import process_group as distributed
from tests.conftest import spawn

Found = tuple[Tensor, dict[str, dict[str, Tensor]]]  # losses, and the buffers of each bank by name


def of_one_and_of_two(stages: tuple[int, ...], sections: dict[str, dict]) -> tuple[dict[int, Found], list]:
    """What one rank finds at each stage, and each of two, with eight pairs over all ranks."""
    [alone] = spawn(_at_stages, 1, stages, sections)
    return alone, spawn(_at_stages, 2, stages, sections)


def _at_stages(rank: int, world: int, stages: tuple[int, ...], sections: dict[str, dict]) -> dict[int, Found]:
    return {stage: _three_steps(rank, world, stage, sections) for stage in stages}


def _three_steps(rank: int, world: int, stage: int, sections: dict[str, dict]) -> Found:
    optim = {**sections.get("optim", {}), "micro_batch": 8 // world}
    one_block = {"student": {"layers": 1}, "teacher": {"block": 0}}
    config = load_preset("tiny", {**one_block, **sections, "optim": optim})
    data = build_data(config.data, 0)
    ds_config = DeepSpeedConfig.of({"zero_optimization": {"stage": stage}}).filled(config.optim, world, 3)
    train_engine = engine.build(config, ds_config, data.vocab_size, 3, torch.device("cpu"))
    losses = []
    for step in range(3):
        numbers = range(8 * step + rank * 8 // world, 8 * step + (rank + 1) * 8 // world)
        [found] = train_engine.step([data.collate([data.train[n] for n in numbers])])
        losses.append(distributed.mean_over_ranks(found.stacked()))
    banks = {name: dict(bank.named_buffers()) for name, bank in train_engine.objective.banks().items()}
    train_engine.engine.destroy()
    return torch.stack(losses), banks
