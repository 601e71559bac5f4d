"""What the fork server of tests/fits has imported: torch, after the library that gives it a device."""

import gc

from ds_cmli.fits import guard

guard.load()

import torch._dynamo  # noqa: E402
import torch.fx.experimental.symbolic_shapes  # noqa: E402, F401

gc.freeze()
