"""The names that `DeepSpeedConfig` replaces."""

from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig

__all__ = ["BATCH_KEYS"]
load = DeepSpeedConfig.load
check = DeepSpeedConfig.of


def resolve(content, optim, world_size, total_steps):
    return DeepSpeedConfig.of(content).filled(optim, world_size, total_steps)


def precision(content):
    return DeepSpeedConfig.of(content).precision
