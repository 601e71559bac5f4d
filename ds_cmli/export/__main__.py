"""`python -m ds_cmli.export RUN DIR` writes a trained model as a folder that transformers loads."""

import os
import tempfile
from pathlib import Path

import click

from ds_cmli.common import quiet
from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from ds_cmli.config.plugins import plugin_option
from ds_cmli.config.registry import DUAL


@click.command()
@plugin_option
@click.argument("run", metavar="RUN")
@click.argument("folder", metavar="DIR")
@click.option(
    "--as",
    "kind",
    type=click.Choice(list(DUAL)),
    help="Write the model of transformers or of open_clip that the run's student began as "
    "(student.source).",
)
@click.option("--tokenizer", default=None, help="Tokenizer to use instead of the run's.")
@click.option(
    "--ema", is_flag=True, help="Use the averaged weights (optim.ema_decay), not the last ones."
)
@click.option(
    "--interpolate",
    metavar="SHARE",
    type=click.FloatRange(0, 1),
    help="Weights between those of student.source, 0, and the trained ones, 1 (WiSE-FT).",
)
def command(
    run: str,
    folder: str,
    kind: str | None,
    tokenizer: str | None,
    ema: bool,
    interpolate: float | None,
) -> None:
    """Write the student of RUN into the new folder DIR.

    Without --as, it is a model of this package.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"DIR is {folder!r}: it exists and is not empty; give a new folder")
    from ds_cmli.export import folder as exported
    from ds_cmli.export import library
    from ds_cmli.export.readme import write_readme

    trained = exported.load_run(Path(run), tokenizer, ema, interpolate)
    if kind is not None:
        library.check(trained.config, kind)
    parent = target.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"DIR is {folder!r}: cannot write there: {error.strerror}") from None
    # The folder gets its name only after everything in it has been written and checked.
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}-") as made:
        out = Path(made) / "model"
        out.mkdir()
        if kind is not None:
            lines = library.write(out, trained, kind)
        else:
            exported.write_model(out, trained)
            weights = "the averaged weights (EMA)" if ema else "the weights"
            if interpolate is not None:
                weights = f"{interpolate:g} of the way from student.source to {weights}"
            weights += " of its run"
            write_readme(out, target.resolve().name, trained.config, weights)
            lines = [f"loads by AutoModel and AutoProcessor, with {weights}"]
        for file in out.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes its files readable for their owner only
        exported.write_checksums(out)
        if target.exists():
            target.rmdir()
        os.replace(out, target)
    name = exported.CHECKSUMS
    lines[0] = f"{folder}: {lines[0]}"
    lines.append(
        f"{name}: `sha256sum --check {name}` in the folder tells whether a file is damaged"
    )
    for line in lines:
        click.echo(line)


def main() -> None:
    quiet.silence()
    run_command(command)


if __name__ == "__main__":
    main()
