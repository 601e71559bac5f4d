"""Which settings may change when a run is resumed, and how differences of the others are reported."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ds_cmli.config.schema import FORMER, Config

# Settings of output, logging, evaluation, checkpoints and loading: no training step depends on them.
FREE = {
    *(
        "run.preset",
        "run.output_dir",
        "run.log_every",
        "run.eval_every",
        "run.save_every",
        "run.save_minutes",
    ),
    *("run.keep", "run.resume", "run.resume_with_changes", "run.most_skipped", "run.watchdog"),
    *("data.workers", "data.prefetch"),
    *("run.keep_best", "run.patience", "run.match_maps", "run.report_to"),
}
# What earlier versions did not note of their sources, and what cannot be compared with theirs.
NEWER = re.compile(r"sources\..*\.(bytes|missing|sizes|members|evaluated_on\..*)")
SHOWN = 20  # maximum number of differences in a message, as hundreds of data files may differ
# How the global batch is split over ranks. If the number of ranks changes, these change and the global batch does not.
BATCH_SPLIT = {"optim.micro_batch", "deepspeed.train_micro_batch_size_per_gpu"}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= flatten(item, f"{path}.{key}" if path else str(key))
    return out


def compared(
    config: Config, ds_config: Mapping[str, Any], data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings that must not change, as JSON values: `{"student.layers": 6, "deepspeed.gradient_clipping": 1.0}`.

    Args:
        data: `Data.fingerprint`, which identifies the data.
    """
    settings = flatten(
        {**config.to_dict(), "deepspeed": {k: v for k, v in ds_config.items() if k != "checkpoint"}}
    )
    settings |= flatten({"sources": dict(data)}) if data else {}
    return json.loads(
        json.dumps({name: value for name, value in settings.items() if name not in FREE})
    )


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any], same_ranks: bool) -> list[str]:
    """The differences as text: `["optim.lr: 0.001 -> 0.002", ...]`.

    A setting that is newer than the earlier run counts as its default, and one that has been renamed since then is
    compared under its new name. Without `same_ranks`, `BATCH_SPLIT` is ignored.
    """
    renamed = {
        f"{section}.{former}": f"{section}.{name}" for (section, former), name in FORMER.items()
    }
    before = {renamed.get(name, name): value for name, value in before.items()}
    known = {tuple(name.split(".")[:2]) for name in before}
    defaults = compared(Config(), {})
    before = {
        n: v for n, v in defaults.items() if n in now and tuple(n.split(".")[:2]) not in known
    } | before
    newer = set() if any(map(NEWER.fullmatch, before)) else set(filter(NEWER.fullmatch, now))
    names = sorted({*before, *now} - newer - (set() if same_ranks else BATCH_SPLIT))

    def show(settings: dict[str, Any], name: str) -> str:
        return json.dumps(settings[name]) if name in settings else "not set"

    found = [
        f"{n}: {show(before, n)} -> {show(now, n)}"
        for n in names
        if before.get(n, n) != now.get(n, n)
    ]
    return found if len(found) <= SHOWN else [*found[:SHOWN], f"{len(found) - SHOWN} more"]
