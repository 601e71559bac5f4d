"""The settings whose memory is predicted and measured: presets, batches, ZeRO stages, ranks, precisions.

All have random weights and made-up batches: nothing is downloaded. `python -m tests.gpu.settings JSON` takes a
setting's step on the GPU here, and its last line has the peaks. It needs a process of its own, because peaks are those
since the process began.
"""

import copy
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds_cmli.config.presets import load_preset
from ds_cmli.memory.step_memory import Step, peak_totals
from tests.models.sources import clip


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
    clip: bool = False  # a small CLIP is its student

    def step(self) -> Step:
        overrides = copy.deepcopy(self.overrides)
        overrides.setdefault("optim", {})["micro_batch"] = self.batch
        if self.clip:
            overrides["student"] = {"source": str(clip(Path(tempfile.mkdtemp())))}
        else:
            overrides.setdefault("student", {}).update(image_weights="random", text_weights="random")
            overrides.setdefault("teacher", {})["weights"] = "random"
            overrides.setdefault("data", {})["tokenizer"] = "builtin"
        sizes = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
        zero: dict[str, Any] = {"stage": self.stage, "contiguous_gradients": True, "overlap_comm": True, **sizes}
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
        return Step(load_preset(self.preset, overrides), ds_config, self.world)

    def arguments(self) -> list[str]:
        """Return the module and options of Python that measure it."""
        return ["tests.gpu.settings", json.dumps(asdict(self))]


TORCH = {"loss": {"weights": {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}, "cmli_backend": "torch"}}
DETERMINISTIC = {"run": {"deterministic": True}, "data": {"image_size": 518}}
CONVOLUTIONS = {"student": {"image_model": "resnet18", "image_overrides": {}}, "data": {"image_size": 224}}
SETTINGS = [
    Setting("tiny", "tiny", 8, precision="fp32"),
    Setting("demo", "demo", 64),
    Setting("demo, fp32", "demo", 64, precision="fp32"),
    Setting("demo, fp16", "demo", 64, precision="fp16"),
    Setting("demo, checkpointing", "demo", 64, checkpointing=True),
    Setting("demo, offload", "demo", 64, offload=True),
    Setting("demo, accumulation 2", "demo", 64, accumulation=2),
    Setting("demo, rank 0 of 64", "demo", 64, world=64),
    Setting("demo, rank 0 of 8, stage 3", "demo", 64, world=8, stage=3),
    Setting("demo, 518 px, deterministic", "demo", 8, overrides=DETERMINISTIC),
    Setting("demo, convolutional image encoder", "demo", 32, overrides=CONVOLUTIONS),
    Setting("demo, EMA", "demo", 64, overrides={"optim": {"ema_decay": 0.99}}),
    Setting("demo, LoRA", "demo", 64, overrides={"student": {"lora": {"image": ["qkv"]}}}),
    Setting("a small CLIP", "tiny", 32, overrides={"loss": {"weights": {"global": 1.0, "cmli": 1.0}}}, clip=True),
    Setting("paper, batch 16", "paper", 16),
    Setting("paper, batch 64, torch", "paper", 64, world=2, overrides=TORCH),
    Setting("paper, batch 64, rank 0 of 8, stage 3", "paper", 64, world=8, stage=3, checkpointing=True),
    Setting("paper, rank 0 of 2, checkpointing, fp16", "paper", 256, world=2, precision="fp16", checkpointing=True),
]


def main(setting: str) -> None:
    Setting(**json.loads(setting)).step().take_twice()
    device = torch.device("cuda", torch.cuda.current_device())
    print("\n" + json.dumps(peak_totals(device)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
