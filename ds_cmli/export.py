"""Writes a trained model for other programs: `python -m ds_cmli.export RUN DIR --as clip`.

It renames tensors of the run's file, so those that were not trained keep their bytes.
"""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from PIL import Image

from ds_cmli.commands import run_command
from ds_cmli.config.registry import plugin_option
from ds_cmli.config.schema import Config, load_config
from ds_cmli.config.source import LOCAL_PREFIX, OPEN_CLIP_CONFIG, RUN, ModelSource, temperature_loss
from ds_cmli.errors import UserError, blame
from ds_cmli.files import JsonObject
from ds_cmli.libraries import silence
from ds_cmli.pretrained import loading
from ds_cmli.provenance import version

Weights = dict[str, Any]  # tensors by name
# The beginnings of names in a library's model, and those of the same tensors in a run.
TOWERS = {"vision_model": "student.image.model", "text_model": "student.text.model"}
IMAGE_HEAD = "student.image.class_head"
TEXT_HEAD = "student.text.class_head"
TENSOR_NAMES = {
    "clip": {"visual_projection": IMAGE_HEAD, "text_projection": TEXT_HEAD, **TOWERS},
    "siglip": {"text_model.head": TEXT_HEAD, **TOWERS},
    "open_clip": {"visual": "student.image.model"},
}


@click.command()
@plugin_option
@click.argument("run", metavar="RUN")
@click.argument("folder", metavar="DIR")
@click.option(
    "--as", "library", type=click.Choice(list(TENSOR_NAMES)), help="What the run began as."
)
@click.option("--ema", is_flag=True, help="Use the averaged weights (optim.ema_decay).")
@click.option(
    "--interpolate",
    type=click.FloatRange(0, 1),
    help="A share: weights between those of student.source, 0, and the trained ones, 1 (WiSE-FT).",
)
def command(
    run: str, folder: str, library: str | None, ema: bool, interpolate: float | None
) -> None:
    """Write the model of RUN into the new folder DIR; without --as, as one of this package."""
    source = Path(run)
    target = Path(folder)
    config = load_config(source / RUN, "the run")
    check_options(config, library, interpolate)

    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from ds_cmli.checkpoint.weights import write_weights
    from ds_cmli.models import hf

    file = hf.AVERAGE if ema else hf.WEIGHTS
    model = hf.load_model(source, file, "the run")
    weights = load_file(source / file)
    description = "the averaged weights" if ema else "the weights"
    if interpolate is not None:
        weights = interpolated(config, model.config, weights, interpolate)
        description = f"{interpolate:g} of the way from student.source to {description}"
    if library is not None:
        loss = temperature_loss(config.student.source_config)
        if f"losses.{loss}.temperature.logit_scale" not in weights:
            weights |= source_temperature(config, model.config, loss)
    with blame(f"DIR is {folder!r}: give a new folder"):
        target.mkdir(parents=True)
    try:
        if library is None:
            model.config.save_pretrained(target)
            hf.CMLIProcessor.from_pretrained(source).save_pretrained(target)
        else:
            write = write_open_clip if library == "open_clip" else write_transformers
            with loading(hub=False), blame(f"--as {library}"):
                weights = renamed(weights, library, config, write(target, config))
                # Its processor is the library's own, not ours.
                tokenizer = AutoTokenizer.from_pretrained(source, processor_class=None)
                length = max(tokenizer.model_max_length, config.data.context_length)
                tokenizer.model_max_length = length
                tokenizer.save_pretrained(target)
        name = "open_clip_model.safetensors" if library == "open_clip" else hf.WEIGHTS
        write_weights(weights, target / name)
        text = readme(config, target.resolve().name, description, library)
        (target / "README.md").write_text(text, errors="backslashreplace")
        for path in target.iterdir():
            path.chmod(0o644)  # safetensors makes its files readable for their owner only
    except BaseException:
        shutil.rmtree(target)
        raise
    click.echo(f"{folder}: {description} of {run}, as {library or 'a model of this package'}")


def check_options(config: Config, library: str | None, interpolate: float | None) -> None:
    """Raise `UserError` for an option that a run with this configuration cannot have."""
    source_type = config.student.source_config.get("model_type", "two encoders")
    if library is not None and source_type != library:
        raise UserError(f"--as is {library!r}, and the run's student began as {source_type}")
    if library is not None and config.student.shared_blocks:
        raise UserError(f"--as is {library!r}: its models have no shared blocks, and the run's has")
    if interpolate is not None and not config.student.source:
        raise UserError("--interpolate has no effect: the run has no student.source: leave it out")


# --- what lies between the source and the run


def interpolated(config: Config, model_config: Any, trained: Weights, share: float) -> Weights:
    """Return (1 - share) * source + share * trained of each weight and temperature.

    At 0 they are the source's to the bit, at 1 the trained ones: WiSE-FT (Wortsman et al., 2022,
    arXiv 2109.01903). `model_config`: the run's `CMLIConfig`.
    """
    losses = dict(model_config.losses) or {"global": 1.0}
    source_state = source_weights(config, model_config, losses)
    weights = dict(trained)
    for name in source_state.keys() & trained.keys():
        if trained[name].is_floating_point():
            weights[name] = source_state[name].to(trained[name].dtype).lerp(trained[name], share)
    return weights


