"""What the fork server of the null GPU's processes has imported: libraries alone, which leave the device alone."""

import os
import sys

# The CUDA build of PyTorch, before that of this environment.
sys.path[:0] = filter(None, os.environ["PYTHONPATH"].split(os.pathsep))
os.environ["DS_ACCELERATOR"] = "cuda"  # DeepSpeed would look for devices, which are those of the card until the end

import tests.preload  # noqa: E402, F401

del os.environ["DS_ACCELERATOR"]
