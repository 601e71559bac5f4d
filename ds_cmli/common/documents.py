"""Tables as Markdown, and self-contained HTML pages."""

import base64
from pathlib import Path

from ds_cmli.common.errors import UserError


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    alignment = ["---" + ":" * is_numeric(name) for name in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows))


def is_numeric(column: str) -> bool:
    """Whether a column is right-aligned: its last word is "B", "GB" or "share"."""
    return column.rsplit(" ", 1)[-1] in ("B", "GB", "share")


def write_page(
    path: str | Path, setting: str, package: str, template: str, **values: object
) -> None:
    """Fill `template`, a file of `package`, with `values` and write it to `path`.

    Templates extend `page.html.jinja`, which has the head, and the colours on light and dark paper.

    Args:
        setting: what gave the path, for the error message.

    Raises:
        UserError: the file cannot be written.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape

    folders = ChoiceLoader([PackageLoader(package, "."), PackageLoader("ds_cmli.common", ".")])
    environment = Environment(loader=folders, autoescape=select_autoescape(["jinja"]))
    text = environment.get_template(template).render(values)
    try:
        # Names of files and texts of JSON may hold halves of surrogate pairs.
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{setting} is {str(path)!r}: cannot write it: {error.strerror}") from None


def data_url(image: bytes, kind: str) -> str:
    """An encoded image, "png" or "jpeg", as a `data:` URL, with which the page itself holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
