"""Runs that start from models of other libraries, and their exports."""

import json

import torch
from safetensors.torch import save_file

from ds_cmli.export.__main__ import command
from tests.drive_train import drive
from tests.make import pairs
from tests.models.dual_models import start

TEXTS = ["a red car", "two dogs,sitting under a tree"]


def run_of(source, folder, losses, trained=True, **student):
    """A run's folder as a training from the source leaves it, or as it begins."""
    objective, config, _ = start(source, losses, **student)
    if trained:
        for parameter in objective.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    folder.mkdir()
    save_file({name: x.contiguous() for name, x in objective.state_dict().items()}, folder / "student.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    return folder


def export(run, folder, *options):
    command.main([str(run), str(folder), *options], standalone_mode=False)
    return folder


def after_ten_steps(source, folder, losses):
    """The folder of a run of ten steps from the source."""
    given = ["--preset", "tiny", "--steps", "10", "--losses", ",".join(losses), "--set", "run.match_maps=0"]
    given += ["--data", pairs(folder.with_name("pairs"), 63)]
    assert drive([*given, "--start-from", str(source), "--output-dir", str(folder)]) == 0
    return folder
