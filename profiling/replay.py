"""What happened in a GPU's memory, from a recorded history:

`python profiling/replay.py snapshot.pickle`

Record one anywhere: `torch.cuda.memory._record_memory_history()`, train,
`torch.cuda.memory._dump_snapshot(path)`. Needs neither a GPU nor PyTorch.
"""

if __name__ == "__main__" and not __package__:  # run by its path
    import by_path  # noqa: F401

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ds_cmli.common.cli import DOES_NOT_FIT, GroupedCommand, option, run_command
from ds_cmli.common.errors import UserError
from profiling.scripts import picture, plain, readable, written

GB = 10**9
SHOWN = 8  # holders of memory that are named
AS_SET = "As in PYTORCH_ALLOC_CONF"
SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
UNSET = "PYTORCH_ALLOC_CONF, which the history does not tell"


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("snapshots", nargs=-1, required=True, type=click.Path(), metavar="SNAPSHOT...")
@option("What if", "--limit", metavar="SIZE|GPU", help="24GB (10^9 bytes), 22GiB, or a GPU.")
@option("What if", "--expandable-segments/--no-expandable-segments", default=None, help=AS_SET)
@option("What if", "--max-split-size-mb", type=click.IntRange(21), help=f"{AS_SET}, in MiB.")
@option("What if", "--roundup-power2-divisions", type=click.IntRange(1), help=f"{AS_SET}; 1: off.")
@option("What if", "--garbage-collection-threshold", type=SHARE, help="A share of --limit.")
@option("What if", "--settings", "compare_settings", is_flag=True, help="Which reserve least.")
@option("Output", "--plot", metavar="FILE", help="Allocated and reserved memory over time.")
@option("Output", "--json", "as_json", is_flag=True, help="One object per device, a line each.")
def command(snapshots: tuple[str, ...], limit: str | None, expandable_segments: bool | None,
            max_split_size_mb: int | None, roundup_power2_divisions: int | None,
            garbage_collection_threshold: float | None, compare_settings: bool, plot: str | None,
            as_json: bool) -> int:  # fmt: skip
    """Replay a recorded history of CUDA's allocator through its model, from wherever it begins.

    Of two snapshots also what holds more and what holds less memory at the second one's peak. The
    exit code is 3 where a history does not fit in --limit.
    """
    from ds_cmli.allocator import gpus
    from ds_cmli.common.plots import check_picture

    check_picture("--plot", plot)
    if len(snapshots) > 2:
        raise UserError(f"{len(snapshots)} snapshots are given: give one, or two to compare")
    divisions = roundup_power2_divisions
    if divisions is not None and divisions & (divisions - 1):
        raise UserError(f"--roundup-power2-divisions is {divisions}: give a power of two")
    if garbage_collection_threshold and limit is None:
        raise UserError(
            "--garbage-collection-threshold is a share of --limit: give one, as PyTorch's needs a fraction"
        )
    room = None
    if limit is not None:
        room, gpu = gpus.parse_memory(limit, "--limit")
        if gpu:
            whole, room = room, gpus.find(gpu).usable
            click.echo(f"--limit {limit!r}: of the {whole:,} B of a {gpu}, {room:,} B are left besides CUDA's context",
                       err=as_json)  # fmt: skip
    changes = {
        "expandable_segments": expandable_segments,
        "max_split_size": max_split_size_mb and max_split_size_mb << 20,
        "roundup_power2_divisions": divisions if divisions != 1 else 0,
        "garbage_collection_threshold": garbage_collection_threshold,
    }
    changes = {name: value for name, value in changes.items() if value is not None}

    files: list[list[dict[str, Any]]] = []
    refused: list[str] = []
    for i, path in enumerate(snapshots):
        devices, errors, silent = one(
            path, room, changes, compare_settings, plot if i == 0 else None
        )
        for device in devices:
            print(json.dumps(device["values"]) if as_json else "\n".join(device["lines"]))
            for line in device["told"] if as_json else ():
                click.echo(line, err=True)
        for line in silent:
            click.echo(line, err=as_json)
        files.append(devices)
        refused += errors
    if refused:
        raise UserError("; ".join(refused))
    if len(files) == 2 and not as_json:
        for first, second in zip(*files, strict=False):
            print("\n".join(difference(first["holders"], second["holders"])))
    variants = [
        device["values"].get("what_if", {"fits": True}) for devices in files for device in devices
    ]
    return 0 if all(answer["fits"] for answer in variants) else DOES_NOT_FIT


