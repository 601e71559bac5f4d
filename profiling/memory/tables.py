"""E1, E2, E3 and E5 as sentences, and as tables of at most 100 columns."""

from collections.abc import Iterable

from profiling.memory.estimates import DOCUMENT, Claim, Setting
from profiling.memory.measure import Row
from profiling.scripts import Table, count


def arithmetic_table(claims: Iterable[Claim], s: Setting) -> Table:
    """Every step of the document's arithmetic, recomputed, with a verdict."""
    rows = []
    for claim in claims:
        rows.append([claim.id, claim.topic, f"says {claim.figure}", "", claim.verdict])
        for step in claim.steps:
            exact = step.stated is None or step.value == step.stated
            right = "right" if exact else "right, rounded"
            verdict = right if step.right else f"wrong: the document has {step.stated:,}"
            rows.append(["", "", step.text, count(step.value), verdict if s == DOCUMENT else ""])
    notes = [f'{claim.id}: "{claim.quote}"' for claim in claims]
    sizes = ", ".join(f"{name}={value}" for name, value in vars(s).items())
    title = f"What the document says: {sizes}{' (the document)' if s == DOCUMENT else ''}"
    return Table(title, ["id", "about", "step", "comes to", ""], rows, notes)


def sentences_measured(rows: list[Row]) -> list[str]:
    measured = [row for row in rows if row.measured_bytes is not None]
    out = []
    if measured:
        largest = sum(row.measured_bytes == row.predicted_bytes for row in measured)
        peaks = sum(row.measured_peak_bytes == row.predicted_peak_bytes for row in measured)
        where = measured[0].measured_on.split(",")[0]
        out.append(
            f"Measured by the {where}: {largest} of {len(measured)} largest allocations and {peaks} of "
            f"{len(measured)} peaks equal the predicted ones."
        )
    less = [f"{row.id} {row.implementation}" for row in rows if row.measured_bytes is None]
    if less:
        out.append(f"Not measured, as the tables say why: {', '.join(less)}.")
    return out


def rows_tables(rows: list[Row], claims: dict[str, Claim]) -> list[Table]:
    sizes, peaks = [], []
    for row in rows:
        name = f"{row.id} {row.implementation}"
        stored = row.document_bytes, row.corrected_bytes, row.predicted_bytes, row.measured_bytes
        sizes.append([name, *map(count, stored)])
        peak = row.predicted_peak_bytes, row.measured_peak_bytes
        peaks.append([name, *map(count, peak), row.measured_on])
    notes = ["corrected, predicted, measured: the largest single allocation of forward."]
    notes += [f"{id}: {claims[id].remember}" for id in dict.fromkeys(row.id for row in rows)]
    note = "Peak: the most held above what was live before, over the passes named."
    return [
        Table("E1, E2, E3, E5: what is stored",
              ["", "document B", "corrected B", "predicted B", "measured B"], sizes, notes),
        Table("E1, E2, E3, E5: at the peak",
              ["", "predicted B", "measured B", "measured on"], peaks, [note]),
    ]  # fmt: skip
