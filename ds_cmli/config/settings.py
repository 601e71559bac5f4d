"""Which settings may change when a run is resumed, and how other differences are reported."""

import json

from ds_cmli.common.json_text import JsonObject, Section
from ds_cmli.config.schema import Config

# Settings of output, logging, evaluation, checkpoints and loading: no training step depends on
# them.
FREE = {
    "run.preset",
    "run.output_dir",
    "run.log_every",
    "run.eval_every",
    "run.eval_batch",
    "loss.cmli_scratch_bytes",
    "run.save_every",
    "run.save_minutes",
    "run.keep",
    "run.resume",
    "run.resume_with_changes",
    "run.most_skipped",
    "run.watchdog",
    "run.keep_best",
    "run.patience",
    "run.match_maps",
    "run.report_to",
    "data.workers",
    "data.prefetch",
}
# Likewise keys of the DeepSpeed JSON.
FREE_KEYS = {
    "checkpoint",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
}
SHOWN = 20  # maximum number of differences in a message, as hundreds of data files may differ
# How the global batch is split over ranks. If the number of ranks changes, these change and the
# global batch does not.
BATCH_SPLIT = {"optim.micro_batch", "deepspeed.train_micro_batch_size_per_gpu"}


def flatten(value: object, path: str = "") -> JsonObject:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    out: JsonObject = {}
    for key, item in value.items():
        out |= flatten(item, f"{path}.{key}" if path else str(key))
    return out


def compared(config: Config, ds_config: Section, data: Section | None = None) -> JsonObject:
    """The settings that must not change, as JSON values.

    For instance `{"student.layers": 6, "deepspeed.gradient_clipping": 1.0}`.

    Args:
        data: `Data.fingerprint`, which identifies the data.
    """
    deepspeed = {key: value for key, value in ds_config.items() if key not in FREE_KEYS}
    settings = flatten({**config.to_dict(), "deepspeed": deepspeed})
    if data:
        settings |= flatten({"sources": dict(data)})
    for name in FREE:
        settings.pop(name, None)
    return json.loads(json.dumps(settings))


def differences(before: JsonObject, now: JsonObject, same_ranks: bool) -> list[str]:
    """The differences as text: `["optim.lr: 0.001 -> 0.002", ...]`.

    Without `same_ranks`, `BATCH_SPLIT` is ignored.
    """
    names = {*before, *now}
    if not same_ranks:
        names -= BATCH_SPLIT
    lines = []
    for name in sorted(names):
        if before.get(name, name) != now.get(name, name):
            lines.append(f"{name}: {_value(before, name)} -> {_value(now, name)}")
    if len(lines) <= SHOWN:
        return lines
    return [*lines[:SHOWN], f"{len(lines) - SHOWN} more"]


def _value(settings: JsonObject, name: str) -> str:
    if name in settings:
        return json.dumps(settings[name])
    return "not set"
