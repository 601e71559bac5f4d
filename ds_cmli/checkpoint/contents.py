"""`--resume-report`: what a run's folder holds, and how a start would go on from it."""

from datetime import datetime
from pathlib import Path

from ds_cmli.checkpoint import restore
from ds_cmli.checkpoint import save as checkpoint
from ds_cmli.checkpoint.train_state import TrainState, read_shared
from ds_cmli.common import checksums
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import read
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import Plan


def held(folder: Path) -> list[str]:
    """The lines on a run's folder: each checkpoint, verified, the best result, and the weights.

    Collective; rank 0 alone gets them.
    """
    root = folder / checkpoint.FOLDER
    names = distributed.broadcast_object(checkpoint.names(root))  # collective
    problems = {name: restore.problem(root / name) for name in names}  # collectives
    if not distributed.is_main():
        return []
    if not (folder / "config.json").is_file():
        return [f"{folder} holds no run"]
    lines, latest = [_made_by(folder)], checkpoint.latest(root)
    for name, problem in problems.items():
        mark = " (latest)" if name == latest else ""
        found = _of_checkpoint(root / name) if problem is None else f"damaged: {problem}"
        lines.append(f"  {checkpoint.FOLDER}/{name}{mark}: {found}")
    if not problems:
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
        content = read(path, dict)
        checksums.verify(content)
        preset, revision = content["config"]["run"]["preset"], content.get("revision")
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder}: a run whose config.json cannot be read"
    return f"{folder}: preset {preset}, started {date:%Y-%m-%d %H:%M}, revision {revision}"


def _of_checkpoint(path: Path) -> str:
    """What a verified checkpoint is."""
    try:
        state = read_shared(path)
    except UserError as error:
        return str(error)
    size = sum(file.stat().st_size for file in path.iterdir())
    stage = state.config.get("deepspeed.zero_optimization.stage", 0)
    by = f"{_ranks(state.world_size)} at ZeRO stage {stage}"
    line = f"whole, {size / 1e6:.1f} MB, written by {by}"
    if state.best:
        line += ", best {metric} {value:.3f} at step {step}".format_map(state.best)
    return line


def going_on(fresh: bool, state: TrainState, plan: Plan) -> str:
    """How training would start, or go on from a checkpoint."""
    pairs, ranks = plan.deepspeed.train_batch, _ranks(distributed.world_size())
    first = f"step {state.step + 1}" if state.evaluated else f"the evaluation of step {state.step}"
    how = "would start" if fresh else "would go on"
    return f"{how} with {first} of {plan.total_steps}, {pairs} pairs a step on {ranks}"


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
