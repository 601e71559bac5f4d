"""The comparison with the document as sentences, and as tables of at most 100 columns."""

from collections.abc import Iterable

from ds_cmli.memory.report import CATEGORIES, PHASES
from profiling.memory.document.compare import GB, Row
from profiling.memory.document.estimates import DOCUMENT, Claim, Setting
from profiling.memory.document.steps import WholeStep, describe
from profiling.scripts import Table, count


def describe_setting(s: Setting) -> str:
    sizes = ", ".join(f"{name}={value}" for name, value in vars(s).items())
    return f"{sizes}{' (the document)' if s == DOCUMENT else ''}"


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
    title = f"What the document says: {describe_setting(s)}"
    return Table(title, ["id", "about", "step", "comes to", ""], rows, notes)


def sentences_found(rows: list[Row], document: list[Row], step: WholeStep | None) -> list[str]:
    """What was measured and predicted, in one sentence each."""
    out = []
    equal = [row.equal for row in rows if row.equal is not None]
    if equal:
        where = next(row.measured_on.split(",")[0] for row in rows if row.equal is not None)
        largest, peaks = map(sum, zip(*equal, strict=True))
        out.append(
            f"Measured by the {where}: {largest} of {len(equal)} largest allocations and {peaks} of "
            f"{len(equal)} peaks equal the predicted ones."
        )
        without = [row for row in rows if row.less or row.equal is None]
        less = [f"{row.id} {row.implementation} ({row.less or 'not at all'})" for row in without]
        if less:
            out.append(f"Measured with less than the setting: {', '.join(less)}.")
    elif rows:
        out.append("Nothing was measured here: the tables give the reasons.")
    if document:
        out.append(f"A whole step (E4), predicted: {remember_document(document)}")
    if step is not None:
        out.append(f"A whole step of {step.preset}: {remember_step(step)}")
    return out


def remember_step(step: WholeStep) -> str:
    predicted = step.prediction.totals["requested"]
    if step.measured is None:
        return f"not measured: {step.not_measured}."
    measured = step.measured["totals"]["requested"]
    off = f"{predicted / measured - 1:+.3%}"
    return f"measured {measured:,} B, predicted {predicted:,} B ({off})."


def rows_tables(rows: list[Row], claims: dict[str, Claim]) -> list[Table]:
    sizes = [
        [f"{row.id} {row.implementation}",
         *map(count, (row.document_bytes, row.corrected_bytes, row.predicted_bytes, row.measured_bytes))]
        for row in rows
    ]  # fmt: skip
    ids = dict.fromkeys(row.id for row in rows)
    notes = [
        "true, predicted, measured: the largest single allocation of forward.",
        *(f"{id}: {claims[id].remember}" for id in ids),
    ]
    peaks = [
        [f"{row.id} {row.implementation}", *map(count, (row.predicted_peak_bytes, row.measured_peak_bytes)),
         row.measured_on]
        for row in rows
    ]  # fmt: skip
    peak_note = "Peak: the most held above what was live before, over the passes named; predicted for the same, or where nothing was measured, for forward and backward."
    return [
        Table("E1, E2, E3, E5: what is stored",
              ["", "document B", "true B", "predicted B", "measured B"], sizes, notes),
        Table("E1, E2, E3, E5: at the peak",
              ["", "predicted B", "measured B", "measured on"], peaks, [peak_note]),
    ]  # fmt: skip


def document_table(rows: list[Row], remember: str) -> Table:
    columns = ["loss", "peak GB", "on the GPU GB", "student's activations GB", "temporaries GB"]
    cells = []
    for row in rows:
        report = row.extra
        numbers = ["-"] * 4
        if report:
            totals, categories = report["totals"], report["categories"]
            parts = categories["activations student"], categories["temporaries"]
            sizes = totals["requested"], totals["device"], *parts
            numbers = [f"{size / GB:,.2f}" for size in sizes]
        cells.append([row.implementation, *numbers, row.verdict])
    where = rows[0].measured_on if rows else ""
    notes = [
        "The document names neither GPU nor models: assumed, as in the preset paper. Its step is fp16 with ZeRO-2. "
        "It says that about 2 GB remain for the loss.",
        f"E4: {remember}",
        "What fits other GPUs: python profiling/predict.py --preset paper --world-size 2 --fit 24GB",
    ]
    title = f"E4: does the document's step fit 24 GB? {where}"
    return Table(title, [*columns, "verdict"], cells, notes)


def remember_document(rows: list[Row]) -> str:
    """The result of E4 in one sentence, from the predictions in `rows`."""
    free: dict[str, int] = {}
    for row in rows:
        if row.predicted_bytes is not None:
            free[row.implementation] = row.predicted_bytes
    if not {"materialised", "ours"} <= free.keys():
        return "this setting was not predicted."
    return (
        f"all pairs of the batch leave {describe(free['ours'])} with ours; with every similarity stored the same step "
        f"has {describe(free['materialised'])}."
    )


def whole_step_table(step: WholeStep) -> Table:
    """A step's bytes by category and phase: predicted, measured, by ZeRO and by DeepSpeed."""
    predicted, measured = step.prediction.to_dict(), step.measured
    columns = ["", "predicted B", "measured B", "ZeRO's formula B", "DeepSpeed's estimator B"]

    def line(
        name: str, part: str, zero: int | None = None, estimator: int | None = None
    ) -> list[str]:
        seen = measured[part].get(name) if measured else None
        return [name, *map(count, (predicted[part].get(name), seen, zero, estimator))]

    rows = [line(name, "categories", step.zero.get(name)) for name in CATEGORIES]
    sums = sum(step.zero.values()), step.deepspeed_bytes
    rows.append(["peak: the sum", *line("requested", "totals", *sums)[1:]])
    rows += [["  in " + name, *line(name, "phases")[1:]] for name in PHASES]
    total = predicted["totals"]["requested"]
    notes = [
        f"{step.parameters:,} parameters, {step.world_size} rank(s), {step.pairs} pairs a rank. "
        "Categories at the moment of the peak; "
        "formula and estimator know parameters, gradients and optimizer states only."
    ]
    notes.append(remember_step(step))
    if step.deepspeed_bytes:
        notes.append(f"DeepSpeed's estimator sees {step.deepspeed_bytes / total:.0%} of the peak.")
    where = "not measured"
    if measured:
        where = f"measured: {measured['source'].removeprefix('measured: ')}"
    return Table(f"The whole step: preset {step.preset}, {where}", columns, rows, notes)
