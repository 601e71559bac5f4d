"""Engines whose steps tests watch or spoil."""

import torch

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.faults import nonfinite


def build(device, data, ds_config, overrides=None, steps=6):
    config = load_preset("tiny", overrides or {})
    ds_config = engine.on_this_device(DeepSpeedConfig.of(ds_config))
    return engine.build(config, engine.filled(config, ds_config, 1, steps), data.vocab_size, steps, device)


FP16 = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}


def micro_batch(train_engine, batch) -> torch.Tensor:
    """Train on one micro-batch, maybe one of several of a step; its weighted loss."""
    losses = train_engine._forward_backward(batch)
    train_engine.update()
    return losses.total


def everything(train_engine) -> list[torch.Tensor]:
    """Copies of all that an update changes: weights, fp32 copies, their averages, moments and the learning rate."""
    optimizer = train_engine.engine.optimizer
    states = [s[k] for s in optimizer.state.values() for k in sorted(s) if torch.is_tensor(s[k])]
    params = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in train_engine.engine.module.parameters()]
    flat = [p for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
            for p in getattr(optimizer, name, [])]  # fmt: skip
    averages = train_engine.ema.averages if train_engine.ema is not None else []
    return [
        x.detach().clone() for x in (*params, *flat, *averages, *states, torch.tensor(train_engine.engine.get_lr()))
    ]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def spoil(train_engine, name, monkeypatch) -> list:
    """Make losses or gradients not finite until the hooks returned are removed and `monkeypatch` is undone."""
    if name == "gradient":

        def hook(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * torch.inf)

        return [train_engine.objective.student.projection.register_forward_hook(hook)]
    poison = nonfinite.poison
    monkeypatch.setattr(nonfinite, "poison", lambda loss: poison(loss + torch.tensor(float(name))))
    return []
