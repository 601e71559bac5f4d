"""What the scripts share: numbers as they are given, functions timed in turn, and the processor's name."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from ds_cmli.common.errors import UserError

Number = TypeVar("Number", int, float)
Name = TypeVar("Name", bound=Hashable)
Clock = Callable[[], float]


def listed(setting: str, text: str, kind: type[Number]) -> list[Number]:
    """Positive numbers with commas between them; `UserError` otherwise."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(number > 0 for number in numbers):
        raise UserError(f"{setting} is {text!r}: give positive numbers with commas between them")
    return numbers


def compare(
    functions: Mapping[Name, Callable[[], object]], repeats: int, clock: Clock, warm_ups: int = 1
) -> dict[Name, list[float]]:
    """Seconds of each function, `repeats` times, all of them in turn; the order turns round each time.

    They run `warm_ups` times before.
    """
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for repeat in range(-warm_ups, repeats):
        for name in list(functions)[:: 1 if repeat % 2 else -1]:
            started = clock()
            functions[name]()
            if repeat >= 0:
                times[name].append(clock() - started)
    return times


def processor() -> str:
    """The processor's name; "" if it is not known."""
    from cpuinfo import get_cpu_info

    return get_cpu_info().get("brand_raw", "")
