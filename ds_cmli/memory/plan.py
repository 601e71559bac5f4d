"""The plan of this project's training: `ds-cmli-memory plan`."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.fits import plan
from ds_cmli.fits.report import DEFAULT_GPU
from ds_cmli.memory.changes import CHECKPOINTING, MICRO_BATCH, OFFLOAD, ChangedSetting, zero_stage
from ds_cmli.memory.changes import Step as ConfiguredStep
from ds_cmli.memory.predict_subprocess import Predictor, Request

# Ends of the names of attention's layers: timm's and BERT's, with CLIP's text encoder, those of
# CLIP and SigLIP, open_clip's.
LORA = (
    {"image": ["qkv"], "text": ["query", "value"]},
    {"image": ["qkv"], "text": ["q_proj", "v_proj"]},
    {"image": ["q_proj", "v_proj"], "text": ["q_proj", "v_proj"]},
    {"image": ["in_proj"], "text": ["in_proj"]},
)
# Options of which the JSON of a line, or the plan itself, takes the place.
NOT_TRAINING = {
    *("--micro-batch", "--deepspeed_config"),
    *("--world-size", "--gpu", "--prices", "--write"),
}
WITHOUT_CHECKPOINTING = ChangedSetting("", json={"activation_checkpointing": None})
WITHOUT_OFFLOAD = ChangedSetting("", zero={"offload_optimizer": {"device": "none"}})
LONGEST_S = 86_400  # of a plan


@dataclass
class Planned:
    """A training whose settings are changed; what is predicted runs in processes of their own."""

    config: Config
    ds_config: DeepSpeedConfig  # as the user wrote it
    world_size: int
    names: list[str]  # of the GPUs
    words: list[str]  # of the command that starts it
    write_to: str  # the path of a changed JSON
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        _, micro_batch, times = self.ds_config.batch(self.config.optim.micro_batch, self.world_size)
        self.lora: Mapping[str, list[str]] = self.config.to_dict()["student"]["lora"]
        own = plan.Settings(
            self.ds_config.stage,
            self.ds_config.checkpointing,
            self.ds_config.offload("optimizer") != "none",
            bool(self.lora),
        )
        whole = self.config.optim.negatives == "global_batch"
        pairs = micro_batch * times**whole
        self.step = plan.Step(own, pairs, self.world_size, True, whole)
        self.reference = DEFAULT_GPU
        if len(self.names) == 1:
            (self.reference,) = self.names
        self.idle = SimpleQueue[Predictor]()
        for _ in range(plan.workers()):
            self.idle.put(Predictor(LONGEST_S))
        self.known: dict[tuple[plan.Settings, int, str], plan.Need] = {}
        self._find_lora()

    def changed(self, settings: plan.Settings, micro_batch: int) -> tuple[Config, DeepSpeedConfig]:
        """The configuration and the DeepSpeed JSON with the settings of a line."""
        own = self.step.own
        batch = {MICRO_BATCH: micro_batch, "train_batch_size": None}
        if self.step.accumulates:
            batch["gradient_accumulation_steps"] = self.step.pairs // micro_batch
        parts = [ChangedSetting("", json=dict(batch))]
        if settings.stage != own.stage:
            parts.append(zero_stage(settings.stage or 0))
        if settings.checkpointing != own.checkpointing:
            parts.append((WITHOUT_CHECKPOINTING, CHECKPOINTING)[bool(settings.checkpointing)])
        if settings.offload != own.offload:
            parts.append((WITHOUT_OFFLOAD, OFFLOAD)[bool(settings.offload)])
        if settings.lora != own.lora:
            lora = ({}, self.lora)[bool(settings.lora)]
            parts.append(ChangedSetting("", student={"lora": lora}))
        change = ConfiguredStep(self.config, self.ds_config, self.world_size, True).changed(parts)
        return change.config, change.ds_config

    def measure(self, settings: plan.Settings, micro_batch: int, gpu: str = "") -> plan.Need:
        """Predict a line, with the operators of `gpu`, or else of one GPU for all."""
        gpu = gpu or self.reference
        key = settings, micro_batch, gpu
        if key not in self.known:
            changed, predictor = self.changed(settings, micro_batch), self.idle.get()
            request = Request(*changed, self.world_size, rank=None, gpu=gpu, on=self.names)
            answer = predictor.ask(replace(request, limit=plan.size(gpu)))
            self.idle.put(predictor)
            if answer.report is None:
                raise UserError(answer.failed)
            self.known[key] = plan.Need(answer.report["totals"]["device"], answer.fits)
        return self.known[key]

    def start(self, settings: plan.Settings, micro_batch: int) -> str:
        config, ds_config = self.changed(settings, micro_batch)
        Path(self.write_to).write_text(json.dumps(ds_config.raw(), indent=2) + "\n")
        words = plan.deepspeed(self.world_size)
        words += [*self.words, "--deepspeed_config", self.write_to]
        if config.student.lora != self.config.student.lora:
            words += ["--set", f"student.lora={json.dumps(config.student.lora)}"]
        return shlex.join(words)

    def _find_lora(self) -> None:
        """Find the layers for LoRA where none are configured; without any, it is no axis."""
        own, reason = self.step.own, ""
        if own.lora:
            return
        self.tell("looking for the layers that LoRA can adapt")
        for self.lora in LORA:
            try:
                self.measure(replace(own, lora=True), self.step.pairs)
                return
            except UserError as error:
                reason = str(error)
        self.step = replace(self.step, own=replace(own, lora=None))
        print(f"without LoRA: {reason}")


def words() -> list[str]:
    """Return the program and the options of the command line that describe the training."""
    script = Path(__file__).parents[1] / "train.py"
    with suppress(ValueError):
        script = script.relative_to(Path.cwd())
    out, arguments = [str(script)], iter(sys.argv[1:])
    for word in arguments:
        if word.partition("=")[0] not in NOT_TRAINING:
            out.append(word)
        elif "=" not in word:
            next(arguments)  # its value
    return out
