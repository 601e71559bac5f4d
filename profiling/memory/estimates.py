"""The memory estimates E1 to E5 of the source document: words, arithmetic and correct sizes.

Everything here is arithmetic on sizes; nothing is run. `implementations.py` runs the code that the
claims are about.

Shapes: B pairs per rank, P ranks, G = B * P, N image patches, M text positions, H hidden size, D
embedding dimension.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ds_cmli.cmli.op import index_dtype
from ds_cmli.config.schema import check
from profiling.scripts import readable

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

    def __post_init__(self):
        for name, value in vars(self).items():
            least = SPECIAL_TOKENS + 1 if name == "M" else 1
            check(value >= least, f"--{name}", value, f"give {least} or more")

    @property
    def G(self) -> int:
        return self.B * self.P


DOCUMENT = Setting()


@dataclass(frozen=True)
class Step:
    """One line of the document's arithmetic."""

    text: str  # the formula with its numbers
    value: int  # its correct result
    # The result that the document prints, to its digits; None in any setting but the document's.
    stated: int | None
    # The unit in which the document prints it; other units than 1 are rounded to two decimals.
    unit: int = 1

    @property
    def right(self) -> bool:
        return self.stated is None or abs(self.value - self.stated) * 200 <= self.unit


@dataclass(frozen=True)
class Claim:
    id: str
    topic: str
    quote: str  # from the document
    figure: str  # the document's result, as printed there
    steps: tuple[Step, ...]
    # The result of the numbers that the document multiplies; None if it has no such result.
    document_bytes: int | None
    arithmetic_bytes: int | None  # the correct result of the formula as written
    stored: dict[str, int]  # implementation -> bytes of the largest tensor that it stores
    verdict: str
    remember: str  # the conclusion in one sentence; "" if it depends on a prediction

    @property
    def arithmetic(self) -> str:
        """A verdict on the numbers that the document prints."""
        if all(s.stated is None for s in self.steps):
            return "no numbers of the document"
        wrong = next((s for s in self.steps if not s.right), None)
        return f"wrong: {wrong.text} = {wrong.value:,}, not {wrong.stated:,}" if wrong else "right"


def claims(s: Setting = DOCUMENT) -> dict[str, Claim]:
    """All claims of the document by id, computed with the sizes of `s`."""
    every = (global_contrastive(s), all_pairs(s), target_cmli(s), step_left(s), valid_positions(s))
    return {claim.id: claim for claim in every}


def sentences(every: Iterable[Claim]) -> list[str]:
    """What the document claims, and what is really stored, in one sentence each."""
    known = [c for c in every if c.document_bytes is not None and c.stored]
    if not known:
        return []
    said = ", ".join(f"{c.figure} for {c.topic} ({c.id})" for c in known)
    least = ", ".join(f"{readable(min(c.stored.values()))} for {c.id}" for c in known)
    return [
        f"The document claims that a step needs {said}.",
        f"It counts every product of every dot product; a matrix product stores one number each, at the least {least}.",
    ]


def _stated(s: Setting, number: int) -> int | None:
    return number if s == DOCUMENT else None


def global_contrastive(s: Setting, itemsize: int = 4) -> Claim:
    """E1. `itemsize`: bytes of one element, by default of float32 as in the document."""
    dots = s.G**2
    product = dots * s.H * itemsize
    return Claim(
        id="E1",
        topic="global contrastive loss",
        quote="we already need 262,144 * 768 * 4 bytes = 805.31 MB of GPU memory",
        figure="805.31 MB",
        steps=(
            Step(f"({s.B} * {s.P})^2", dots, _stated(s, 262_144)),
            Step(f"{dots:,} * {s.H} * {itemsize}", product, _stated(s, 805_310_000), 10**6),
        ),
        document_bytes=product,
        arithmetic_bytes=product,
        stored={
            "broadcast": product,
            "materialised": dots * itemsize,
            "ours": s.B * s.G * itemsize,
        },
        verdict=f"one number too many: a dot product is stored as 1 number, not as its {s.H} products",
        remember=f"A matrix product stores one number for each dot product: {dots * itemsize / 1e6:,.1f} MB, "
        f"1/{s.H} of the estimate.",
    )


