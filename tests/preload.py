"""What the fork server of tests/processes.py has imported, for all the processes that it forks: libraries alone."""

import gc
import inspect
import sys

sys.modules["mlflow"] = None  # type: ignore[assignment] # DeepSpeed would import it, which takes seconds

import accelerate  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
import pytest  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.bert.modeling_bert  # noqa: E402, F401 # with what transformers imports when it is used
from deepspeed.module_inject import auto_ep_config  # noqa: E402, F401
from deepspeed.ops import op_builder  # noqa: E402, F401
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: E402, F401
from PIL import Image  # noqa: E402

Image.init()  # the formats of pictures
# A table of all modules, for those who ask where a function is from; a code of no file looks through all.
inspect.getmodule(compile("", "<none>", "exec"))
del sys.modules["mlflow"]
gc.freeze()  # and what is forked shares it
