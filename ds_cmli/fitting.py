"""`ds_cmli.fit`: the training of `train.py` from a script or a notebook."""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import DEFAULT_JSON
from ds_cmli.config.presets import load_preset, merged
from ds_cmli.config.schema import Config, RunConfig, check_sections
from ds_cmli.distributed import map_launcher_environment
from ds_cmli.faults import preemption
from ds_cmli.files import Section
from ds_cmli.libraries import silence
from ds_cmli.train import train

if TYPE_CHECKING:  # it imports torch, before which a start sets variables
    from ds_cmli.inference import Model


@dataclass(frozen=True)
class Fitted:
    """A run that has ended."""

    folder: Path  # as of `--output-dir`, the same on every rank

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Return the last value of each column, such as "eval/seen/combined/i2t_r1"."""
        last: dict[str, float] = {}
        for line in (self.folder / "metrics.jsonl").read_bytes().splitlines():
            last |= json.loads(line)
        return last

    @cached_property
    def model(self) -> "Model":
        """Return the trained student, on a GPU if there is one."""
        from ds_cmli.inference import Model

        return Model.load(self.folder)


def fit(
    config: str | Mapping[str, Section] | Config = RunConfig.preset,
    data: str | Path | Sequence[str | Path] | None = None,
    deepspeed_config: str | Path | Section = DEFAULT_JSON,
    resume: str = "auto",
    on_log: Callable[[int, dict[str, Any]], object] | None = None,
) -> Fitted:
    """Train as the command does, to the bit, in this process. Collective.

    It prints the command's lines. A launcher's ranks, as of torchrun, all call it; without one it
    is one process, which no watchdog ends. The environment is as before afterwards.

    Args:
        config: a preset's name; sections of settings that change the preset `run.preset`, as
            {"optim": {"steps": 100}}; or a whole configuration.
        data: what --data takes, or several of it; None: the configuration's.
        deepspeed_config: DeepSpeed's JSON, as a file or its content.
        resume: as --resume; "auto" goes on from the run in `run.output_dir`.
        on_log: called on rank 0 with the step and the columns of each line of `metrics.jsonl`.

    Raises:
        UserError: a mistake that the user can correct, on every rank.
        Preempted: the run has saved after a signal, as the command does.
    """
    if isinstance(config, str):
        config = {"run": {"preset": config}}
    sections = config.to_dict() if isinstance(config, Config) else config
    check_sections(sections)
    if data is not None:
        names = [str(data)] if isinstance(data, str | Path) else [str(name) for name in data]
        sections = merged(sections, {"data": {"source": names if len(names) > 1 else names[0]}})
    is_whole = isinstance(config, Config)
    resolved = Config.from_dict(sections) if is_whole else load_preset(None, sections)
    with mock.patch.dict(os.environ), warnings.catch_warnings():
        map_launcher_environment()
        silence()
        if isinstance(deepspeed_config, Mapping):
            ds_config = DeepSpeedConfig.of(deepspeed_config)
        else:
            ds_config = DeepSpeedConfig.load(deepspeed_config)
        exit_code, folder = train(resolved, ds_config, resume, on_log=on_log, keeps_process=True)
    if exit_code == preemption.EXIT_CODE:
        raise preemption.Preempted(f"call fit again with run.output_dir {folder} to go on")
    return Fitted(folder)
