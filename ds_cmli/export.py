"""Writes a trained model for other programs: `python -m ds_cmli.export RUN DIR --as clip`.

It goes by the names of the tensors in the run's file: those that are not trained keep their bytes.
"""

import json
import math
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds_cmli.common import provenance, quiet
from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError, blame
from ds_cmli.common.pretrained import loading
from ds_cmli.config import dual, open_clip
from ds_cmli.config.plugins import plugin_option
from ds_cmli.config.schema import Config, load_config
from ds_cmli.config.sources import RUN, Source

if TYPE_CHECKING:
    from torch import Tensor

Weights = dict[str, "Tensor"]
README = """\
---
library_name: {library}
license: {licence}
---

# {name}

An image-text model: {what} of a run of ds-cmli {version}. The licences of what it was trained from
hold for it: {origins}.

```python
{code}
```
"""
LOADED = """\
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{0}"), AutoProcessor.from_pretrained("{0}")"""
CODE = {
    "": f"import ds_cmli.models.hf\n{LOADED}",
    "open_clip": 'import open_clip\n\nmodel, transform = open_clip.create_model_from_pretrained("'
    'local-dir:{0}")',
}
# Where the parts of a student are in the library's models: towers and heads of images and texts.
PARTS = ("image.model.", "text.model.", "image.class_head.", "text.class_head.")
NAMES = {
    "clip": ("vision_model.", "text_model.", "visual_projection.", "text_projection."),
    "siglip": ("vision_model.", "text_model.", "", "text_model.head."),
    "open_clip": ("visual.", "", "visual.proj.", "text_projection."),
}


@click.command()
@plugin_option
@click.argument("run", metavar="RUN")
@click.argument("folder", metavar="DIR")
@click.option(
    "--as",
    "kind",
    type=click.Choice(list(NAMES)),
    help="Write the model of transformers or of open_clip that the run began as (student.source).",
)
@click.option("--ema", is_flag=True, help="Use the averaged weights (optim.ema_decay).")
@click.option(
    "--interpolate",
    "share",
    metavar="SHARE",
    type=click.FloatRange(0, 1),
    help="Weights between those of student.source, 0, and the trained ones, 1 (WiSE-FT).",
)
def command(run: str, folder: str, kind: str | None, ema: bool, share: float | None) -> None:
    """Write the model of RUN into the new folder DIR; without --as, as one of this package."""
    source, target = Path(run), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"DIR is {folder!r}: it exists and is not empty; give a new folder")
    config = load_config(source / RUN, "the run")
    own, blocks = config.student.source_config, config.student.shared_blocks
    began = own.get("model_type", "two encoders")
    if kind is not None and began.replace("siglip2", "siglip") != kind:
        raise UserError(f"--as is {kind!r}, and the run's student began as {began}")
    if kind is not None and blocks:
        raise UserError(f"--as is {kind!r}: its models have no shared blocks, the run has {blocks}")
    if share is not None and not config.student.source:
        raise UserError("--interpolate has no effect: the run has no student.source: leave it out")

    from safetensors.torch import load_file

    from ds_cmli.checkpoint.weights import write_weights
    from ds_cmli.models import hf

    file = hf.AVERAGE if ema else hf.WEIGHTS
    model = hf.load(source, file, "the run")
    weights, what = load_file(source / file), "the averaged weights" if ema else "the weights"
    if share is not None:
        weights = between(config, model.config, weights, share)
        what = f"{share:g} of the way from student.source to {what}"
    parent = target.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    # The folder gets its name only after everything in it has been written.
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}-") as made:
        out = Path(made) / "model"
        out.mkdir()
        processor = hf.CMLIProcessor.from_pretrained(source)
        if kind is None:
            model.config.save_pretrained(out)
            processor.save_pretrained(out)
            write_weights(weights, out / hf.WEIGHTS)
        else:
            write = write_open_clip if kind == "open_clip" else write_transformers
            with loading(hub=False), blame(f"--as {kind}"):
                write(out, config, weights)
                processor.tokenizer.save_pretrained(out)
        licence, origins = origins_of(config)
        readme = README.format(
            library="open_clip" if kind == "open_clip" else "transformers",
            licence=licence,
            name=target.resolve().name,
            what=what,
            version=provenance.version(),
            origins=origins,
            code=CODE.get(kind or "", LOADED).format(target.name),
        )
        (out / "README.md").write_text(readme, errors="backslashreplace")
        for path in out.iterdir():
            path.chmod(0o644)  # safetensors makes its files readable for their owner only
        if target.exists():
            target.rmdir()
        os.replace(out, target)
    click.echo(f"{folder}: {what} of {run}{f', as {kind}' if kind else ''}")


def between(config: Config, model: Any, trained: Weights, share: float) -> Weights:
    """(1 - share) * source + share * trained of each weight and temperature, at 0 and 1 an end's
    to the bit. This is WiSE-FT (Wortsman et al., 2022, arXiv 2109.01903).

    Args:
        model: the run's `CMLIConfig`.
    """
    from ds_cmli.data.tokens import SpecialTokens
    from ds_cmli.engine import build_models

    student = replace(config.student, lora={}, freeze_image=0, freeze_text=0)
    loss = replace(config.loss, weights=dict(model.losses) or {"global": 1.0}, start={})
    start = replace(config, student=student, loss=loss)
    special = SpecialTokens(model.pad_id, model.class_first)
    begun = build_models(start, model.vocab_size, special=special)[0].state_dict()
    out = {}
    for name, value in trained.items():
        mixed = name in begun and share < 1 and value.is_floating_point()
        out[name] = begun[name].to(value.dtype).lerp(value, share) if mixed else value
    return out


