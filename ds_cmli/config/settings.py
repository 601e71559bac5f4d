"""Which settings may change when a run is resumed, and how other differences are reported."""

import hashlib
import json
import re

from ds_cmli.common.json_text import JsonObject, Section
from ds_cmli.config.schema import FORMER, Config

# Settings of output, logging, evaluation, checkpoints and loading: no training step depends on
# them.
FREE = {
    "run.preset",
    "run.output_dir",
    "run.log_every",
    "run.eval_every",
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
# What earlier versions did not note of their sources, and what cannot be compared with theirs.
NEWER = re.compile(r"sources\..*\.(bytes|missing|sizes|members|sampled|evaluated_on\..*)")
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
    deepspeed = {key: value for key, value in ds_config.items() if key != "checkpoint"}
    settings = flatten({**config.to_dict(), "deepspeed": deepspeed})
    if data:
        settings |= flatten({"sources": dict(data)})
    for name in FREE:
        settings.pop(name, None)
    return json.loads(json.dumps(settings))


def digest(settings: JsonObject) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(before: JsonObject, now: JsonObject, same_ranks: bool) -> list[str]:
    """The differences as text: `["optim.lr: 0.001 -> 0.002", ...]`.

    A setting that is newer than the earlier run counts as its default, and one that has been
    renamed since then is compared under its new name. Without `same_ranks`, `BATCH_SPLIT` is
    ignored.
    """
    before = _with_defaults(_renamed(before), now)
    names = {*before, *now}
    names -= {name for name in now if NEWER.fullmatch(name) and name not in before}
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


def _renamed(settings: JsonObject) -> JsonObject:
    out = dict(settings)
    for (section, former), name in FORMER.items():
        if f"{section}.{former}" in out:
            out[f"{section}.{name}"] = out.pop(f"{section}.{former}")
    return out


def _with_defaults(before: JsonObject, now: JsonObject) -> JsonObject:
    """Add the defaults of settings that are newer than the earlier run."""
    known = {tuple(name.split(".")[:2]) for name in before}
    out = dict(before)
    for name, value in compared(Config(), {}).items():
        if name in now and tuple(name.split(".")[:2]) not in known:
            out[name] = value
    return out
