"""The memory estimates E1 to E5 of Cares (2024), "the document": its words, its arithmetic, the sizes
that are stored, and what of it holds.

All of it is arithmetic; `implementations.py` runs the code that the estimates are about.

Shapes: B pairs per rank, P ranks, G = B * P, N image patches, M text positions, H hidden size, D
embedding dimension.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ds_cmli.cmli.sides import index_dtype

# [CLS] and [SEP]/[EOS], which the document leaves out of its formulas but not out of M.
SPECIAL_TOKENS = 2


@dataclass(frozen=True)
class Setting:
    """The sizes of a training step. The defaults are the document's."""

    B: int = 256
    P: int = 2
    N: int = 196
    M: int = 64
    H: int = 768
    D: int = 256

    @property
    def G(self) -> int:
        return self.B * self.P


DOCUMENT = Setting()


class Line(NamedTuple):
    """One line of the document's arithmetic, with the numbers of a setting."""

    formula: str
    value: int  # its correct result
    printed: int  # the result in the document, to its digits

    @property
    def verdict(self) -> str:
        """On the numbers of the document."""
        if abs(self.value / self.printed - 1) > 0.005:  # it prints three digits
            return f"wrong: the document has {self.printed:,}"
        return "right" if self.value == self.printed else "right, rounded"


@dataclass(frozen=True)
class Claim:
    topic: str
    figure: str  # as printed in the document
    quote: str
    truth: str  # what of it holds, in a sentence
    lines: tuple[Line, ...] = ()
    document_bytes: int | None = None  # the result of its formula, as it multiplies
    # implementation -> bytes of the largest tensor that it stores; that of the all-pairs op depends
    # on the device's kernels
    stored: dict[str, int] = field(default_factory=dict)


def claims(s: Setting = DOCUMENT) -> dict[str, Claim]:
    """What the document claims, by id, with the sizes of `s`: fp32 in E1 and E2, 16 bit in E3."""
    pair, kept = s.N * s.M, s.M - SPECIAL_TOKENS
    global_dots, own, written, every = s.G**2, s.B * pair, s.G * pair, s.G**2 * pair
    global_bytes, all_bytes, match_bytes = 4 * global_dots * s.H, 4 * written * s.D, 2 * own * s.D
    tokens, patches = s.N * index_dtype(s.M).itemsize, s.M * index_dtype(s.N).itemsize
    similarities, argmax = 4 * s.B * s.G * pair, s.B * s.G * (tokens + patches)
    coincidence = " (the same, as B = D)" if similarities == all_bytes else ""
    return {
        "E1": Claim("global contrastive loss", "805.31 MB",
            "we already need 262,144 * 768 * 4 bytes = 805.31 MB of GPU memory",
            f"{s.H} times too much: a matrix product stores one number for each dot product, "
            f"{4 * global_dots / 1e6:,.1f} MB",
            (Line(f"({s.B} * {s.P})^2", global_dots, 262_144),
             Line(f"{global_dots:,} * {s.H} * 4", global_bytes, 805_310_000)),
            global_bytes,
            {"broadcast": global_bytes, "materialised": 4 * global_dots, "ours": 4 * s.B * s.G}),
        "E2": Claim("all-pairs CMLI", "6.58 GB",
            "the number of dot products increases from 262,144 to 256 * 12,544 = 6,422,528 [...] we need "
            "6,422,528 * 256 * 4 bytes = 6.58 GB of additional GPU memory, just to store the result",
            f"all pairs are {s.G}^2 * {pair:,} = {every:,} dot products, a rank's similarities "
            f"{similarities / 1e9:,.2f} GB{coincidence}; none need be kept: which patch or token won is "
            f"{argmax / 1e6:,.1f} MB",
            (Line(f"{s.N} * {s.M}", pair, 12_544),
             Line(f"{s.B} * {pair:,}", own, 6_422_528),  # that is 512 * 12,544
             Line(f"{written:,} * {s.D} * 4", all_bytes, 6_580_000_000)),
            all_bytes,
            {"broadcast": 4 * every * s.D, "materialised": similarities, "materialised, all": 4 * every}),
        "E3": Claim("Target-CMLI", "1.64 GB",
            "12,544 * 256 = 3,211,264 dot products [...] just 3,211,264 * 256 * 2 bytes = 1.64 GB of "
            "additional GPU memory is required",
            f"{s.D} times too much: {2 * own / 1e6:,.1f} MB of similarities",
            (Line(f"{pair:,} * {s.B}", own, 3_211_264),
             Line(f"{own:,} * {s.D} * 2", match_bytes, 1_640_000_000)),
            match_bytes,
            # Ours matches in fp32, so that rounding decides no maximum. Its largest tensor is the fp32 copy
            # of the longer side's features, or the similarities.
            {"broadcast": match_bytes, "materialised": 2 * own,
             "ours": 4 * max(s.B * max(s.N, s.M) * s.D, own)}),
        "E4": Claim("what a step leaves free", "2 GB",
            "which is still manageable, since we have around 2 GB of GPU memory remaining for a step",
            "no formula answers it, but the whole step"),
        "E5": Claim("text positions", "12,544",
            "With a maximum text sequence length of 64 tokens, two of which are ignored as they are the "
            "cls and eos token [...] 196 * 64 = 12,544",
            f"at most {kept} of {s.M} are tokens: {s.N * kept:,} dot products a pair",
            (Line(f"{s.N} * {kept}", s.N * kept, 12_544),),
            None,
            {f"E2 materialised, {kept} of {s.M}": 4 * s.B * s.G * s.N * kept,
             f"E3 materialised, {kept} of {s.M}": 2 * s.B * s.N * kept}),
    }  # fmt: skip


def sentences(every: dict[str, Claim]) -> Iterable[str]:
    """What of the document holds, a sentence for each claim."""
    for id, claim in every.items():
        yield f"{id} {claim.topic}, {claim.figure}: {claim.truth}."


def arithmetic(every: dict[str, Claim], s: Setting) -> str:
    """Every line of the document's arithmetic, computed again, with a verdict."""
    rows = [
        [id, line.formula, count(line.value), line.verdict if s == DOCUMENT else ""]
        for id, claim in every.items()
        for line in claim.lines
    ]
    sizes = ", ".join(f"{name}={value}" for name, value in vars(s).items())
    quotes = [f'{id}: "{claim.quote}"' for id, claim in every.items()]
    columns = ["", "formula", "comes to", "the document's result"]
    return section(f"The document's arithmetic: {sizes}", columns, rows, *quotes)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """As Markdown; columns of numbers are right-aligned."""
    cells_of = [cells for _, *cells in zip(columns, *rows, strict=True)]
    words = (any(cell.strip("0123456789,.-") for cell in cells) for cells in cells_of)
    alignment = ["---" if has_words else "---:" for has_words in words]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows))


def section(title: str, columns: list[str], rows: list[list[str]], *notes: str) -> str:
    lines = [f"- {note}" for note in notes]
    return "\n".join([f"## {title}", "", table(columns, rows) if rows else "", "", *lines, ""])


def count(number: int | None) -> str:
    """The number with thousands separators, as in 1,024; "-" for None."""
    return "-" if number is None else f"{number:,}"
