"""Plan a run on this device, build its models and DeepSpeed's engine, and run training steps."""

from ds_cmli.engine.build import Models, build, build_models, release
from ds_cmli.engine.parameter_groups import counts_line, parameter_groups
from ds_cmli.engine.plan import (
    DTYPES,
    choose_backend,
    make_plan,
    on_this_device,
    with_backend,
)
from ds_cmli.engine.train_engine import TrainEngine
