"""`python -m ds_cmli.export RUN DIR` writes a trained model as a folder that transformers loads."""

import os
import tempfile
from pathlib import Path

import click

from ds_cmli.common import quiet
from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError

FORMATS = """\
open_clip: not written. Its models are two towers that end in one vector each; blocks over both modalities, and \
patches and tokens to compare, have no place in open_clip_config.json.
sentence-transformers, PyLate: not written. A SentenceTransformer holds one vector a text, a PyLate ColBERT the tokens \
of texts alone and scores queries by a sum one way; neither holds pictures beside texts under shared blocks, nor \
scores both ways. Their indexes take the unit vectors of get_text_features and get_image_features."""


@click.command()
@click.argument("run", metavar="RUN")
@click.argument("folder", metavar="DIR")
@click.option("--tokenizer", default=None, help="In place of the one that the run names.")
@click.option(
    "--ema", is_flag=True, help="The averaged weights (optim.ema_decay), in place of the last ones."
)
@click.option(
    "--onnx/--no-onnx",
    default=None,
    help="Both towers as ONNX.  [default: where the extra 'export' is installed]",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Evaluate what was exported, for the card.",
)
def command(
    run: str, folder: str, tokenizer: str | None, ema: bool, onnx: bool | None, measure: bool
) -> None:
    """Write the student of RUN into the new folder DIR."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"DIR is {folder!r}: it exists and is not empty; give a new folder")
    from ds_cmli.export import onnx as towers_onnx

    with_onnx = towers_onnx.installed() if onnx is None else onnx
    if with_onnx and not towers_onnx.installed():
        raise UserError("--onnx needs onnxscript and onnxruntime: pip install 'ds-cmli[export]'")
    from ds_cmli.export import results, towers, write
    from ds_cmli.export.card import write_card

    config, objective, whole, words = write.load_run(Path(run), tokenizer, ema)
    parent = target.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"DIR is {folder!r}: cannot write there: {error.strerror}") from None
    # The folder gets its name only after everything in it has been written and checked.
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}-") as made:
        out = Path(made) / "model"
        out.mkdir()
        model = write.write_model(out, config, objective, whole, words)
        found = results.of_run(out, Path(run), config, tokenizer, ema, measure)
        write_card(out, Path(run), model, config, found, with_onnx)
        lines = [
            f"{folder}: loads by AutoModel and AutoProcessor, features equal to the run's to the bit"
        ]
        image, ids, mask = write.example(model)
        lines.append(towers.write_image_encoder(out / towers.IMAGE, model, image))
        lines.append(towers.write_text_encoder(out / towers.TEXT, model, whole, ids, mask))
        if with_onnx:
            lines += towers_onnx.write_onnx(out / "onnx", model, image, ids, mask)
        else:
            lines.append(
                "no ONNX: pip install 'ds-cmli[export]'" if onnx is None else "no ONNX, as asked"
            )
        for file in out.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes its files readable for their owner only
        write.write_checksums(out)
        if target.exists():
            target.rmdir()
        os.replace(out, target)
    lines.append(
        f"{write.CHECKSUMS}: `sha256sum --check {write.CHECKSUMS}` in the folder tells whether a file is damaged"
    )
    for line in [*lines, *FORMATS.splitlines()]:
        click.echo(line)


if __name__ == "__main__":
    quiet.silence()
    run_command(command)
