"""Build student, teacher, losses and DeepSpeed's engine from a configuration.

Training, profiling and prediction all begin here.
"""

import copy
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ds_cmli import scopes
from ds_cmli.cmli import exchange
from ds_cmli.commands import print_line
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import LOSSES
from ds_cmli.config.schema import Config, StudentConfig
from ds_cmli.config.source import ModelSource
from ds_cmli.data import assets
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine.blocks import (
    cast_buffers,
    checkpoint_blocks,
    compile_blocks,
    external_parameters,
)
from ds_cmli.engine.ema import EMA
from ds_cmli.engine.parameter_groups import freeze, group_parameters
from ds_cmli.engine.plan import DTYPES, uses_gradient_caching
from ds_cmli.engine.train_engine import TrainEngine
from ds_cmli.errors import blame
from ds_cmli.faults import nonfinite
from ds_cmli.hardware import keep_freed_memory, one_attention_on_all_gpus
from ds_cmli.losses.objective import Objective
from ds_cmli.models.adapters import add_adapters
from ds_cmli.models.hf import WEIGHTS, load_model
from ds_cmli.models.student import Student, Teacher

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Keys of the DeepSpeed JSON that ask for lines of its log.
LOGS = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level")


def build_models(
    config: Config, vocab_size: int, pad_id: int = 0
) -> tuple[Objective, Teacher | None]:
    """Build the student with its losses, and the teacher if a loss needs it.

    They are on the CPU, in fp32, equal on every rank. `pad_id` is the tokenizer's.
    """
    settings = config.student
    teacher_settings = config.teacher
    if settings.image_weights == "demo":
        settings = replace(settings, image_weights=str(assets.fetch("vit") / assets.WEIGHTS))
    if settings.text_weights == "demo":
        settings = replace(settings, text_weights=str(assets.fetch("minilm")))
    source = ModelSource(settings.source)
    source_model = None
    teacher = None
    if source.name and source.is_ds_cmli:
        source_model = load_model(source.local_folder, source.weights or WEIGHTS, "student.source")
    torch.manual_seed(config.run.seed)
    sizes = config.data.image_size, vocab_size, config.data.context_length
    student = Student(settings, *sizes, source_model is None, pad_id)
    if any(LOSSES[name].teacher for name in config.loss.weights):
        if teacher_settings.weights == "demo":
            weights = str(assets.fetch("vit") / assets.WEIGHTS)
            teacher_settings = replace(teacher_settings, weights=weights)
        teacher = Teacher(teacher_settings, config.data.image_size, student.grid)
    objective = Objective(student, config.loss, teacher.width if teacher else None)
    if source_model is not None:
        student.load_state_dict(source_model.student.state_dict())
        # `strict=False` loads the losses that both have.
        objective.losses.load_state_dict(source_model.losses.state_dict(), strict=False)
    add_adapters(student, settings)
    freeze(objective, settings)
    return objective, teacher


def starting_line(settings: StudentConfig, objective: Objective, image_size: int) -> str:
    """Return the line that says what a student with a source starts from."""
    student = objective.student
    architecture = settings.source_config.get("model_type", "a run of this package")
    layers = f"{len(student.image.blocks)} + {len(student.text.blocks)} layers"
    line = f"starts from {settings.source}: {architecture}, {layers}, {image_size} px"
    temperatures = [1 / scale for scale in objective.scales().values() if scale]
    if temperatures:
        line += f", temperature {temperatures[0]:.3f}"
    if student.start is not None and student.start.resampled:
        line += f"; positions: {student.start.resampled}"
    return line


