"""Tables as Markdown, which rich shows on a terminal."""


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Columns of numbers are right-aligned."""
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
