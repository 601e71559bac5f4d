"""What the fork server of tests/processes.py has imported, for all the processes that it forks: libraries alone."""

import gc
import sys

sys.modules["mlflow"] = None  # type: ignore[assignment] # DeepSpeed would import it, which takes seconds

import deepspeed  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
import transformers  # noqa: E402, F401
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: E402, F401

del sys.modules["mlflow"]
gc.freeze()  # and what is forked shares it
