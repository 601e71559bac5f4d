"""Writes a trained model for other programs: `python -m ds_cmli.export RUN DIR --as clip`.

It goes by the names of the tensors in the run's file: those that are not trained keep their bytes.
"""

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ds_cmli.commands import run_command
from ds_cmli.config.registry import plugin_option
from ds_cmli.config.schema import Config, load_config
from ds_cmli.config.source import LOCAL, OPEN_CLIP, PILLOW, RUN, Source, loss_of
from ds_cmli.errors import UserError, blame
from ds_cmli.libraries import silence
from ds_cmli.pretrained import loading
from ds_cmli.provenance import version

Weights = dict[str, Any]  # tensors by name
# What a name begins with in the library's models, and in a student.
TOWERS = {"vision_model": "student.image.model", "text_model": "student.text.model"}
IMAGE, TEXT = "student.image.class_head", "student.text.class_head"
PARTS = {
    "clip": {"visual_projection": IMAGE, "text_projection": TEXT, **TOWERS},
    "siglip": {"text_model.head": TEXT, **TOWERS},
    "open_clip": {"visual": "student.image.model"},
}
FILES = {"open_clip": "open_clip_model.safetensors"}  # of weights, if not as transformers names it
NEW = {"logit_scale": math.log(1 / 0.07), "logit_bias": -10.0}  # where its loss was not trained


@click.command()
@plugin_option
@click.argument("run", metavar="RUN")
@click.argument("folder", metavar="DIR")
@click.option("--as", "kind", type=click.Choice(list(PARTS)), help="What the run began as.")
@click.option("--ema", is_flag=True, help="Use the averaged weights (optim.ema_decay).")
@click.option(
    "--interpolate",
    type=click.FloatRange(0, 1),
    help="A share: weights between those of student.source, 0, and the trained ones, 1 (WiSE-FT).",
)
def command(run: str, folder: str, kind: str | None, ema: bool, interpolate: float | None) -> None:
    """Write the model of RUN into the new folder DIR; without --as, as one of this package."""
    source, target = Path(run), Path(folder)
    config = load_config(source / RUN, "the run")
    began = config.student.source_config.get("model_type", "two encoders")
    if kind is not None and began != kind:
        raise UserError(f"--as is {kind!r}, and the run's student began as {began}")
    if kind is not None and config.student.shared_blocks:
        raise UserError(f"--as is {kind!r}: its models have no shared blocks, and the run's has")
    if interpolate is not None and not config.student.source:
        raise UserError("--interpolate has no effect: the run has no student.source: leave it out")

    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from ds_cmli.checkpoint.weights import write_weights
    from ds_cmli.models import hf

    file = hf.AVERAGE if ema else hf.WEIGHTS
    model = hf.load(source, file, "the run")
    weights, what = load_file(source / file), "the averaged weights" if ema else "the weights"
    if interpolate is not None:
        weights = between(config, model.config, weights, interpolate)
        what = f"{interpolate:g} of the way from student.source to {what}"
    with blame(f"DIR is {folder!r}: give a new folder"):
        target.mkdir(parents=True)
    try:
        if kind is None:
            model.config.save_pretrained(target)
            hf.CMLIProcessor.from_pretrained(source).save_pretrained(target)
        else:
            write = of_open_clip if kind == "open_clip" else of_transformers
            with loading(hub=False), blame(f"--as {kind}"):
                weights = fitted(weights, kind, config, write(target, config))
                # Its processor is the library's own, no more ours.
                words = AutoTokenizer.from_pretrained(source, processor_class=None)
                words.save_pretrained(target)
        write_weights(weights, target / FILES.get(str(kind), hf.WEIGHTS))
        text = readme(config, target.resolve().name, what, kind)
        (target / "README.md").write_text(text, errors="backslashreplace")
        for path in target.iterdir():
            path.chmod(0o644)  # safetensors makes its files readable for their owner only
    except BaseException:
        shutil.rmtree(target)
        raise
    click.echo(f"{folder}: {what} of {run}, as {kind or 'a model of this package'}")


