"""The table of a plan, its prices, and the proposal with the command that starts it."""

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ds_cmli.allocator import gpus
from ds_cmli.allocator.allocator import by_retries
from ds_cmli.common.cli import DOES_NOT_FIT, option
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse_toml
from ds_cmli.fits.plan import MACHINE, Line, Search, Step, Training, grid, in_order, size

COUNTED = (
    "work is counted, not measured: FLOPs in passes (forward 1, backward 2, a repeated forward 1), "
    "as multiples of a plain step's, at most, as frozen parts repeat less; bytes of weights and "
    "gradients between GPUs (a plain step: 2), and to and from the host by offload, as multiples "
    "of the weights'"
)
SEVERAL_MACHINES = (
    "on several machines: deepspeed's hostfile has a line NAME slots=GPUS for each of them, and "
    "torchrun is started on each, with the name of one for NODE"
)
RETRIED = "* only as PyTorch's allocator returns its cache and tries again, which takes time"
EXAMPLE = "A100 80GB,1.80"


def make(
    training: Training,
    names: Sequence[str],
    prices: Mapping[str, float],
    tell: Callable[[str], None],
) -> int:
    """Print the table, and the line of the least work that fits with its command.

    Returns the exit code.
    """
    step = training.step
    settings, left_out = grid(step)
    search = Search(training, names, tell)
    lines = in_order(search.lines(settings), step.own, prices)
    show(lines, step, prices)
    if any(any(line.gpus.values()) for line in lines):
        print(RETRIED)
    print(f"\n{COUNTED}")
    if len(names) > 1:
        print("lines have the operators of an A100, the proposal those of its own GPU")
    for reason in left_out:
        print(f"left out: {reason}")
    for refusal in search.refused:
        print(f"refused: {refusal}")
    for line in lines:
        for gpu in sorted(line.gpus, key=lambda name: (prices.get(name, 0.0), size(name))):
            # The lines for several GPUs have the operators of one: once more with its own.
            need = training.measure(line.settings, line.micro_batch, gpu)
            if gpu not in need.fits:
                continue
            if prices:
                print(cheapest(lines, step, prices))
            taken = f"{need.device / 1e9:.2f} of {size(gpu) / 1e9:.2f} GB"
            taken += by_retries(need.fits[gpu])
            times = step.pairs // line.micro_batch
            batch = f"micro-batch {line.micro_batch} x {times}"
            ranks = f"{step.world_size} x {gpu}"
            print(f"the least work that fits: {line.settings}, {batch}, on {ranks}: {taken}")
            if step.world_size > MACHINE:
                print(SEVERAL_MACHINES)
            print(training.start(line.settings, line.micro_batch))
            return 0
    print(f"nothing fits on {', '.join(names)}: a smaller model, more ranks or a larger GPU")
    return DOES_NOT_FIT


def show(lines: Sequence[Line], step: Step, prices: Mapping[str, float]) -> None:
    """Print the table."""
    names = ["ZeRO", "ckpt", "offload", "LoRA", "micro-batch", "GB", "FLOPs", "bytes", "host"]
    rows = [[*names, *["per hour"] * bool(prices), "the largest on"]]
    for line in lines:
        row = [_cell(value) for value in vars(line.settings).values()]
        row += [f"{line.micro_batch} x {step.pairs // line.micro_batch}"]
        row += [f"{line.device / 1e9:.2f}", f"{line.work.flops:.2f}"]
        row += [f"{line.work.between_gpus:d}", f"{line.work.to_host:.2f}"]
        if prices:
            row.append(f"{cost(line, step, prices):,.2f}".replace("inf", "-"))
        fitting = [f"{name}{'*' * bool(retries)}" for name, retries in line.gpus.items()]
        rows.append([*row, ", ".join(fitting) or "none, it is too large"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = map(str.rjust, row[:-1], widths)
        print("  ".join([*cells, row[-1]]))


def _cell(value: int | bool | None) -> str:
    if isinstance(value, bool):
        return ("off", "on")[value]
    return str(value).replace("None", "-")


def cost(line: Line, step: Step, prices: Mapping[str, float]) -> float:
    """The price of an hour of the cheapest GPUs that the line names."""
    return min(map(prices.__getitem__, line.gpus), default=math.inf) * step.world_size


def cheapest(lines: Sequence[Line], step: Step, prices: Mapping[str, float]) -> str:
    """A sentence about prices, of lines in their order."""
    line = min(lines, key=lambda line: cost(line, step, prices))
    gpu = min(line.gpus, key=prices.__getitem__)
    hour = f"{cost(line, step, prices):,.2f} per hour for {step.world_size} x {gpu}"
    where = f"{line.settings}, micro-batch {line.micro_batch}"
    return f"the lowest price: {hour}, with {where}; how long a step takes there is not known"


def read_prices(path: str) -> dict[str, float]:
    """The prices of a table: GPU,PRICE in the lines of a CSV, "GPU" = PRICE in a TOML.

    Raises:
        UserError: the file is not there, is empty, or has something that is no GPU or no price.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".toml"):
            rows = list(parse_toml(text).items())
        else:
            lines = filter(None, csv.reader(text.splitlines(), strict=True))
            rows = [(name, ",".join(rest)) for name, *rest in lines]
    except OSError as error:
        raise UserError(f"--prices is {path!r}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"--prices is {path!r}, which cannot be read: {error}") from None
    prices: dict[str, float] = {}
    for number, (name, value) in enumerate(rows):
        listed, price = gpus.listed_name(name), _price(value)
        if not (number or listed or re.search(r"\d", str(value)) or path.endswith(".toml")):
            continue  # a CSV's names of columns
        if not listed:
            known = ", ".join(gpus.all_gpus())
            raise UserError(f"--prices {path} has {name!r}: give one of {known}")
        if not price:
            raise UserError(
                f"--prices {path}: {name} has {value!r}: give a price above 0, a plain number"
            )
        if listed in prices:
            raise UserError(f"--prices {path} has {listed} twice: keep one")
        prices[listed] = price
    if not prices:
        raise UserError(f"--prices is {path!r}, which has no price: write lines like {EXAMPLE}")
    return prices


def _price(value: object) -> float:
    """A positive number; 0 for what is none."""
    with suppress(ValueError):
        price = float(str(value))
        if 0 < price < math.inf:
            return price
    return 0.0


def devices(gpu: str | None, prices_path: str | None) -> tuple[list[str], dict[str, float]]:
    """The GPUs to plan for, from the smallest on, and the prices.

    Raises:
        UserError: the named one is not listed, or has no price.
    """
    prices: dict[str, float] = {}
    if prices_path is not None:
        prices = read_prices(prices_path)
    if gpu is None:
        return sorted(prices or gpus.all_gpus(), key=size), prices
    name = gpus.find(gpu).name
    if prices and name not in prices:
        raise UserError(f"--gpu is {gpu!r}, and --prices has no price of {name}: add it")
    return [name], prices


def plan_options(function: Callable) -> Callable:
    """The options of both plans."""
    prices = "Prices per hour: lines of GPU,PRICE (.csv) or GPU = PRICE (.toml)."
    written = {"default": "plan.json", "help": "The DeepSpeed JSON of the proposal."}
    function = option("Plan", "--write", "write_to", show_default=True, **written)(function)
    function = option("Plan", "--prices", help=prices)(function)
    gpu = "GPU by name.  [those of --prices, or all that are listed]"
    return option("Plan", "--gpu", help=gpu)(function)
