"""Plan a run on this device, build its models and DeepSpeed's engine, and run training steps."""

from ds_cmli.engine.building import Models, build, build_models
from ds_cmli.engine.parameter_groups import counts_line, parameter_groups
from ds_cmli.engine.planning import (
    DTYPES,
    NO_GPU,
    Plan,
    choose_backend,
    filled,
    make_plan,
    on_this_device,
    try_out,
    with_backend,
)
from ds_cmli.engine.train_engine import TrainEngine
from ds_cmli.models.blocks import cannot_compile

__all__ = [
    "DTYPES",
    "NO_GPU",
    "Models",
    "Plan",
    "TrainEngine",
    "build",
    "build_models",
    "cannot_compile",
    "choose_backend",
    "counts_line",
    "filled",
    "make_plan",
    "on_this_device",
    "parameter_groups",
    "try_out",
    "with_backend",
]
