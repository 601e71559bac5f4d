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
        """Return whether the document's result is right, for the document's own numbers."""
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
    """Return the document's claims by id, with the sizes of `s`: fp32 in E1 and E2, 16 bit in E3."""
    kept_positions = s.M - SPECIAL_TOKENS
    # Dot products.
    pair_dots = s.N * s.M  # of a pair
    global_dots = s.G**2  # of the global loss
    rank_dots = s.B * pair_dots  # of a rank's pairs
    written_dots = s.G * pair_dots  # of all pairs, as the document counts
    all_dots = s.G**2 * pair_dots  # of all pairs
    # Bytes by the document's formulas.
    global_bytes = 4 * global_dots * s.H
    all_bytes = 4 * written_dots * s.D
    match_bytes = 2 * rank_dots * s.D
    # Bytes that are stored for a rank's images and all texts.
    similarities = 4 * s.B * s.G * pair_dots
    best_tokens = s.N * index_dtype(s.M).itemsize
    best_patches = s.M * index_dtype(s.N).itemsize
    argmax = s.B * s.G * (best_tokens + best_patches)
    coincidence = ""
    if similarities == all_bytes:
        coincidence = (
            f" (the estimate's figure, by coincidence: it multiplies by D = {s.D} features where "
            f"B = {s.B} images belong)"
        )
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
            f"all pairs are {s.G}^2 * {pair_dots:,} = {all_dots:,} dot products, a rank's similarities "
            f"{similarities / 1e9:,.2f} GB{coincidence}; none need be kept: which patch or token won is "
            f"{argmax / 1e6:,.1f} MB",
            (Line(f"{s.N} * {s.M}", pair_dots, 12_544),
             Line(f"{s.B} * {pair_dots:,}", rank_dots, 6_422_528),  # that is 512 * 12,544
             Line(f"{written_dots:,} * {s.D} * 4", all_bytes, 6_580_000_000)),
            all_bytes,
            {"broadcast": 4 * all_dots * s.D, "materialised": similarities, "materialised, all": 4 * all_dots}),
        "E3": Claim("Target-CMLI", "1.64 GB",
            "12,544 * 256 = 3,211,264 dot products [...] just 3,211,264 * 256 * 2 bytes = 1.64 GB of "
            "additional GPU memory is required",
            f"{s.D} times too much: {2 * rank_dots / 1e6:,.1f} MB of similarities",
            (Line(f"{pair_dots:,} * {s.B}", rank_dots, 3_211_264),
             Line(f"{rank_dots:,} * {s.D} * 2", match_bytes, 1_640_000_000)),
            match_bytes,
            # Ours matches in fp32, so that rounding decides no maximum. Its largest tensor is the fp32 copy
            # of the longer side's features, or the similarities.
            {"broadcast": match_bytes, "materialised": 2 * rank_dots,
             "ours": 4 * max(s.B * max(s.N, s.M) * s.D, rank_dots)}),
        "E4": Claim("what a step leaves free", "2 GB",
            "which is still manageable, since we have around 2 GB of GPU memory remaining for a step",
            "no formula answers it, but the whole step"),
        "E5": Claim("text positions", "12,544",
            "With a maximum text sequence length of 64 tokens, two of which are ignored as they are the "
            "cls and eos token [...] 196 * 64 = 12,544",
            f"at most {kept_positions} of {s.M} are tokens: {s.N * kept_positions:,} dot products a pair",
            (Line(f"{s.N} * {kept_positions}", s.N * kept_positions, 12_544),),
            None,
            {f"E2 materialised, {kept_positions} of {s.M}": 4 * s.B * s.G * s.N * kept_positions,
             f"E3 materialised, {kept_positions} of {s.M}": 2 * s.B * s.N * kept_positions}),
    }  # fmt: skip


def question(ids: Iterable[str], s: Setting) -> str:
    """Say whose estimates these are, of what, and what is asked."""
    return (
        f"{', '.join(ids)}: from the estimates of GPU memory in a draft of Tim Cares' Master's thesis (2024), for a "
        f"training step with {s.B} image-text pairs on each of {s.P} GPUs. Do they hold, and what does the step need? "
        f"(N={s.N} image patches, M={s.M} text positions, hidden size H={s.H}, embedding size D={s.D})"
    )


def sentences(selected: dict[str, Claim]) -> Iterable[str]:
    """Yield a sentence for each claim: the estimate, and what of it holds."""
    for id, claim in selected.items():
        yield f"{id}, {claim.topic}: the estimate is {claim.figure}; {claim.truth}."


def arithmetic(selected: dict[str, Claim], s: Setting) -> str:
    """Return a table of each line of the document's arithmetic, computed again, with a verdict."""
    rows = [
        [id, line.formula, count(line.value), line.verdict if s == DOCUMENT else ""]
        for id, claim in selected.items()
        for line in claim.lines
    ]
    quotes = [f'{id}: "{claim.quote}"' for id, claim in selected.items()]
    columns = ["", "formula", "comes to", "the document's result"]
    return section("The document's arithmetic", columns, rows, *quotes)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; columns of numbers are right-aligned."""
    cells_of = [cells for _, *cells in zip(columns, *rows, strict=True)]
    words = (any(cell.strip("0123456789,.-") for cell in cells) for cells in cells_of)
    alignment = ["---" if has_words else "---:" for has_words in words]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows))


def section(title: str, columns: list[str], rows: list[list[str]], *notes: str) -> str:
    lines = [f"- {note}" for note in notes]
    return "\n".join([f"## {title}", "", table(columns, rows) if rows else "", "", *lines, ""])


def count(number: int | None) -> str:
    """Return the number with thousands separators, as in 1,024; "-" for None."""
    return "-" if number is None else f"{number:,}"


def in_gigabytes(number: int | None) -> str:
    """Return a size in GB, as in 6.577; "-" for None."""
    return "-" if number is None else f"{number / 1e9:,.3f}"