def all_pairs(s: Setting, itemsize: int = 4) -> Claim:
    """E2. The document prints 256 * 12,544 = 6,422,528, which is really 512 * 12,544; its figure
    is based on that.
    """
    pair = s.N * s.M
    written, printed, every = s.B * pair, s.G * pair, s.G**2 * pair
    result = printed * s.D * itemsize
    tokens, patches = s.N * index_dtype(s.M).itemsize, s.M * index_dtype(s.N).itemsize
    indices = s.B * s.G * (tokens + patches)
    return Claim(
        id="E2",
        topic="all-pairs CMLI",
        quote="the number of dot products increases from 262,144 to 256 * 12,544 = 6,422,528 [...] we need "
        "6,422,528 * 256 * 4 bytes = 6.58 GB of additional GPU memory, just to store the result",
        figure="6.58 GB",
        steps=(
            Step(f"{s.N} * {s.M}", pair, _stated(s, 12_544)),
            Step(f"{s.B} * {pair:,}", written, _stated(s, 6_422_528)),
            Step(f"{printed:,} * {s.D} * {itemsize}", result, _stated(s, 6_580_000_000), 10**9),
        ),
        document_bytes=result,
        arithmetic_bytes=written * s.D * itemsize,
        stored={
            "broadcast": every * s.D * itemsize,
            "materialised": s.B * s.G * pair * itemsize,
            "ours": s.B * s.G * max(tokens, patches, 4),
            "materialised, all": every * itemsize,
        },
        verdict=f"all pairs are {s.G}^2 * {pair:,} = {every:,} dot products, of one number each",
        remember="Exact scores of all pairs need no similarity kept, only which patch or token won: "
        f"{indices / 1e6:,.1f} MB on a rank.",
    )


def target_cmli(s: Setting, itemsize: int = 2) -> Claim:
    """E3. `itemsize`: bytes of one element, by default of a 16-bit type as in the document."""
    pair = s.N * s.M
    dots = s.B * pair
    product = dots * s.D * itemsize
    return Claim(
        id="E3",
        topic="Target-CMLI",
        quote="12,544 * 256 = 3,211,264 dot products [...] just 3,211,264 * 256 * 2 bytes = 1.64 GB of additional GPU "
        "memory is required",
        figure="1.64 GB",
        steps=(
            Step(f"{pair:,} * {s.B}", dots, _stated(s, 3_211_264)),
            Step(f"{dots:,} * {s.D} * {itemsize}", product, _stated(s, 1_640_000_000), 10**9),
        ),
        document_bytes=product,
        arithmetic_bytes=product,
        stored={
            "broadcast": product,
            "materialised": dots * itemsize,
            # Matching runs in fp32, so that rounding decides no maximum. The largest tensor is the
            # fp32 copy of the longer side's features, or the similarities.
            "ours": max(s.B * max(s.N, s.M) * s.D, dots) * 4,
        },
        verdict=f"one number too many again: {s.D} times what one similarity a patch and token takes",
        remember=f"Matching the positive pairs takes {dots * itemsize / 1e6:,.1f} MB, 1/{s.D} of the estimate.",
    )


def step_left(s: Setting) -> Claim:
    """E4: a remark about a whole training step without a formula, which only a step can answer."""
    return Claim(
        id="E4",
        topic="what a step leaves free",
        quote="which is still manageable, since we have around 2 GB of GPU memory remaining for a step",
        figure="2 GB",
        steps=(),
        document_bytes=2 * 10**9,
        arithmetic_bytes=None,
        stored={},
        verdict="about the whole step: no formula can answer it, the step itself does",
        remember="",  # `tables.remember_document` derives it from the predictions
    )


def valid_positions(s: Setting) -> Claim:
    """E5: the document computes with all M positions, though two of them are ignored."""
    kept = s.M - SPECIAL_TOKENS
    pair = s.N * kept
    return Claim(
        id="E5",
        topic="text positions",
        quote="With a maximum text sequence length of 64 tokens, two of which are ignored as they are the cls and eos "
        "token [...] 196 * 64 = 12,544",
        figure="12,544",
        steps=(Step(f"{s.N} * {kept}", pair, _stated(s, 12_544)),),
        document_bytes=None,
        arithmetic_bytes=None,
        stored={
            f"E2 materialised, {kept} of {s.M}": s.B * s.G * pair * 4,
            f"E3 materialised, {kept} of {s.M}": s.B * pair * 2,
        },
        verdict=f"{s.M} positions hold at most {kept} tokens: {pair:,} dot products a pair",
        remember=f"Two of {s.M} positions are never tokens: {SPECIAL_TOKENS / s.M:.0%} off what is stored for them.",
    )


def zero_model_states(parameters: int, world_size: int, stage: int) -> dict[str, int]:
    """Bytes per rank by the ZeRO paper (Rajbhandari et al., 2020, section 3): 16 bit, Adam.

    A parameter takes 2 bytes, its gradient 2, and its optimizer states 12: an fp32 copy and two
    moments. Stage 1 partitions the optimizer states over the ranks, stage 2 also the gradients,
    stage 3 also the parameters, stage 0 nothing.
    """
    check(stage in (0, 1, 2, 3), "zero_optimization.stage", stage, "give 0, 1, 2 or 3")

    def share(of: int, from_stage: int) -> int:
        return -(-of // world_size) if stage >= from_stage else of

    return {
        "parameters": share(2 * parameters, 3),
        "gradients": share(2 * parameters, 2),
        "master weights": share(4 * parameters, 1),
        "optimizer states": share(8 * parameters, 1),
    }
