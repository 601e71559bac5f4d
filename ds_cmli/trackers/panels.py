"""How a run appears in a tracker.

The names of its scalars, its configuration, and a table of settings and results.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.tensorboard.summary import hparams

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

Value = bool | int | float | str

SPEED = ("pairs_per_s", "tflops", "mfu", "checkpoint_s")
RESULTS = ("retrieval/", "pointing-game/")  # groups of held-out metrics
OPTIMIZER = (
    "lr",
    "grad_norm",
    "loss_scale",
    "skipped_steps",
    "ignored_negatives",
    "added_positives",
)


def tag(name: str) -> str:
    """Name a column of metrics.jsonl for a tracker. The part before "/" is its group there."""
    group, _, rest = name.partition("/")
    if group == "eval":
        split, _, metric = rest.partition("/")
        if "pointing" in metric:
            return f"pointing-game/{split}"
        return f"retrieval/{split}/{metric}"
    if name == "loss":
        return "loss/total"
    if name in SPEED or group == "time":
        return f"speed/{name}"
    if "memory" in name:
        return f"memory/{name}"
    return f"optimizer/{name}" if name in OPTIMIZER else name


def configuration(folder: Path) -> str:
    """The run's `config.json` and, if there is one, its `memory.json`, as Markdown."""
    parts = []
    for name in ("config.json", "memory.json"):
        if (folder / name).is_file():
            text = json.dumps(json.loads((folder / name).read_text()), indent=2)
            parts.append(f"## {name}\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    return "\n\n".join(parts)


def settings(folder: Path) -> dict[str, Value]:
    """The run's settings that are a number, string or boolean, its losses and its ZeRO stage."""
    content = json.loads((folder / "config.json").read_text())
    sections = content["config"]
    out: dict[str, Value] = {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
        if isinstance(value, bool | int | float | str)
    }
    out["losses"] = ",".join(sections["loss"]["weights"])
    out["ZeRO stage"] = content.get("deepspeed", {}).get("zero_optimization", {}).get("stage", 0)
    return out


def settings_and_results(folder: Path, results: Mapping[str, float]) -> "tuple[Summary, ...]":
    """The summaries of an entry in TensorBoard's HParams panel: settings and last results."""
    return hparams(settings(folder), dict(results))