def build(
    config: Config,
    ds_config: DeepSpeedConfig,
    vocab_size: int,
    total_steps: int,
    device: torch.device,
    pad_id: int = 0,
) -> TrainEngine:
    """Build the engine around student and losses, ready to train. Collective.

    `ds_config` is the JSON after `adapt_to_device` and `filled`; `total_steps` are the optimizer
    steps of the whole run. Raises `UserError` for what DeepSpeed refuses.
    """
    import deepspeed

    if device.type == "cpu":
        # It would compile collectives, for minutes at the first start.
        deepspeed.ops.__compatible_ops__ = {}
        keep_freed_memory()
    one_attention_on_all_gpus()
    show_log_of_deepspeed(ds_config)
    deepspeed.init_distributed(verbose=False)
    exchange.exchanging = partial(scopes.scope, "exchange")

    # --- student, losses, teacher
    dtype = DTYPES[ds_config.precision]
    objective, teacher = build_models(config, vocab_size, pad_id=pad_id)
    student = objective.student
    if config.student.source:
        print_line(starting_line(config.student, objective, config.data.image_size))
    torch.manual_seed(config.run.seed + distributed.rank())  # dropout differs between ranks
    wrap_blocks(config, ds_config, student, teacher)
    frozen = {}  # before DeepSpeed casts them
    if distributed.is_main():
        for name, parameter in objective.named_parameters():
            if not parameter.requires_grad:
                frozen[name] = parameter.detach().clone()
    cast_buffers(student.image, dtype)

    # --- DeepSpeed
    params = ds_config["optimizer"]["params"]
    lr = params["lr"]
    groups: Any = group_parameters(objective, params.get("weight_decay", 0.0), config.optim, lr)
    lr_factor = groups[0].get("lr", lr) / lr  # computed before the optimizer changes the groups
    scheduler: Any = None  # DeepSpeed makes the JSON's
    if "scheduler" not in ds_config:
        scheduler = partial(
            torch.optim.lr_scheduler.LambdaLR,
            lr_lambda=lambda done: config.optim.rate(done + 1, total_steps),
        )
    content = copy.deepcopy(dict(ds_config))
    if not content.get("steps_per_print"):
        # The timer whose lines it would print waits for the GPU twice a micro-batch.
        throughput = content.setdefault("timers", {}).setdefault("throughput", {})
        throughput.setdefault("enabled", False)
    with blame("DeepSpeed refuses the configuration"):
        engine, *_ = deepspeed.initialize(
            model=objective, model_parameters=groups, config=content, lr_scheduler=scheduler
        )
    if ds_config.stage == 3:
        # ZeRO-3 must be told of parameters that are read outside of their own module.
        for encoder in (student.image, student.text):
            for module, parameter in external_parameters(encoder):
                deepspeed.zero.register_external_parameter(module, parameter)
    nonfinite.count_at_lowest_scale(engine.optimizer)
    if teacher is not None:
        teacher.to(device=device, dtype=dtype)
    return TrainEngine(
        engine=engine,
        objective=objective,
        teacher=teacher,
        device=device,
        dtype=dtype,
        frozen=frozen,
        lr_factor=lr_factor,
        accumulation=ds_config["gradient_accumulation_steps"],
        caching=uses_gradient_caching(config, ds_config),
        ema=EMA(engine, config.optim.ema_decay) if config.optim.ema_decay else None,
    )


def show_log_of_deepspeed(ds_config: DeepSpeedConfig) -> None:
    """Let DeepSpeed's lines through if the JSON asks for any of its logs."""
    logs_collectives = ds_config.get("comms_logger", {}).get("enabled", False)
    if logs_collectives or any(ds_config.get(name) for name in LOGS):
        logger = logging.getLogger("DeepSpeed")
        logger.filters.clear()  # which `silence` has added
        if ds_config.get("log_level") is None:
            logger.setLevel(logging.INFO)
            for handler in logger.handlers:
                handler.setLevel(logging.INFO)


def wrap_blocks(
    config: Config, ds_config: DeepSpeedConfig, student: Student, teacher: Teacher | None
) -> None:
    """Compile and recompute the blocks of the models, as the settings and the JSON say."""
    if config.run.compile != "off":  # inside checkpointing, which recomputes with compiled code
        compile_blocks(student.image.blocks + student.text.blocks, ds_config.stage)
        if ds_config.stage < 3:  # whose leaf modules must be called once in a step
            compile_blocks([*student.shared])
        if teacher is not None:
            compile_blocks(teacher.image.blocks)
    if "activation_checkpointing" in ds_config:
        checkpoint_blocks(student.blocks)


def release(engine: "DeepSpeedEngine") -> None:
    """End an engine and all that it holds, which its hooks otherwise keep in this process."""
    optimizer = engine.optimizer
    offload = getattr(optimizer, "parameter_offload", optimizer)
    parameters = list(engine.module.parameters())
    engine.destroy()
    # Under ZeRO-3, attributes of the parameters still refer to the rest.
    for part in (*parameters, offload, optimizer, engine):
        vars(part).clear()
