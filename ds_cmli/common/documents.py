"""Tables as Markdown."""


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    alignment = ["---" + ":" * is_numeric(name) for name in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows))


def is_numeric(column: str) -> bool:
    """Whether a column is right-aligned: its last word is "B", "GB" or "share"."""
    return column.rsplit(" ", 1)[-1] in ("B", "GB", "share")
