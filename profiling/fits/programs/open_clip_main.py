"""CLIP by open_clip's own command on its synthetic data: open_clip_torch 3.3.0."""

import runpy
import sys

sys.argv[1:] = [
    "--dataset-type",
    "synthetic",
    "--train-num-samples",
    "256",
    "--batch-size",
    "32",
    "--model",
    "ViT-B-32",
    "--precision",
    "amp_bf16",
    "--workers",
    "0",
    "--epochs",
    "1",
    "--warmup",
    "10",
    "--save-frequency",
    "0",
    "--logs",
    "/tmp/fits-open-clip",
    "--report-to=",
    "--log-every-n-steps",
    "1",
]
runpy.run_module("open_clip_train.main", run_name="__main__")
