"""Losses, and full gradients before clipping, of `tiny` in fp32 on several ranks."""

from typing import Any

import torch

from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data.build import build_data
from ds_cmli.data.pairs import loader
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import build
from tests import ranks

STEPS = 3


def gradients(micro_batch: int, stage: int, accumulation: int, source: str = "demo", world_size: int = 1):
    """Of rank 0 of `world_size`."""
    return ranks.run(gradients_of_rank, world_size, micro_batch, stage, accumulation, source, group=False)[0]


def gradients_of_rank(
    rank: int, world_size: int, micro_batch: int, stage: int, accumulation: int, source: str
) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    weights = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0, "cls_kd": 1.0}
    loss = {"weights": weights}
    config = load_preset("tiny", {"optim": {"micro_batch": micro_batch}, "loss": loss, "data": {"source": source}})
    device = distributed.init()
    data = build_data(config.data, 0)
    ds_config = {
        "zero_optimization": {"stage": stage},
        "activation_checkpointing": {},
        "gradient_clipping": 0.01,
        "gradient_accumulation_steps": accumulation,
    }
    ds_config = DeepSpeedConfig.of(ds_config).filled(config.optim, world_size, total_steps=STEPS)
    ds_config["optimizer"]["params"]["torch_adam"] = True
    step = build(config, ds_config, data.vocab_size, STEPS, device)
    sampler = GlobalBatchSampler(len(data.train), micro_batch, rank, world_size, 0)
    batches = iter(loader(data.train, data.collate, 0, batch_sampler=sampler))

    gradients: list[dict[str, torch.Tensor]] = []
    update = step.engine._take_model_step

    def collect_then_update(*arguments) -> None:
        named = step.objective.named_parameters()
        gradients.append({name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad})
        update(*arguments)

    step.engine._take_model_step = collect_then_update
    losses = []
    for _ in range(STEPS):
        result = step.step([next(batches) for _ in range(accumulation)])
        losses.append(distributed.mean_over_ranks(torch.stack([x.stacked() for x in result]).mean(0)))
    return {"losses": torch.stack(losses), "gradients": gradients if rank == 0 else []}
