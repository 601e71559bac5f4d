"""What the comparison of estimates found, as tables: for the terminal and as Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ds_cmli.memory.compare import GB, Row
from ds_cmli.memory.estimates import DOCUMENT, Claim, Setting
from ds_cmli.memory.report import CATEGORIES, PHASES
from ds_cmli.memory.whole_step import WholeStep, describe


@dataclass
class Table:
    title: str
    columns: list[str]  # the first is text; of the others those named "B" or "GB" hold numbers
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        alignment = ["---:" if numeric(name) else "---" for name in self.columns]
        lines += [f"| {' | '.join(cells)} |" for cells in (self.columns, alignment, *self.rows)]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def show(self, console: Any) -> None:
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name in self.columns:
            table.add_column(name, justify="right" if numeric(name) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(f"  {escape(note)}", highlight=False)
        console.print()


def numeric(column: str) -> bool:
    return column.endswith((" B", " GB"))


def count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def describe_setting(s: Setting) -> str:
    sizes = ", ".join(f"{name}={value}" for name, value in vars(s).items())
    return f"{sizes}{' (the document)' if s == DOCUMENT else ''}"


def arithmetic_table(claims: Iterable[Claim], s: Setting) -> Table:
    """Every step of the document's arithmetic, computed."""
    rows = []
    for claim in claims:
        rows.append([claim.id, claim.topic, f"says {claim.figure}", "", claim.verdict])
        for step in claim.steps:
            right = "right" if step.stated is None or step.value == step.stated else "right, rounded"
            verdict = right if step.right else f"wrong: the document has {step.stated:,}"
            rows.append(["", "", step.text, count(step.value), verdict if s == DOCUMENT else ""])
    notes = [f'{claim.id}: "{claim.quote}"' for claim in claims]
    return Table(f"What the document says: {describe_setting(s)}", ["id", "about", "step", "comes to", ""], rows, notes)


def rows_table(rows: list[Row], claims: dict[str, Claim]) -> Table:
    columns = ["id", "implementation", "document B", "as written B", "true B", "predicted B", "measured B"]
    columns += ["peak, predicted B", "peak, measured B", "measured on"]
    cells = [
        [
            row.id, row.implementation,
            *map(count, (row.document_bytes, row.arithmetic_bytes, row.corrected_bytes, row.predicted_bytes,
                         row.measured_bytes, row.predicted_peak_bytes, row.measured_peak_bytes)),
            row.measured_on,
        ]
        for row in rows
    ]  # fmt: skip
    ids = dict.fromkeys(row.id for row in rows)
    notes = [
        "true, predicted, measured: the largest single allocation of forward. Peak: the most held above what was live "
        "before, over the passes named (predicted: over forward and backward).",
        *(f"{id}: {claims[id].remember}" for id in ids),
    ]
    return Table("E1, E2, E3, E5: what is stored", columns, cells, notes)


def document_table(rows: list[Row], remember: str) -> Table:
    columns = ["loss", "peak GB", "on the card GB", "student's activations GB", "temporaries GB", "verdict"]
    cells = []
    for row in rows:
        found = row.extra
        numbers = ["-"] * 4
        if found:
            categories = found["categories"]
            parts = (categories["activations student"], categories["temporaries"])
            numbers = [f"{n / GB:,.2f}" for n in (found["totals"]["requested"], found["totals"]["device"], *parts)]
        cells.append([row.implementation, *numbers, row.verdict])
    where = rows[0].measured_on if rows else ""
    notes = [
        "The document names neither card nor models: assumed, as in the preset paper. Its step is fp16 with ZeRO-2. "
        "It says that about 2 GB remain for the loss.",
        f"E4: {remember}",
    ]
    return Table(f"E4: does the document's step fit 24 GB? {where}", columns, cells, notes)


def remember_document(rows: list[Row]) -> str:
    """E4 in one sentence, from what was predicted."""
    free = {row.implementation: row.predicted_bytes for row in rows if row.predicted_bytes is not None}
    if not {"materialised", "ours"} <= free.keys():
        return "this setting was not predicted."
    return (
        f"all pairs of the batch leave {describe(free['ours'])} with ours; with every similarity stored the same step "
        f"has {describe(free['materialised'])}."
    )


def whole_step_table(found: WholeStep) -> Table:
    """One step by category and by phase: predicted, measured, by ZeRO's formula, by DeepSpeed's estimator."""
    predicted, measured = found.prediction.report.to_dict(), found.measured
    columns = ["", "predicted B", "measured B", "ZeRO's formula B", "DeepSpeed's estimator B"]

    def line(name: str, part: str, zero: int | None = None, estimator: int | None = None) -> list[str]:
        seen = measured[part].get(name) if measured else None
        return [name, *map(count, (predicted[part].get(name), seen, zero, estimator))]

    rows = [line(name, "categories", found.zero.get(name)) for name in CATEGORIES]
    rows.append(["peak: the sum", *line("requested", "totals", sum(found.zero.values()), found.deepspeed_bytes)[1:]])
    rows += [["  in " + name, *line(name, "phases")[1:]] for name in PHASES]
    total = predicted["totals"]["requested"]
    notes = [
        f"{found.parameters:,} trained parameters, {found.world_size} rank(s). Categories at the moment of the peak; "
        "formula and estimator know parameters, gradients and optimizer states only."
    ]
    if measured:
        error = total / measured["totals"]["requested"] - 1
        notes.append(f"The prediction is {abs(error):.2%} {'above' if error > 0 else 'below'} the measurement.")
    else:
        notes.append(f"not measured: {found.not_measured}")
    if found.deepspeed_bytes:
        notes.append(f"DeepSpeed's estimator sees {found.deepspeed_bytes / total:.0%} of the peak.")
    where = f"measured: {measured['source'].removeprefix('measured: ')}" if measured else "not measured"
    return Table(f"The whole step: preset {found.preset}, {where}", columns, rows, notes)
