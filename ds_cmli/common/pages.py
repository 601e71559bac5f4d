"""Writes self-contained HTML pages from the package's Jinja templates."""

import base64
from pathlib import Path
from typing import Any

from ds_cmli.common.errors import UserError


def write_page(path: str | Path, setting: str, package: str, template: str, **values: Any) -> None:
    """Fill `template`, a file of `package`, with `values` and write it to `path`.

    Templates extend `page.html.jinja`, which has the head, and the colours on light and dark paper.

    Args:
        setting: what gave the path, for the error message.

    Raises:
        UserError: the file cannot be written.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape

    folders = ChoiceLoader([PackageLoader(name, ".") for name in (package, "ds_cmli.common")])
    environment = Environment(loader=folders, autoescape=select_autoescape(["jinja"]))
    text = environment.get_template(template).render(values)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{setting} is {str(path)!r}: cannot write it: {error.strerror}") from None


def data_url(image: bytes, kind: str) -> str:
    """An encoded image, "png" or "jpeg", as a `data:` URL, with which the page itself holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
