"""How a run appears in TensorBoard: scalars in groups, its configuration, and its settings beside its results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

SPEED = ("pairs_per_s", "tflops", "mfu", "checkpoint_s")
OPTIMIZER = ("lr", "grad_norm", "loss_scale", "skipped_steps", "ignored_negatives")


def tag(name: str) -> str:
    """The scalar's name in TensorBoard, whose first part is its group."""
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
    """The run's `config.json`, and its predicted and measured memory where it has that, as Markdown."""
    parts = []
    for name in ("config.json", "memory.json"):
        if (folder / name).is_file():
            text = json.dumps(json.loads((folder / name).read_text()), indent=2)
            parts.append(f"## {name}\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    return "\n\n".join(parts)


def settings_and_results(writer: SummaryWriter, folder: Path, results: Mapping[str, float]) -> None:
    """An entry of the HParams panel: every setting that is a number or a word, and the last held-out results."""
    content = json.loads((folder / "config.json").read_text())
    sections = content["config"]
    settings: dict[str, Any] = {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
        if isinstance(value, bool | int | float | str)
    }
    settings["losses"] = ",".join(sections["loss"]["weights"])
    settings["ZeRO stage"] = content.get("deepspeed", {}).get("zero_optimization", {}).get("stage", 0)
    for summary in hparams(settings, dict(results)):
        writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
