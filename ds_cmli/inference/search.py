"""`ds-cmli-search INDEX "a red car"` finds pictures that match a text, and prints them or writes a
page.
"""

import io
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ds_cmli.common import documents
from ds_cmli.common.cli import check_writable, json_on_stdout, run_command
from ds_cmli.common.errors import UserError

DEMO_ONLY = "this model was trained on the demo and knows its scenes of emoji pictures; of photographs it knows little"


@click.command()
@click.argument("index")
@click.argument("texts", nargs=-1, metavar="[TEXT ...]")
@click.option(
    "--build",
    "pictures",
    default=None,
    metavar="FOLDER",
    help="First embed this folder's pictures into it.",
)
@click.option(
    "--model",
    "model_path",
    default=None,
    metavar="RUN",
    help="A run's folder.  [default: the index's own]",
)
@click.option("-k", "k", default=10, show_default=True, help="Results of each text.")
@click.option(
    "--candidates",
    default=None,
    type=int,
    help="The best by global score, ordered by CMLI too.  [default: 200; all of up to 2000, and for a model "
    "without a global loss]",
)
@click.option("--batch-size", default=32, show_default=True, help="Pictures embedded at a time.")
@click.option(
    "--page",
    default=None,
    metavar="FILE",
    help="Write the results with their pictures as an HTML page.",
)
@click.option("--json", "as_json", is_flag=True, help="One object a text, a line each.")
def command(
    index: str,
    texts: tuple[str, ...],
    pictures: str | None,
    model_path: str | None,
    k: int,
    candidates: int | None,
    batch_size: int,
    page: str | None,
    as_json: bool,
) -> None:
    """Search an index of pictures by text."""
    if pictures is None and not texts:
        raise UserError(
            "nothing to do: give --build FOLDER to make the index, or a text to search for"
        )
    if pictures is not None and model_path is None:
        raise UserError("--build needs --model: give the run whose student embeds the pictures")
    _check_effect(pictures is not None, bool(texts))
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: give at least 1")
    if page is not None:
        check_writable(page)

    with json_on_stdout(as_json) as print_json:
        from ds_cmli.export.folder import DEMO, sources
        from ds_cmli.inference import Index, Model

        if pictures is not None:
            assert model_path is not None
            model = Model.load(model_path)
            whole = str(Path(model_path).resolve())
            found, refused = Index.build(index, model, pictures, whole, batch_size, progress=True)
            for line in refused:
                click.echo(f"left out: {line}")
            click.echo(f"{len(found)} pictures in {index}")
        else:
            found = Index(index)
            model = Model.load(model_path or found.model_path)
        note = DEMO_ONLY if sources(model.config.data) == [DEMO] else ""
        if note:
            click.echo(f"note: {note}", err=True)
        if not texts:
            return
        results = found.search(model, texts, k, candidates)
        for text, best in zip(texts, results, strict=True):
            if as_json:
                print_json({"text": text, "results": [vars(result) for result in best]})
                continue
            click.echo(text)
            for result in best:
                scores = f"{result.score:8.3f}  global {result.global_score:.3f}  cmli {result.cmli_score:.3f}"
                click.echo(f"  {scores}  {result.name}")
        if page is not None:
            write_page(page, texts, results, note)
            click.echo(f"page: {page}")


def _check_effect(builds: bool, searches: bool) -> None:
    """Raise `UserError` for an option that was given and has no effect."""
    context = click.get_current_context()
    idle = {} if builds else {"batch_size": "without --build"}
    if not searches:
        idle |= dict.fromkeys(
            ("k", "candidates", "page", "as_json"), "without a text to search for"
        )
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
        if given and parameter.name in idle:
            raise UserError(
                f"{parameter.opts[0]} has no effect {idle[parameter.name]}: leave it out"
            )


def write_page(path: str, texts: tuple[str, ...], results: list[list[Any]], note: str = "") -> None:
    """Write the results as one self-contained HTML file with small copies of the pictures, `note`
    on top.
    """
    rows = [
        (text, [(r, _thumbnail(r.name)) for r in best])
        for text, best in zip(texts, results, strict=True)
    ]
    shown = {"title": "Search results", "rows": rows, "note": note}
    documents.write_page(path, "--page", "ds_cmli.inference", "results.html.jinja", **shown)


def _thumbnail(name: str) -> str:
    """A small copy of the picture as a data URL; empty if its file cannot be read any more."""
    from PIL import Image, ImageOps

    buffer = io.BytesIO()
    try:
        with Image.open(name) as image:
            ImageOps.fit(image.convert("RGB"), (224, 224)).save(buffer, "JPEG", quality=85)
    except (OSError, ValueError):
        return ""
    return documents.data_url(buffer.getvalue(), "jpeg")


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
