"""Writes a trained student as a folder that transformers loads, and checks that it is the same
model.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_cmli import models
from ds_cmli.checkpoint.weights import AVERAGE, load_weights
from ds_cmli.checkpoint.weights import WEIGHTS as STUDENT
from ds_cmli.common import tensor_file
from ds_cmli.common.errors import UserError
from ds_cmli.config.registry import over_pairs
from ds_cmli.config.schema import Config, load_config
from ds_cmli.data.tokens import CaptionTokenizer, pretrained_tokenizer
from ds_cmli.engine import build_models
from ds_cmli.export.bundle import bundle
from ds_cmli.export.configuration import CMLIConfig
from ds_cmli.export.modeling import CMLIModel
from ds_cmli.export.processing import CMLIProcessor
from ds_cmli.export.read import WEIGHTS
from ds_cmli.export.settings import portable
from ds_cmli.losses.objective import Objective

CODE = {
    "ds_cmli.export.configuration": "configuration_ds_cmli",
    "ds_cmli.export.modeling": "modeling_ds_cmli",
    "ds_cmli.export.processing": "processing_ds_cmli",
}
AUTO_MAP = {
    "AutoConfig": "configuration_ds_cmli.CMLIConfig",
    "AutoModel": "modeling_ds_cmli.CMLIModel",
    "AutoProcessor": "processing_ds_cmli.CMLIProcessor",
}
CHECKSUMS = "SHA256SUMS"  # in the format of the command sha256sum
# Replaces the registry of all backbones, which imports their files by name.
BACKBONES = '''"""The two backbones of this model."""

from ds_cmli.models.{image_file} import {image}
from ds_cmli.models.{text_file} import {text}

IMAGE, TEXT = {image}, {text}


def build(backbone, name, request):
    return backbone(request)
'''


def load_run(
    run: Path, tokenizer: str | None, ema: bool = False
) -> tuple[Config, Objective, Any, CaptionTokenizer]:
    """The run's configuration, its student with the losses over pairs, and its tokenizer.

    Args:
        tokenizer: used instead of the one that the run names; None: the run's.
        ema: load the averaged weights (`optim.ema_decay`).

    Returns:
        The configuration, the objective, and the tokenizer twice: as transformers' and as the
            training's.

    Raises:
        UserError: there is no such run, or it has no scores that could be exported.
    """
    config = load_config(run / "config.json", "the run")
    pairs = over_pairs(config.loss.weights)
    if not pairs:
        raise UserError(
            f"{str(run)!r} was trained with {', '.join(config.loss.weights)} alone, which compare no pairs: it has no "
            "scores to export; train with global or cmli too"
        )
    whole = pretrained_tokenizer(tokenizer or config.data.tokenizer)
    words = CaptionTokenizer(whole, config.data.context_length)
    alone = replace(config, loss=replace(config.loss, weights=pairs))  # no teacher is built
    objective, _ = build_models(alone, words.vocab_size, pretrained=False, special=words.special)
    load_weights(run, objective, AVERAGE if ema else STUDENT, "the run")
    return config, objective.eval(), whole, words


def write_model(
    folder: Path, config: Config, objective: Objective, whole: Any, words: CaptionTokenizer
) -> CMLIModel:
    """Write weights, configuration, processor and code; returns the model as it was loaded from the
    folder again.

    Raises:
        UserError: the loaded model gives other features.
    """
    text: Any = objective.student.text.model
    sample = words("a")
    added = [i for i, valid in zip(sample.input_ids, sample.valid, strict=True) if not valid]
    exported = CMLIConfig(
        portable(config, objective.student),
        [*over_pairs(config.loss.weights).items()],
        vocab_size=text.config.vocab_size,
        pad_id=words.pad_id,
        class_first=words.special.class_first,
        special_ids=sorted({*words.special_ids, *added}),
        pad_ends_texts=sample.input_ids[-1] == words.pad_id,
        auto_map=AUTO_MAP,
        architectures=[CMLIModel.__name__],
        dtype="float32",
    )
    exported.save_pretrained(folder)
    # Tied weights are saved under each of their names, because transformers does not fill what a
    # file lacks.
    tensors = {name: value.clone() for name, value in objective.state_dict().items()}
    (folder / WEIGHTS).write_bytes(b"".join(tensor_file.pieces(tensors)))
    processor: Any = CMLIProcessor(
        whole, config.data.image_size, config.data.context_length, words.pad_id
    )
    processor.auto_map = AUTO_MAP
    processor.save_pretrained(folder)
    for name, text in code_of(objective).items():
        (folder / name).write_text(text, encoding="utf-8")
    model = CMLIModel.from_pretrained(folder)
    check_same(objective, model)
    return model


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of each file of the folder. Called after everything else has been written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in files
    ]
    (folder / CHECKSUMS).write_text("".join(lines))


def code_of(objective: Objective) -> dict[str, str]:
    """The code that runs the model without this package: file name -> content."""
    kinds = {"image": type(objective.student.image), "text": type(objective.student.text)}
    place = {f"{name}_file": kind.__module__.rpartition(".")[2] for name, kind in kinds.items()}
    names = {name: kind.__name__ for name, kind in kinds.items()}
    return bundle(CODE, {models.__name__: BACKBONES.format(**place, **names)})


@torch.no_grad()
def check_same(objective: Objective, model: CMLIModel) -> None:
    """Raise `UserError` if the two models' features are not equal to the bit."""
    image, ids, mask = example(model)
    student, g = objective.student, objective.student.projection
    image_cls, patches = student.encode_image(image)
    text_cls, tokens = student.encode_text(ids, mask)
    of_image, of_text = model.get_image_features(image), model.get_text_features(ids, mask)
    pairs: dict[str, Any] = {
        "class tokens of images": (image_cls, of_image.pooler_output),
        "patches": (g(patches), of_image.last_hidden_state),
        "class tokens of texts": (text_cls, of_text.pooler_output),
        "tokens": (g(tokens), of_text.last_hidden_state),
    }
    for name, (trained, exported) in pairs.items():
        if not torch.equal(trained, exported):
            raise UserError(
                f"the exported model gives other {name} than the trained one, by up to "
                f"{(trained - exported).abs().max().item():.1e}: its backbones cannot be exported"
            )


def example(model: CMLIModel) -> tuple[Tensor, Tensor, Tensor]:
    """Two random pictures, two random texts, the second with padding, and the texts' attention
    mask.
    """
    data, generator = model.config.settings["data"], torch.Generator().manual_seed(0)
    size, length = data["image_size"], data["context_length"]
    image = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -(length // 2) :] = False
    return image, ids.masked_fill(~mask, model.config.pad_id), mask
