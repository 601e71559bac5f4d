"""The settings that a resumed run must have kept, and which of them have changed."""

import json
from collections.abc import Iterator

from ds_cmli.config.messages import words
from ds_cmli.config.schema import Config
from ds_cmli.files import JsonObject, Section

# Settings of `data` and keys of the DeepSpeed JSON on which no step depends.
FREE_DATA = {"workers", "max_bad_share", "cache", "cache_gb"}
FREE_KEYS = words("""
    checkpoint comms_logger csv_monitor dump_state flops_profiler log_level memory_breakdown
    steps_per_print tensorboard timers wall_clock_breakdown wandb
""")
# Settings of `run` on which steps do depend.
RUN_SETTINGS = ("seed", "compile", "deterministic")


def settings_to_keep(config: Config, ds_config: Section, data: Section | None = None) -> JsonObject:
    """Return the settings that must not change, as JSON values; `data` is `Data.fingerprint`."""
    sections = {
        **config.to_dict(),
        "run": {name: getattr(config.run, name) for name in RUN_SETTINGS},
        "data": {key: value for key, value in vars(config.data).items() if key not in FREE_DATA},
        "deepspeed": {key: value for key, value in ds_config.items() if key not in FREE_KEYS},
        "sources": data or {},
    }
    return json.loads(json.dumps(sections))


def setting_changes(saved: Section, current: Section, path: str = "") -> Iterator[str]:
    """Yield a line for each change, as "optim.lr: 0.001 -> 0.002"."""
    for key in sorted({*saved, *current}):
        old = saved.get(key)
        new = current.get(key)
        if path == "sources." and isinstance(old, dict) and isinstance(new, dict):
            # An earlier version of the program recorded less of the data.
            new = {name: value for name, value in new.items() if name in old}
        if isinstance(old, dict) and isinstance(new, dict):
            yield from setting_changes(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{path}{key}: {json.dumps(old)} -> {json.dumps(new)}"