def one(
    path: str, room: int | None, changes: dict[str, Any], compare_settings: bool, plot: str | None
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Of each device of a snapshot: what --json prints, the lines of the text, and what holds
    memory at its peak.

    And a line for each device whose history cannot be replayed, and for each that has memory but no
    history.
    """
    from ds_cmli.allocator import snapshot
    from ds_cmli.allocator.history import replay_history
    from ds_cmli.allocator.what_if import what_if
    from profiling.memory.holders import holders

    content = snapshot.read(path)
    out: list[dict[str, Any]] = []
    refused: list[str] = []
    for device, trace in enumerate(content["device_traces"]):
        if not trace:
            continue
        try:
            replayed = replay_history(content, device)
        except UserError as error:
            refused.append(str(error))
            continue
        start = replayed.start
        at_peak = holders(content, device, start)
        values: dict[str, Any] = dict(replayed.to_dict())
        values["at_peak"] = {holder.name: holder.bytes for holder in at_peak}
        told_too = beginning_told(replayed)
        lines = [text(replayed, isinstance(content.get("allocator_settings"), dict)), *told_too]
        lines += ["  at the peak:", *held(at_peak)] if at_peak else []
        if room is not None or changes:
            answer = what_if(start, trace, room, replace(start.settings, **changes))
            values["what_if"] = vars(answer)
            lines.append(told(answer, room))
            if not answer.fits:
                lines += [
                    "  held by then:",
                    *held(holders(content, device, start, answer.failed_event)),
                ]
        elif replayed.allocated_peak:
            lines.append(smallest_gpu(start, trace))
        if compare_settings:
            reserved = settings_tried(start, trace, room)
            values["settings"] = reserved
            lines += ["  reserved at most under these settings, the least first:"]
            lines += [f"    {size:>16,} B  {name}" for name, size in reserved.items()]
        if plot is not None and not out:
            try:
                draw(replayed.timeline, path, Path(plot))
            except (OSError, ValueError) as error:
                raise UserError(f"--plot is {plot!r}: cannot write it: {error}") from None
        values["live_before"] = sum(start.live.values())
        out.append({"values": values, "lines": lines, "holders": at_peak, "told": told_too})
    silent = without_history(content)
    if not refused and not out:
        raise UserError(
            "; ".join([f"{path!r} holds no history: switch recording on before training", *silent])
        )
    return out, refused, silent


def without_history(content: dict[str, Any]) -> list[str]:
    """A line for each device that has memory, but no event in the history."""
    lines = []
    recorded = {device for device, trace in enumerate(content["device_traces"]) if trace}
    for device in sorted({segment.get("device", 0) for segment in content["segments"]} - recorded):
        own = [s for s in content["segments"] if s.get("device", 0) == device]
        sizes = [segment["total_size"] for segment in own]
        lines.append(
            f"device {device}: {sum(sizes):,} B are reserved in {len(sizes)} segment(s), but it has no history"
        )
    return lines


def beginning_told(replayed: Any) -> list[str]:
    """What a reader must know of the history's beginning, and of a history without requests."""
    before, blocks = sum(replayed.start.live.values()), len(replayed.start.live)
    lines = []
    if before:
        lines.append(
            f"  the history begins in the middle: {before:,} B in {blocks:,} block(s) were there before"
        )
    if not replayed.allocations:
        lines.append(
            "  the history holds no allocation, so nothing of it shows what the program needs: switch recording on"
            " before training, and dump the snapshot after a step"
        )
    return lines


def told(answer: Any, limit: int | None) -> str:
    room = "" if limit is None else f" in {limit:,} B"
    if answer.fits:
        most = f"{answer.reserved_peak:,} B reserved at most, {answer.allocated_peak:,} B allocated"
        return f"  what if: it fits{room}: {most}"
    which = "what lived at the beginning"
    if answer.failed_at >= 0:
        which = f"allocation {answer.failed_at + 1:,}"
    request = f" of {answer.failed_request:,} B" if answer.failed_request else ""
    return f"  what if: it does not fit{room}: {which}{request} fails, and {answer.too_much:,} B would have to go"


def held(holders: Any) -> list[str]:
    return sizes((f"{one.name} ({one.blocks:,} blocks)", one.bytes) for one in holders)


def sizes(rows: Iterable[tuple[str, int]], sign: str = "") -> list[str]:
    """A line for each of the first names and bytes, and one for all others."""
    rows = list(rows)
    lines = [f"    {size:>{sign}16,} B  {name}" for name, size in rows[:SHOWN]]
    rest = [size for _, size in rows[SHOWN:]]
    return [*lines, f"    {sum(rest):>{sign}16,} B  {len(rest)} others"] if rest else lines


def difference(first: Any, second: Any) -> list[str]:
    change = Counter({holder.name: holder.bytes for holder in second})
    change.subtract({holder.name: holder.bytes for holder in first})
    rows = sorted((item for item in change.items() if item[1]), key=lambda item: -abs(item[1]))
    total = f"the second's peak compared with the first's: {change.total():+,} B"
    return [total, *sizes(rows, "+")]


def settings_tried(start: Any, trace: list[dict[str, Any]], room: int | None) -> dict[str, int]:
    """Reserved bytes by value of PYTORCH_ALLOC_CONF, the least first; of those that fit."""
    from ds_cmli.allocator.blocks import DEFAULTS
    from ds_cmli.allocator.what_if import what_if

    tried = {
        "(nothing set)": DEFAULTS,
        "expandable_segments:True": replace(DEFAULTS, expandable_segments=True),
    }
    for size in (32, 64, 128, 256, 512):
        tried[f"max_split_size_mb:{size}"] = replace(DEFAULTS, max_split_size=size << 20)
    for parts in (1, 2, 4, 8, 16):
        for name, settings in list(tried.items())[:2]:
            if parts > 1:
                key = f"roundup_power2_divisions:{parts}"
                key = f"{name},{key}" if settings.expandable_segments else key
                tried[key] = replace(settings, roundup_power2_divisions=parts)
    answers = {name: what_if(start, trace, room, settings) for name, settings in tried.items()}
    reserved = {name: one.reserved_peak for name, one in answers.items() if one.fits}
    return dict(sorted(reserved.items(), key=lambda item: item[1]))


def smallest_gpu(start: Any, trace: list[dict[str, Any]]) -> str:
    from ds_cmli.allocator.gpus import all_gpus
    from ds_cmli.allocator.what_if import what_if

    for gpu in sorted(all_gpus().values(), key=lambda gpu: gpu.usable):
        if what_if(start, trace, gpu.usable).fits:
            return f"  the smallest GPU that it fits on, of those that are known: {gpu.name}"
    return "  it fits on none of the GPUs that are known"


def text(replayed: Any, settings_known: bool) -> str:
    fragmented = replayed.reserved_peak_replayed - replayed.allocated_peak
    lines = [
        f"device {replayed.device}: {replayed.allocations:,} allocations,"
        f" {replayed.at_recorded_address:,} of them replayed at their recorded address",
        f"  reserved at most {replayed.reserved_peak_recorded:,} B recorded,"
        f" {replayed.reserved_peak_replayed:,} B replayed; {replayed.allocated_peak:,} B of it allocated at most:"
        f" {fragmented:,} B fragmented",
        f"  segments taken meanwhile: {len(replayed.segments_recorded)} recorded,"
        f" {len(replayed.segments_replayed)} replayed",
    ]
    if replayed.ambiguous:
        lines.append(f"  of {replayed.ambiguous} blocks from before, the exact size is not known")
    if replayed.unknown:
        lines.append(f"  {replayed.unknown} frees belong to nothing that the replay holds")
    if not replayed.exact:
        also = "" if settings_known else f", or from {UNSET}"
        lines.append(f"  what differs comes from rules that the model does not know{also}")
    if replayed.released_private:
        unless = "" if settings_known else " (if PYTORCH_ALLOC_CONF was not set, not said either)"
        lines.append(
            f"  {replayed.released_private} released segments were those of private pools (CUDA graphs,"
            f" torch.cuda.MemPool): the history does not say so, the requests do{unless}"
        )
    if replayed.released_unknown:
        lines.append(
            f"  of {replayed.released_unknown} released segments, the pool is not known: they count as the default"
            " pool's wherever the requests allow it, so a what-if may reserve too little"
        )
    if replayed.out_of_memory:
        lines.append(f"  {replayed.out_of_memory} requests were refused: out of memory")
    return "\n".join(lines)


def draw(points: Sequence[tuple[int, int]], title: str, path: Path) -> None:
    """Draw allocated and reserved bytes after each event; fragmentation is between the two."""
    from ds_cmli.common import plots

    figure, axis = picture(4)
    allocated, reserved = ([point[i] / GB for point in points] for i in range(2))
    where = range(len(points))
    used, free = plots.LINES[3], plots.LINES[2]
    axis.fill_between(where, allocated, step="post", color=used)
    axis.fill_between(where, allocated, reserved, step="post", color=free, alpha=0.45)
    axis.plot(where, reserved, drawstyle="steps-post", color=free, linewidth=1.2)
    axis.set(xlabel="events of the allocator", xlim=(0, len(points)), ylim=(0, None))
    axis.xaxis.set_major_formatter(plain)
    axis.yaxis.set_major_formatter(lambda size, _: readable(round(size * GB)))
    axis.grid(axis="y")
    most = max(range(len(points)), key=lambda i: reserved[i], default=0)
    if points:
        gap = 0.06 * axis.get_ylim()[1]
        ends = plots.apart([allocated[-1] / 2, (allocated[-1] + reserved[-1]) / 2], gap)
        for end, label in zip(ends, ("allocated", "reserved, not used"), strict=True):
            axis.text(1.01, end, label, transform=axis.get_yaxis_transform(), size=9, va="center")
    idle = reserved[most] - allocated[most] if points else 0
    finding = f"{readable(round(idle * GB))} of {readable(round(reserved[most] * GB))} reserved at the peak are not in use"
    written(figure, path, finding if points else "No event", title)


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
