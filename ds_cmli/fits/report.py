"""Says in one sentence whether a program fits, and shows and draws what takes the memory.

Shapes of pictures: C categories, E events, P events that are drawn.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from ds_cmli.allocator import gpus
from ds_cmli.allocator.allocator import by_retries, replay
from ds_cmli.allocator.blocks import Event
from ds_cmli.common.errors import UserError
from ds_cmli.common.plots import ACCENT, COLOURS, SOFT, matplotlib
from ds_cmli.fits import files, script
from ds_cmli.fits.answer import Answer, Room, answer, with_cublas
from ds_cmli.fits.program import Ran
from ds_cmli.fits.stand_ins import NUMBER
from ds_cmli.fits.steps import CATEGORIES, StepRecorder
from ds_cmli.fits.values import Values
from ds_cmli.fits.world import World

DEFAULT_GPU = "A100 80GB"  # whose operators are meant where none is named
SIZE = (9, 4.5)  # inches, of a picture
POINTS = 1500  # more cannot be distinguished
# Of reserved: what the model may be too low by, see docs/fits-accuracy.md.
MARGIN = 0.02
# What a compiled program may reserve more than predicted: while Inductor measures kernels it
# fills the L2 cache (at most 126 MiB, a B200's), and a segment of 20 MiB may be left then.
COMPILED_BYTES = 146 << 20


def rooms(gpu: str | None, limit: str | None) -> list[Room]:
    """The devices in question: one, or all that are listed.

    Raises `UserError` for a GPU that is not listed, and for a limit that is no size.
    """
    if limit is not None:
        size, name = gpus.parse_memory(limit, "--limit")
        return [Room(name or DEFAULT_GPU, None if name else size)]
    if gpu is not None:
        return [Room(gpus.find(gpu).name)]
    others = [Room(name) for name in gpus.all_gpus() if name != DEFAULT_GPU]
    return [Room(DEFAULT_GPU), *others]


def check_training(steps: int, on_gpu: bool) -> None:
    """Raise `UserError` unless the program has done optimizer steps, and had tensors on a GPU."""
    if not steps:
        raise UserError(
            "the program ended before an optimizer of torch.optim did a step after a backward "
            "pass: let it train"
        )
    if not on_gpu:
        raise UserError("the program made no tensor on a GPU: let it train on device 'cuda'")


def what_ran(program: str, steps: int, world: World) -> str:
    rank = "" if world.size is None else f" as rank {world.rank} of {world.size}"
    return f"{'1 step' if steps == 1 else f'{steps} steps'} of {program}{rank}"


def verdict(room: Room, needed: int, fits: bool, retries: int) -> str:
    """Whether steps that need so many bytes of the device fit."""
    if fits:
        left = f"{_gb(max(room.bytes - needed, 0))} are free"
        return f"fit on {room}: they take {_gb(needed)}, {left}{by_retries(retries)}"
    return f"do not fit on {room}: they take {_gb(needed)}"


def not_counted(waited_for: Sequence[str]) -> str:
    """What an answer says of optimizers that had done no step when the program ended."""
    if not waited_for:
        return ""
    waiting = " and ".join(waited_for)
    return f", but {waiting} did no step, and what that takes is not counted: give more --steps"


def show_totals(totals: dict[str, int], room: Room, world: World) -> None:
    """Print peaks, and what the process occupies of the device besides torch's tensors."""
    print("\npeak of each, in bytes:")
    for name, size in totals.items():
        print(f"  {name:20} {size:>18,}")
    card = gpus.find(room.gpu)
    outside = {"context": card.context}
    if (world.size or 1) > 1:
        outside["NCCL"] = card.nccl
    print("\nof device, outside torch's allocator:")
    for name, constant in outside.items():
        print(f"  {name:20} {constant.bytes:>18,}  {constant.known}")


