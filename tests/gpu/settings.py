"""The settings whose memory is predicted and measured on a GPU: presets, batches, ZeRO stages, ranks, precisions.

All with random weights and made-up batches: nothing is downloaded.
"""

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config

STEPS = 3  # the optimizer's states appear in the first, the peak in the second; one more shows that it stays


@dataclass(frozen=True)
class Setting:
    name: str
    preset: str
    batch: int  # pairs per rank
    world: int = 1  # ranks that rank 0 takes itself to be one of
    stage: int = 2
    precision: str = "bf16"
    checkpointing: bool = False
    offload: bool = False
    accumulation: int = 1
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resolve(self) -> tuple[Config, dict[str, Any]]:
        """The configuration, and the DeepSpeed JSON as its file would hold it."""
        overrides = copy.deepcopy(self.overrides)
        overrides.setdefault("student", {}).update(image_weights="random", text_weights="random")
        overrides.setdefault("teacher", {})["weights"] = "random"
        overrides.setdefault("data", {})["tokenizer"] = "builtin"
        overrides.setdefault("optim", {})["micro_batch"] = self.batch
        config = load_preset(self.preset, overrides)
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        }
        ds_config: dict[str, Any] = {
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.precision != "fp32":
            ds_config[self.precision] = {"enabled": True}
        if self.checkpointing:
            ds_config["activation_checkpointing"] = {}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        return config, ds_config


def _losses(*names: str, **settings: Any) -> dict[str, dict[str, Any]]:
    return {"loss": {"weights": dict.fromkeys(names, 1.0), **settings}}


ALL = ("global", "cmli", "target_cmli")
SETTINGS = [
    Setting("tiny", "tiny", 8, precision="fp32"),
    Setting("demo", "demo", 64),
    Setting("demo, batch 16", "demo", 16),
    Setting("demo, batch 256", "demo", 256),
    Setting("demo, stage 1", "demo", 64, stage=1),
    Setting("demo, stage 3", "demo", 64, stage=3),
    Setting("demo, fp32", "demo", 64, precision="fp32"),
    Setting("demo, fp16", "demo", 64, precision="fp16"),
    Setting("demo, checkpointing", "demo", 64, checkpointing=True),
    Setting("demo, offload", "demo", 64, offload=True),
    Setting("demo, accumulation 2", "demo", 64, accumulation=2),
    Setting("demo, global loss only", "demo", 64, overrides=_losses("global")),
    Setting("demo, cmli loss only", "demo", 64, overrides=_losses("cmli")),
    Setting("demo, torch backend", "demo", 64, overrides=_losses(*ALL, cmli_backend="torch")),
    Setting("demo, rank 0 of 2", "demo", 64, world=2),
    Setting("demo, rank 0 of 8", "demo", 64, world=8),
    Setting("demo, rank 0 of 64", "demo", 64, world=64),
    Setting("demo, rank 0 of 8, stage 3", "demo", 64, world=8, stage=3),
    Setting("paper, batch 16", "paper", 16),
    Setting("paper, batch 64, rank 0 of 2", "paper", 64, world=2),
    Setting("paper, batch 64, torch", "paper", 64, world=2, overrides=_losses(*ALL, cmli_backend="torch")),
    Setting("paper, batch 64, rank 0 of 8, stage 3", "paper", 64, world=8, stage=3, checkpointing=True),
    Setting("paper, rank 0 of 2, checkpointing, fp16", "paper", 256, world=2, precision="fp16", checkpointing=True),
]