def source_temperature(config: Config, model_config: Any, loss: str) -> Weights:
    """Return the temperature of a loss that the run did not train: that of its source.

    If the source is a run that did not train it either, it is that run's source's, and so on.
    Raises `UserError` if a source is gone, or has no such temperature.
    """
    from safetensors.torch import load_file

    from ds_cmli.models import hf

    prefix = f"losses.{loss}.temperature."
    source = ModelSource(config.student.source)
    while source.is_ds_cmli:
        with source.blame("its weights cannot be loaded"):
            weights = load_file(source.local_folder / (source.weights or hf.WEIGHTS))
        temperature = {name: weights[name] for name in weights if name.startswith(prefix)}
        if temperature:
            return temperature
        if not source.is_run:
            raise source.error(f"it has no temperature of the loss {loss!r}, nor has the run")
        config = load_config(source.local_folder / RUN, "student.source")
        source = ModelSource(config.student.source)
    weights = source_weights(config, model_config, {loss: 1.0})
    return {name: weights[name] for name in weights if name.startswith(prefix)}


def source_weights(config: Config, model_config: Any, losses: dict[str, float]) -> Weights:
    """Return the weights with which a training of these losses starts from the run's source."""
    from ds_cmli.engine import build_models

    student = replace(config.student, lora={}, freeze_image=0, freeze_text=0)
    begun = replace(config, student=student, loss=replace(config.loss, weights=losses))
    objective, _ = build_models(begun, model_config.vocab_size, pad_id=model_config.pad_id)
    return objective.state_dict()


# --- the model of a library


def renamed(weights: Weights, library: str, config: Config, model: Any) -> Weights:
    """Return the weights of a library's `model` by its names.

    Raises `UserError` if the run lacks one, or has one that does not fit.
    """
    wanted = model.state_dict()
    loss = temperature_loss(config.student.source_config)
    names = {"logit": f"losses.{loss}.temperature.logit", **TENSOR_NAMES[library]}
    if library == "open_clip":
        has_text = any(name.startswith("text.") for name in wanted)
        names["text." if has_text else ""] = "student.text.model."
    out = {}
    for name, tensor in wanted.items():
        value = None
        for beginning in filter(name.startswith, names):
            value = weights.get(names[beginning] + name.removeprefix(beginning), value)
        if value is None:
            raise UserError(f"--as {library}: the run has no weight for {name!r}")
        if value.numel() != tensor.numel():
            shapes = f"{[*value.shape]} in the run and {[*tensor.shape]} in the library's model"
            side = config.data.image_size
            raise UserError(
                f"--as {library}: {name!r} is {shapes}, which it cannot build for pictures of "
                f"{side} px: leave out --as, or train at the source's size"
            )
        out[name] = value.reshape(tensor.shape)
    return out


def write_transformers(folder: Path, config: Config) -> Any:
    """Write all but the weights and the tokenizer of a model of transformers. Returns the model."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, CLIPImageProcessor, SiglipImageProcessor

    fields: JsonObject = json.loads(json.dumps(config.student.source_config))
    options: JsonObject = {
        "image_mean": fields.pop("mean"),
        "image_std": fields.pop("std"),
        "resample": Image.Resampling[config.data.interpolation.upper()],
    }
    library_config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    with torch.device("meta"):
        model = AutoModel.from_config(library_config)
    library_config.architectures = [type(model).__name__]
    library_config.dtype = "float32"
    library_config.save_pretrained(folder)
    side = config.data.image_size
    square = {"height": side, "width": side}
    if config.data.resize == "shortest":
        sizes = {"size": {"shortest_edge": side}, "crop_size": square}
        processor: Any = CLIPImageProcessor(**sizes, **options)
    else:
        processor = SiglipImageProcessor(size=square, **options)
    processor.save_pretrained(folder)
    return model


def write_open_clip(folder: Path, config: Config) -> Any:
    """Write what `write_transformers` does, for open_clip; of a CoCa only the two towers."""
    from open_clip import create_model

    source_config = config.student.source_config
    preprocessing = {
        "mean": source_config["mean"],
        "std": source_config["std"],
        "interpolation": config.data.interpolation,
        "resize_mode": config.data.resize.removesuffix("_pillow"),
    }
    content = {"model_cfg": source_config["model_cfg"], "preprocess_cfg": preprocessing}
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return create_model(f"{LOCAL_PREFIX}{folder}", load_weights=False, pretrained_text=False)


def readme(config: Config, name: str, description: str, library: str | None) -> str:
    """Return the page of a model, with what it began as and the licence of that."""
    from huggingface_hub import ModelCard

    from ds_cmli.data.assets import ASSETS, used

    while (source := ModelSource(config.student.source)).name and source.is_run:
        config = load_config(source.local_folder / RUN, "student.source")  # of the run before
    licence = "other"
    if source.name:
        with suppress(Exception), loading(hub=not source.is_local):  # no card, or no network
            card = source.local_folder / "README.md" if source.is_local else source.bare_name
            licence = ModelCard.load(card).data.license or licence
        began = Path(source.bare_name).name if source.is_local else source.name
        began += f", licence: {'as it says' if licence == 'other' else licence}"
    else:
        began = f"{config.student.image_model} and {config.student.text_model}"
    origins = "; ".join([began, *(ASSETS[asset].licence for asset in used(config))])
    return f"""\
---
library_name: {"open_clip" if library == "open_clip" else "transformers"}
license: {licence}
---

# {name}

An image-text model: {description} of a run of ds-cmli {version()}.

It began as {origins}. The licences of all that it was trained from hold for it.
"""


def main() -> None:
    silence()
    run_command(command)


if __name__ == "__main__":
    main()
