"""Plans a run on this device, builds student, teacher, losses and DeepSpeed's engine, and runs training steps."""

from ds_cmli.engine.building import DTYPES, Models, build, build_models
from ds_cmli.engine.parameter_groups import counts_line, parameter_groups
from ds_cmli.engine.planning import filled, on_this_device, plan, try_out, with_backend
from ds_cmli.engine.train_engine import TrainEngine
from ds_cmli.models.blocks import cannot_compile

__all__ = [
    "DTYPES",
    "Models",
    "TrainEngine",
    "build",
    "build_models",
    "cannot_compile",
    "counts_line",
    "filled",
    "on_this_device",
    "parameter_groups",
    "plan",
    "try_out",
    "with_backend",
]
