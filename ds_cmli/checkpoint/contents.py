"""`--resume-report`: what a run's folder holds, and how a start would go on from it."""

import json
from datetime import datetime
from pathlib import Path

from ds_cmli.checkpoint import files
from ds_cmli.checkpoint import save as checkpoint
from ds_cmli.checkpoint.train_state import TrainState, read_shared
from ds_cmli.common.errors import UserError
from ds_cmli.distributed.process_group import world_size
from ds_cmli.engine import Plan


def held(folder: Path) -> list[str]:
    """The lines on a run's folder: each checkpoint, verified, the best result, and the weights."""
    if not (folder / "config.json").is_file():
        return [f"{folder} holds no run"]
    root, lines = folder / checkpoint.FOLDER, [_made_by(folder)]
    latest = checkpoint.latest(root)
    for name in checkpoint.names(root):
        mark = " (latest)" if name == latest else ""
        lines.append(f"  {checkpoint.FOLDER}/{name}{mark}: {_of_checkpoint(root / name)}")
    if len(lines) == 1:
        lines.append("  no checkpoint")
    if (folder / checkpoint.REPLACED).is_dir():
        lines.append(f"  {checkpoint.REPLACED}/: the run before, until this one has a checkpoint")
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    lines.append(f"  weights: {', '.join(weights) or 'none'}")
    return lines


def _made_by(folder: Path) -> str:
    """What the run's config.json says of its last start."""
    path = folder / "config.json"
    date = datetime.fromtimestamp(path.stat().st_mtime)
    try:
        content = json.loads(path.read_text())
        preset, revision = content["config"]["run"]["preset"], content.get("revision")
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder}: a run whose config.json cannot be read"
    return f"{folder}: preset {preset}, started {date:%Y-%m-%d %H:%M}, revision {revision}"


def _of_checkpoint(path: Path) -> str:
    problem = files.problem(path)
    if problem is not None:
        return f"damaged: {problem}"
    try:
        state = read_shared(path)
    except UserError as error:
        return str(error)
    size = sum(file.stat().st_size for file in path.iterdir())
    stage = state.config.get("deepspeed.zero_optimization.stage", 0)
    ranks = f"{state.world_size} rank{'s' * (state.world_size > 1)}"
    line = f"whole, {size / 1e6:.1f} MB, written by {ranks} at ZeRO stage {stage}"
    if state.best:
        best = state.best
        line += f", best {best['metric']} {best['value']:.3f} at step {best['step']}"
    return line


def going_on(fresh: bool, state: TrainState, plan: Plan) -> str:
    """How training would start, or go on from a checkpoint."""
    pairs = plan.deepspeed.train_batch
    where = f"{pairs} pairs a step on {world_size()} rank{'s' * (world_size() > 1)}"
    first = f"step {state.step + 1}" if state.evaluated else f"the evaluation of step {state.step}"
    how = "would start" if fresh else "would go on"
    return f"{how} with {first} of {plan.total_steps}, {where}"
