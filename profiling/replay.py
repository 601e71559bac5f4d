"""What happened in a GPU's memory, from a recorded history: `python profiling/replay.py snapshot.pickle`

Record one anywhere: `torch.cuda.memory._record_memory_history()`, train, `torch.cuda.memory._dump_snapshot(path)`.
Needs neither a GPU nor PyTorch.
"""

import sys

# Run by its path, this file's folder comes first on sys.path, where its own name would hide other modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import json  # noqa: E402

import click  # noqa: E402

from ds_cmli.common.cli import GroupedCommand, option, run_command  # noqa: E402
from ds_cmli.common.errors import UserError  # noqa: E402


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("snapshot", type=click.Path())
@option("Output", "--json", "as_json", is_flag=True, help="One object per device, a line each, instead of the text.")
def command(snapshot: str, as_json: bool) -> None:
    """Replay a recorded history of CUDA's allocator through its model, from wherever it begins."""
    from ds_cmli.memory import snapshot_file
    from ds_cmli.memory.history import Replayed, replay_history

    content = snapshot_file.read(snapshot)
    found: list[Replayed] = []
    refused: list[str] = []
    for device, trace in enumerate(content["device_traces"]):
        if trace:
            try:
                found.append(replay_history(content, device))
            except UserError as error:
                refused.append(str(error))
    for replayed in found:
        print(json.dumps(replayed.to_dict()) if as_json else text(replayed))
    if refused or not found:
        raise UserError("; ".join(refused) or f"{snapshot!r} holds no history: switch recording on before training")


def text(replayed) -> str:
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
