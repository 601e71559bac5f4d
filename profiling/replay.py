"""What happened in a GPU's memory, from a recorded history: `python profiling/replay.py snapshot.pickle`

Record one anywhere: `torch.cuda.memory._record_memory_history()`, train, `torch.cuda.memory._dump_snapshot(path)`.
Needs neither a GPU nor PyTorch.
"""

import sys

# Run by its path, this file's folder comes first on sys.path, where its own name would hide other modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import json  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402

from ds_cmli.common.cli import GroupedCommand, option, run_command  # noqa: E402
from ds_cmli.common.errors import UserError  # noqa: E402


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("snapshot", type=click.Path())
@option(
    "What if", "--limit", metavar="SIZE|GPU", help="The most to reserve: 24GB (10^9 bytes), 22GiB, or a GPU's name."
)
@option("What if", "--max-split-size-mb", type=click.IntRange(21), help="As in PYTORCH_ALLOC_CONF: MiB.")
@option("What if", "--roundup-power2-divisions", type=click.IntRange(2), help="As there: a power of two.")
@option("What if", "--garbage-collection-threshold", type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="As there: a share of --limit, which it needs.")  # fmt: skip
@option("Output", "--json", "as_json", is_flag=True, help="One object per device, a line each, instead of the text.")
def command(snapshot: str, limit: str | None, max_split_size_mb: int | None, roundup_power2_divisions: int | None,
            garbage_collection_threshold: float | None, as_json: bool) -> None:  # fmt: skip
    """Replay a recorded history of CUDA's allocator through its model, from wherever it begins."""
    from ds_cmli.memory import gpus, snapshot_file
    from ds_cmli.memory.allocator import Settings
    from ds_cmli.memory.history import Replayed, beginning, replay_history
    from ds_cmli.memory.what_if import what_if

    divisions = roundup_power2_divisions or 0
    if divisions & (divisions - 1):
        raise UserError(f"--roundup-power2-divisions is {divisions}: give a power of two")
    if garbage_collection_threshold and limit is None:
        raise UserError("--garbage-collection-threshold is a share of --limit: give one, as PyTorch's needs a fraction")
    room = None
    if limit is not None:
        room, gpu = gpus.parse_memory(limit, "--limit")
        room = gpus.find(gpu).usable if gpu else room
    settings = Settings((max_split_size_mb or 0) << 20 or None, divisions, garbage_collection_threshold or 0.0)
    asked = room is not None or settings != Settings()

    content = snapshot_file.read(snapshot)
    found: list[Replayed] = []
    refused: list[str] = []
    for device, trace in enumerate(content["device_traces"]):
        if not trace:
            continue
        try:
            found.append(replay_history(content, device))
        except UserError as error:
            refused.append(str(error))
            continue
        values: dict[str, Any] = dict(found[-1].to_dict())
        lines = [text(found[-1])]
        if asked:
            answer = what_if(beginning(content, device), trace, room, settings)
            values["what_if"] = answer.to_dict()
            lines.append(told(answer, room))
        elif not as_json:
            lines.append(smallest_card(beginning(content, device), trace))
        print(json.dumps(values) if as_json else "\n".join(lines))
    if refused or not found:
        raise UserError("; ".join(refused) or f"{snapshot!r} holds no history: switch recording on before training")


def told(answer: Any, limit: int | None) -> str:
    room = "" if limit is None else f" in {limit:,} B"
    if answer.fits:
        most = f"{answer.reserved_peak:,} B reserved at most, {answer.allocated_peak:,} B allocated"
        return f"  what if: it fits{room}: {most}"
    which = f"allocation {answer.failed_at + 1:,}" if answer.failed_at >= 0 else "what lived at the beginning"
    request = f" of {answer.failed_request:,} B" if answer.failed_request else ""
    return f"  what if: it does not fit{room}: {which}{request} fails, and {answer.too_much:,} B would have to go"


def smallest_card(start: Any, trace: list[dict[str, Any]]) -> str:
    from ds_cmli.memory.gpus import all_gpus
    from ds_cmli.memory.what_if import what_if

    for gpu in sorted(all_gpus().values(), key=lambda gpu: gpu.usable):
        if what_if(start, trace, gpu.usable).fits:
            return f"  the smallest GPU that it fits on, of those that are known: {gpu.name}"
    return "  it fits on none of the GPUs that are known"


def text(replayed: Any) -> str:
    lines = [
        f"device {replayed.device}: {replayed.allocations:,} allocations,"
        f" {replayed.at_recorded_address:,} of them replayed at their recorded address",
        f"  reserved at most {replayed.reserved_peak_recorded:,} B recorded,"
        f" {replayed.reserved_peak_replayed:,} B replayed; {replayed.allocated_peak:,} B of it allocated at most",
        f"  segments taken meanwhile: {len(replayed.segments_recorded)} recorded,"
        f" {len(replayed.segments_replayed)} replayed",
    ]
    if replayed.ambiguous:
        lines.append(f"  of {replayed.ambiguous} blocks from before, the exact size cannot be told")
    if replayed.unknown:
        lines.append(f"  {replayed.unknown} frees belong to nothing that the replay holds")
    if replayed.out_of_memory:
        lines.append(f"  {replayed.out_of_memory} requests were refused: out of memory")
    return "\n".join(lines)


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
