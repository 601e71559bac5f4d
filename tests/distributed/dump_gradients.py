"""Started by the launcher under test: trains `tiny` in fp32 and saves losses and full gradients before clipping.

Usage: dump_gradients.py FILE MICRO_BATCH ZERO_STAGE STEPS ACCUMULATION SOURCE
"""

import os
import sys

import torch

from ds_cmli.common import quiet
from ds_cmli.common.cli import leave
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data.build import build_data
from ds_cmli.data.pairs import train_loader
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import build

quiet.silence()


def main(file: str, source: str, micro_batch: int, stage: int, steps: int, accumulation: int) -> None:
    from deepspeed.utils import safe_get_full_grad

    torch.set_num_threads(1)
    weights = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0, "cls_kd": 1.0}
    loss = {"weights": weights}
    config = load_preset("tiny", {"optim": {"micro_batch": micro_batch}, "loss": loss, "data": {"source": source}})
    device = distributed.init()
    world_size = int(os.environ["WORLD_SIZE"])
    data = build_data(config.data, 0)
    ds_config = {
        "zero_optimization": {"stage": stage},
        "activation_checkpointing": {},
        "gradient_clipping": 0.01,
        "gradient_accumulation_steps": accumulation,
    }
    ds_config = DeepSpeedConfig.of(ds_config).filled(config.optim, world_size, total_steps=steps)
    ds_config["optimizer"]["params"]["torch_adam"] = True
    step = build(config, ds_config, data.vocab_size, steps, device)
    sampler = GlobalBatchSampler(len(data.train), micro_batch, distributed.rank(), world_size, 0)
    batches = iter(train_loader(data, sampler, 0))

    gradients: list[dict[str, torch.Tensor]] = []
    update = step.engine._take_model_step

    def collect_then_update(*arguments) -> None:
        named = step.objective.named_parameters()
        gradients.append({name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad})
        update(*arguments)

    step.engine._take_model_step = collect_then_update
    losses = []
    for _ in range(steps):
        result = step.step([next(batches) for _ in range(accumulation)])
        losses.append(distributed.mean_over_ranks(torch.stack([x.stacked() for x in result]).mean(0)))
    if distributed.is_main():
        torch.save({"losses": torch.stack(losses), "gradients": gradients}, file)
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[6:], *(int(a) for a in sys.argv[2:6]))
    leave(0)
