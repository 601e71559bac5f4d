"""Plan a run on this device, build its models and DeepSpeed's engine, and run training steps."""

from ds_cmli.engine.build import build, build_models, release
from ds_cmli.engine.parameter_groups import counts_line, group_parameters
from ds_cmli.engine.plan import DTYPES, adapt_to_device, choose_backend, make_plan, resolve_backend
from ds_cmli.engine.train_engine import TrainEngine
