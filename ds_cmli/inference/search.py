"""`ds-cmli-search INDEX "a red car"` finds pictures that match a text."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ds_cmli.common import documents
from ds_cmli.common.cli import check_writable, json_on_stdout, run_command
from ds_cmli.common.errors import UserError
from ds_cmli.config.plugins import plugin_option

if TYPE_CHECKING:
    from ds_cmli.inference import Index, Model, Result

DEMO_ONLY = (
    "this model was trained on the demo and knows its scenes of emoji pictures; of photographs it "
    "knows little"
)


@dataclass(frozen=True)
class SearchOptions:
    """The arguments of the command."""

    index: str
    texts: tuple[str, ...]
    pictures: str | None
    model_path: str | None
    k: int
    candidates: int | None
    batch_size: int
    page: str | None
    as_json: bool


@click.command()
@plugin_option
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
@click.option("-k", "k", default=10, show_default=True, help="Number of results per text.")
@click.option(
    "--candidates",
    default=None,
    type=int,
    help="How many of the best by global score CMLI orders.  [default: 200; all of up to 2000, and "
    "for a model without a global loss]",
)
@click.option("--batch-size", default=32, show_default=True, help="Pictures per batch.")
@click.option(
    "--page",
    default=None,
    metavar="FILE",
    help="Write the results with their pictures as an HTML page.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per text.")
def command(**arguments: Any) -> None:
    """Search an index of pictures by text."""
    options = SearchOptions(**arguments)
    _check(options)
    with json_on_stdout(options.as_json) as print_json:
        from ds_cmli.export.folder import DEMO, sources

        index, model = _opened(options)
        note = DEMO_ONLY if sources(model.config.data) == [DEMO] else ""
        if note:
            click.echo(f"note: {note}", err=True)
        if not options.texts:
            return
        results = index.search(model, options.texts, options.k, options.candidates)
        for text, best in zip(options.texts, results, strict=True):
            if options.as_json:
                print_json({"text": text, "results": list(map(vars, best))})
                continue
            click.echo(text)
            for result in best:
                parts = f"global {result.global_score:.3f}  cmli {result.cmli_score:.3f}"
                if result.flair_score is not None:
                    parts += f"  flair {result.flair_score:.3f}"
                click.echo(f"  {result.score:8.3f}  {parts}  {result.name}")
        if options.page is not None:
            write_page(options.page, options.texts, results, note)
            click.echo(f"page: {options.page}")


def _check(options: SearchOptions) -> None:
    """Raise `UserError` where something is missing, or an option was given that has no effect."""
    if options.pictures is None and not options.texts:
        raise UserError(
            "nothing to do: give --build FOLDER to make the index, or a text to search for"
        )
    if options.pictures is not None and options.model_path is None:
        raise UserError("--build needs --model: give the run whose student embeds the pictures")
    idle = {}
    if options.pictures is None:
        idle["batch_size"] = "without --build"
    if not options.texts:
        for name in ("k", "candidates", "page", "as_json"):
            idle[name] = "without a text to search for"
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
        if given and parameter.name in idle:
            raise UserError(
                f"{parameter.opts[0]} has no effect {idle[parameter.name]}: leave it out"
            )
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}: give at least 1")
    if options.page is not None:
        check_writable(options.page)


def _opened(options: SearchOptions) -> tuple["Index", "Model"]:
    """The index, built first if that is requested, and its model."""
    from ds_cmli.inference import Index, Model

    if options.pictures is None:
        index = Index(options.index)
        return index, Model.load(options.model_path or index.model_path)
    assert options.model_path is not None
    model = Model.load(options.model_path)
    whole = str(Path(options.model_path).resolve())
    index, refused = Index.build(
        options.index, model, options.pictures, whole, options.batch_size, progress=True
    )
    for line in refused:
        click.echo(f"left out: {line}")
    click.echo(f"{len(index)} pictures in {options.index}")
    return index, model


def write_page(
    path: str, texts: Sequence[str], results: Sequence[Sequence["Result"]], note: str = ""
) -> None:
    """Write the results as one HTML file with small copies of the pictures, `note` on top."""
    rows = []
    for text, best in zip(texts, results, strict=True):
        rows.append((text, [(result, _thumbnail(result.name)) for result in best]))
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