@dataclass
class ProgramReport:
    """The answers for each device in question."""

    steps: int  # optimizer steps that were done
    rooms: list[Room]
    answers: list[Answer]
    events: list[Event]
    world: World
    waited_for: list[str]  # optimizers that have done no step
    compiled: bool  # whether compiled code ran

    @classmethod
    def of(cls, recorder: StepRecorder, rooms: list[Room], world: World) -> "ProgramReport":
        progress = recorder.progress
        steps = progress.steps
        card = gpus.find(rooms[0].gpu)
        workspaces = card.cublas_bytes(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        events = with_cublas(recorder.events(), workspaces, recorder.given)
        check_training(steps, any(event.bytes for event in events))
        answers = [answer(events, recorder.lines, room, world.size or 1) for room in rooms]
        return cls(steps, rooms, answers, events, world, progress.waited_for, recorder.compiled)

    @property
    def fits(self) -> bool:
        """Whether a device is known to have enough memory."""
        return any(of_room.fits for of_room in self.answers) and not self.waited_for

    @property
    def margin(self) -> int:
        """What should stay free, in bytes."""
        share = int(MARGIN * self.answers[0].totals["reserved"])
        return share + (COMPILED_BYTES if self.compiled else 0)

    def sentence(self, program: str) -> str:
        """The answer in one sentence."""
        first, room = self.answers[0], self.rooms[0]
        said = what_ran(program, self.steps, self.world)
        size, category, line = first.largest[0]
        largest = f"the largest at the peak: {_gb(size)} of {category}"
        largest += f", by {line}" if line else ""
        if len(self.rooms) > 1:
            zipped = zip(self.rooms, self.answers, strict=True)
            fitting = [
                room.gpu + by_retries(of_room.retries).replace(", ", " ")
                for room, of_room in zipped
                if of_room.fits
            ]
            where = f"and fit on {', '.join(fitting) or 'no listed GPU'}"
            needed = _gb(first.totals["device"])
            return f"{said} need {needed} {where}{not_counted(self.waited_for)}; {largest}"
        verdict_line = verdict(room, first.totals["device"], first.fits, first.retries)
        free = room.bytes - first.totals["device"]
        if first.fits and free < self.margin:
            verdict_line += f", less than the margin of {_gb(self.margin)}"
        return f"{said} {verdict_line}{not_counted(self.waited_for)}; {largest}"

    def show(self) -> None:
        """Print the sizes at the peak."""
        first = self.answers[0]
        show_totals(first.totals, self.rooms[0], self.world)
        margin = f"not in device: {MARGIN:.0%} of reserved, the most that it was too low"
        margin += ", and what Inductor may take" if self.compiled else ""
        print(f"  {'margin':20} {self.margin:>18,}  {margin}")
        print("\nthe most requested in each phase:")
        for name, size in first.phases.items():
            print(f"  {name:20} {size:>18,}")
        print(f"\nat the requested peak, in {first.phase}:")
        for name, size in first.categories.items():
            share = size / max(first.totals["requested"], 1)
            print(f"  {name:20} {size:>18,} {share:>7.1%}")
        print("\nthe largest there, by category and line:")
        for size, category, line in first.largest:
            print(f"  {category:20} {size:>18,}  {line}")
        size, op, line = first.tensor
        print(f"  {'single tensor':20} {size:>18,}  {line}  ({op})")

    def to_dict(self) -> dict[str, object]:
        fits, retries = {}, {}
        for room, of_room in zip(self.rooms, self.answers, strict=True):
            fits[str(room)], retries[str(room)] = of_room.fits, of_room.retries
        answered = {**asdict(self.answers[0]), "margin": self.margin, "fits": fits}
        waited_for = {"retries": retries, "waited_for": self.waited_for}
        return {"steps": self.steps, **answered, **waited_for}


def told(values: Values, ran: Ran, recorder: StepRecorder) -> Iterator[str]:
    """Yield what the program asked for and did not get, a line each."""
    progress = recorder.progress
    yield ""
    yield from progress.ending(saved=files.WITHOUT_VALUES in ran.left_out)
    if values.read:
        reading = f"read from tensors without data: {NUMBER} for a number, 0 for a whole one"
        yield f"stand-ins {reading}: {_places(values.read)}"
    if values.bounded:
        yield f"sizes that depend on data, as large as they can be: {_places(values.bounded)}"
    if values.by_cpu:
        yield f"as large as on a CPU, what they hold inside unknown: {_places(values.by_cpu)}"
    if not progress.done:
        yield (
            "no optimizer of torch.optim did a step: each backward pass is taken for one, and "
            "what an optimizer keeps is counted among others and activations"
        )
    yield from sorted(recorder.inexact)
    for work, count in ran.left_out.items():
        yield f"{work}: {count} times"
    yield from filter(None, (script.written(),))


def _places(counted: Counter[str]) -> str:
    named = [f"{line or 'a library'} ({count} times)" for line, count in counted.most_common(5)]
    rest = len(counted) - len(named)
    return ", ".join(named) + (f" and {rest} more lines" if rest else "")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def draw_events(path: str, events: list[Event], answer: Answer, room: Room, title: str) -> None:
    """Write the picture, in the format that the path's ending names.

    Raises:
        UserError: matplotlib is missing.
    """
    pyplot = matplotlib("--plot")
    import numpy as np  # matplotlib needs it, PyTorch does not

    changes = np.zeros((len(CATEGORIES), len(events)), dtype=np.int64)  # [C, E]
    for number, event in enumerate(events):
        changes[CATEGORIES.index(event.category), number] = event.bytes
    live = changes.cumsum(1)  # [C, E]
    at = _drawn(live.sum(0).tolist())  # [P]
    for_tensors = room.bytes - (answer.totals["device"] - answer.totals["reserved"])
    replayed = replay(events, limit=for_tensors if answer.fits else None)
    reserved = np.array([size for *_, size in replayed.timeline])  # [E]
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    colours = COLOURS[: len(CATEGORIES)]
    axis.stackplot(at, live[:, at] / 1e9, labels=CATEGORIES, colors=colours, linewidth=0)
    axis.plot(at, reserved[at] / 1e9, color=SOFT, label="reserved", linewidth=1)
    if for_tensors < 2 * reserved.max():
        name = f"room for tensors on {room}"
        axis.axhline(for_tensors / 1e9, color=ACCENT, linestyle="--", label=name)
    _mark_phases(axis, events)
    axis.set(title=title, xlabel="allocations and frees, in their order", ylabel="GB")
    axis.margins(x=0)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _drawn(total: Sequence[int]) -> list[int]:
    """The events to draw, [P]: of each of as many parts of equal length the one with the most."""
    parts = min(POINTS, len(total))
    edges = [len(total) * part // parts for part in range(parts + 1)]
    return [max(range(begin, end), key=total.__getitem__) for begin, end in pairwise(edges)]


def _mark_phases(axis, events: list[Event]) -> None:
    """Draw a line where backward passes and updates begin, and name them above."""
    before = ""
    for number, event in enumerate(events):
        if event.phase != before and event.phase in ("backward", "optimizer"):
            axis.axvline(number, color=SOFT, linewidth=0.6, linestyle=":")
            label = {"color": SOFT, "size": 7, "va": "top", "transform": axis.get_xaxis_transform()}
            axis.text(number, 0.99, f" {event.phase}", **label)
        before = event.phase