def renamed(weights: Weights, kind: str, loss: str, text: str = "") -> Weights:
    """The weights by the library's names, with the temperature and bias of its loss.

    Args:
        text: what stands before the names of its text tower.
    """
    out = {}
    for part, name in zip(PARTS, NAMES[kind], strict=True):
        before, after = f"student.{part}", text * part.startswith("text") + name
        for key in weights:
            if key.startswith(before):
                out[after + key.removeprefix(before)] = weights[key]
    for name in ("logit_scale", "logit_bias"):
        learned = weights.get(f"losses.{loss}.temperature.{name}")
        if learned is not None:
            out[name] = learned
    return out


def write_transformers(folder: Path, config: Config, weights: Weights) -> None:
    """Write a `CLIPModel` or `SiglipModel` of transformers."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, CLIPImageProcessor, SiglipImageProcessor

    from ds_cmli.checkpoint.weights import write_weights

    fields = {name: value for name, value in config.student.source_config.items()}
    how = {"image_mean": fields.pop("mean"), "image_std": fields.pop("std")}
    library = CONFIG_MAPPING[fields["model_type"]].from_dict(json.loads(json.dumps(fields)))
    with torch.device("meta"):
        model = AutoModel.from_config(library)
    # Where its loss was not trained, as a new model's.
    new = {"logit_scale": math.log(10), "logit_bias": -10.0}
    if library.model_type == "clip":
        new = {"logit_scale": library.logit_scale_init_value}
    kind = "clip" if library.model_type == "clip" else "siglip"
    given = {name: torch.tensor(value) for name, value in new.items()}
    given |= renamed(weights, kind, dual.loss_of(fields))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    write_weights(
        {key: given[key].reshape(shapes[key]) for key in shapes}, folder / "model.safetensors"
    )
    library.architectures, library.dtype = [type(model).__name__], "float32"
    library.save_pretrained(folder)
    side = config.data.image_size
    square = {"height": side, "width": side}
    how["resample"] = {name: n for n, name in dual.INTERPOLATIONS.items()}[
        config.data.interpolation
    ]
    if config.data.resize == "shortest":
        pictures = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square, **how)
    elif kind == "clip":
        pictures = CLIPImageProcessor(size=square, do_center_crop=False, **how)
    else:
        pictures = SiglipImageProcessor(size=square, **how)
    pictures.save_pretrained(folder)


def write_open_clip(folder: Path, config: Config, weights: Weights) -> None:
    """Write a model of open_clip, without a CoCa's decoder of captions, and load it."""
    import torch
    from open_clip import create_model_from_pretrained

    from ds_cmli.checkpoint.weights import write_weights
    from ds_cmli.models.open_clip import FILES, of_towers

    own = config.student.source_config
    model = of_towers(own)
    custom = "text." * bool(model.get("custom_text") or "text_config" in own)
    new = {
        "logit_scale": model.get("init_logit_scale", math.log(1 / 0.07)),
        "logit_bias": model.get("init_logit_bias"),
    }
    given = {name: torch.tensor(float(x)) for name, x in new.items() if x is not None}
    given |= renamed(weights, "open_clip", open_clip.loss_of(own), custom)
    shape = [1] * bool(model.get("nonscalar_logit_scale"))
    bare = ["visual.proj"]  # which are a matrix [H, E] there, and no layer
    if not model["text_cfg"].get("proj_bias"):
        bare.append(f"{custom}text_projection")
    out = {}
    for name, value in given.items():
        if name in new:
            value = value.reshape(shape)
        elif name.removesuffix(".weight") in bare:
            name, value = name.removesuffix(".weight"), value.t()
        out[re.sub(r"\.in_proj\.(\w+)$", r".in_proj_\1", name)] = value
    write_weights(out, folder / FILES[0])
    data = config.data
    how = {"mean": own["mean"], "std": own["std"], "interpolation": data.interpolation}
    how["resize_mode"] = {ours: theirs for theirs, ours in open_clip.RESIZING.items()}[data.resize]
    content = {"model_cfg": model, "preprocess_cfg": how}
    (folder / open_clip.CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    create_model_from_pretrained(f"{open_clip.LOCAL}{folder}", return_transform=False)


def origins_of(config: Config) -> tuple[str, str]:
    """The licence of the model that a run began as, and what it was trained from, in words."""
    from huggingface_hub import ModelCard

    from ds_cmli.data.assets import ASSETS, used

    begun, licence = config, "other"
    while (source := Source(begun.student.source)).name and source.has_own_data:
        begun = load_config(source.path / RUN, "student.source")
    student, lines = begun.student, []
    if source.name:
        with suppress(Exception), loading(hub=not source.local):  # what others wrote, or nothing
            card = source.path / "README.md" if source.local else source.place
            licence = ModelCard.load(card).data.license or licence
        found = licence if licence != "other" else "as its own page says"
        lines.append(
            f"the model {Path(source.place).name if source.local else source.name} ({found})"
        )
    else:
        for model, of in (
            (student.image_model, student.image_weights),
            (student.text_model, student.text_weights),
        ):
            lines.append(f"{model} with {Path(of).name} weights")
    lines += [ASSETS[name].licence for name in used(config)]
    data = [config.data.source] if isinstance(config.data.source, str) else config.data.source
    return licence, "; ".join([*lines, f"data: {', '.join(Path(name).name for name in data)}"])


def main() -> None:
    quiet.silence()
    run_command(command)


if __name__ == "__main__":
    main()