def between(config: Config, model: Any, trained: Weights, share: float) -> Weights:
    """(1 - share) * source + share * trained of each weight and temperature, at 0 and 1 an end's
    to the bit: WiSE-FT (Wortsman et al., 2022, arXiv 2109.01903). `model`: the run's `CMLIConfig`.
    """
    from ds_cmli.engine import build_models

    student = replace(config.student, lora={}, freeze_image=0, freeze_text=0)
    loss = replace(config.loss, weights=dict(model.losses) or {"global": 1.0})
    start = replace(config, student=student, loss=loss)
    begun = build_models(start, model.vocab_size, pad_id=model.pad_id)[0].state_dict()
    out = dict(trained)
    for name in begun.keys() & trained.keys() if share < 1 else ():
        if trained[name].is_floating_point():
            out[name] = begun[name].to(trained[name].dtype).lerp(trained[name], share)
    return out


def fitted(weights: Weights, kind: str, config: Config, model: Any) -> Weights:
    """The weights of a library's `model` by its names."""
    import torch

    temperature = f"losses.{loss_of(config.student.source_config)}.temperature.logit"
    wanted, parts = model.state_dict(), {"logit": temperature, **PARTS[kind]}
    if kind == "open_clip":
        text = "text." * any(name.startswith("text.") for name in wanted)
        parts[text] = "student.text.model."
    out = {}
    for name, like in wanted.items():
        value = torch.tensor(NEW[name]) if name in NEW else None
        for begin in filter(name.startswith, parts):
            own = parts[begin] + name.removeprefix(begin)
            value = weights.get(own, value)
        if value is None or value.numel() != like.numel():
            raise UserError(f"the run has no weight for {name!r}")
        out[name] = value.reshape(like.shape)
    return out


def of_transformers(folder: Path, config: Config) -> Any:
    """Write all but the weights and the tokenizer of a model of transformers. Returns the model."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, CLIPImageProcessor, SiglipImageProcessor

    fields = json.loads(json.dumps(config.student.source_config))
    how = {"image_mean": fields.pop("mean"), "image_std": fields.pop("std")}
    library = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    with torch.device("meta"):
        model = AutoModel.from_config(library)
    library.architectures, library.dtype = [type(model).__name__], "float32"
    library.save_pretrained(folder)
    side, names = config.data.image_size, {name: n for n, name in PILLOW.items()}
    square, how["resample"] = {"height": side, "width": side}, names[config.data.interpolation]
    pictures: Any = SiglipImageProcessor(size=square, **how)
    if config.data.resize == "shortest":
        pictures = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square, **how)
    pictures.save_pretrained(folder)
    return model


def of_open_clip(folder: Path, config: Config) -> Any:
    """The same of open_clip, without a CoCa's decoder of captions."""
    from open_clip import create_model

    own, data = config.student.source_config, config.data
    how = {"mean": own["mean"], "std": own["std"], "interpolation": data.interpolation}
    how["resize_mode"] = data.resize.removesuffix("_pillow")
    content = {"model_cfg": own["model_cfg"], "preprocess_cfg": how}
    (folder / OPEN_CLIP).write_text(json.dumps(content, indent=2) + "\n")
    return create_model(f"{LOCAL}{folder}", load_weights=False, pretrained_text=False)


def readme(config: Config, name: str, what: str, kind: str | None) -> str:
    """The page of a model, with what it began as and the licence of that."""
    from huggingface_hub import ModelCard

    from ds_cmli.data.assets import ASSETS, used

    while (source := Source(config.student.source)).name and source.has_own_data:
        config = load_config(source.path / RUN, "student.source")  # of the run before
    licence, student = "other", config.student
    if source.name:
        with suppress(Exception), loading(hub=not source.local):  # no card, or no network
            card = source.path / "README.md" if source.local else source.place
            licence = ModelCard.load(card).data.license or licence
        began = Path(source.place).name if source.local else source.name
        began += f", licence: {'as it says' if licence == 'other' else licence}"
    else:
        began = f"{student.image_model} and {student.text_model}"
    origins = "; ".join([began, *(ASSETS[asset].licence for asset in used(config))])
    return f"""\
---
library_name: {"open_clip" if kind == "open_clip" else "transformers"}
license: {licence}
---

# {name}

An image-text model: {what} of a run of ds-cmli {version()}.

It began as {origins}. The licences of all that it was trained from hold for it.
"""


def main() -> None:
    silence()
    run_command(command)


if __name__ == "__main__":
    main()
