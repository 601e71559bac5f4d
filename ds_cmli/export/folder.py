"""An exported model's folder: written from a run, checked, and read back by this package."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from ds_cmli.checkpoint.weights import load_student, write_weights
from ds_cmli.common import checksums
from ds_cmli.common.errors import UserError, one_line
from ds_cmli.common.json_text import read
from ds_cmli.config import registry
from ds_cmli.config.registry import over_pairs
from ds_cmli.config.schema import Config, DataConfig, load_config
from ds_cmli.config.validation import NotRegistered
from ds_cmli.data.tokens import CaptionTokenizer, pretrained_tokenizer
from ds_cmli.export import interpolation
from ds_cmli.export.configuration import CMLIConfig
from ds_cmli.export.modeling import CMLIModel, build_student
from ds_cmli.export.processing import CMLIProcessor
from ds_cmli.losses.objective import Objective
from ds_cmli.models.student import Student
from ds_cmli.models.transformers_model import UNDECLARED, without_effect
from ds_cmli.models.weights import AVERAGE, load_weights
from ds_cmli.models.weights import WEIGHTS as STUDENT

WEIGHTS = "model.safetensors"
CHECKSUMS = "SHA256SUMS"  # in the format of the command sha256sum
DEMO = "demo"  # `DataConfig.source` of the demo
ROUNDING = 1e-5  # of two sums in another order, as a share of the largest feature
# transformers loads a model's code from a file of its folder, and names the packages that this file
# imports where they are not installed.
CODE = '''"""Loads this model by transformers' auto classes: needs `pip install ds-cmli`."""

from ds_cmli.export import CMLIConfig, CMLIModel, CMLIProcessor
'''
AUTO_MAP = {
    "AutoConfig": "modeling_ds_cmli.CMLIConfig",
    "AutoModel": "modeling_ds_cmli.CMLIModel",
    "AutoProcessor": "modeling_ds_cmli.CMLIProcessor",
}


@dataclass
class Trained:
    """What is exported of a run."""

    config: Config
    objective: Objective  # the student and the losses over pairs, in eval mode
    tokenizer: PreTrainedTokenizerFast
    words: CaptionTokenizer  # the same as training uses it


def load_run(
    run: Path, tokenizer: str | None, ema: bool = False, share: float | None = None
) -> Trained:
    """Load a run.

    Args:
        tokenizer: used instead of the run's; None: the run's.
        ema: load the averaged weights (`optim.ema_decay`).
        share: how far from the weights of `student.source`, 0, to the trained ones, 1; None: 1.

    Raises:
        UserError: there is no such run, or it has no scores that could be exported; or it has no
            source from which a share could be.
    """
    config = load_config(run / "config.json", "the run")
    if share is not None:
        interpolation.check(config)
    if not over_pairs(config.loss.weights):
        raise UserError(
            f"{str(run)!r} was trained with {', '.join(config.loss.weights)} alone, which compare "
            "no pairs: it has no scores to export; train with global or cmli too"
        )
    whole = pretrained_tokenizer(tokenizer or config.data.tokenizer)
    words = CaptionTokenizer(whole, config.data.context_length, full=config.data.padding == "full")
    objective = load_student(run, config, words, AVERAGE if ema else STUDENT, "the run")
    if share is not None:
        interpolation.ends(config, objective, words).put_between(objective, share)
    for name, loss in objective.losses.items():
        if not hasattr(loss, "temperature"):
            raise UserError(f"{str(run)!r}: its loss {name} has no temperature: it has no export")
    return Trained(config, objective.eval(), cast("PreTrainedTokenizerFast", whole), words)


def write_model(folder: Path, trained: Trained) -> CMLIModel:
    """Write weights, configuration, processor and code; returns the model as read back from there.

    Raises:
        UserError: the loaded model gives other features.
    """
    config, objective, words = trained.config, trained.objective, trained.words
    sample = words("a")
    text = _text_config(objective.student)
    added = [i for i, valid in zip(sample.input_ids, sample.valid, strict=True) if not valid]
    exported = CMLIConfig(
        portable(config, objective.student),
        [*over_pairs(config.loss.weights).items()],
        vocab_size=words.vocab_size if text is None else text.vocab_size,
        pad_id=words.pad_id,
        class_first=words.special.class_first,
        special_ids=sorted({*words.special_ids, *added}),
        pad_ends_texts=sample.input_ids[-1] == words.pad_id,
        auto_map=AUTO_MAP,
        architectures=[CMLIModel.__name__],
        dtype="float32",
    )
    exported.save_pretrained(folder)
    # Tied weights are saved under each name: transformers does not fill what a file lacks.
    tensors = {name: value.clone() for name, value in objective.state_dict().items()}
    write_weights(tensors, folder / WEIGHTS)
    data = config.data
    processor = CMLIProcessor(
        trained.tokenizer,
        data.image_size,
        data.context_length,
        words.pad_id,
        data.resize,
        data.interpolation,
        data.padding,
    )
    processor.auto_map = AUTO_MAP  # type: ignore[attr-defined]
    processor.save_pretrained(folder)
    (folder / "modeling_ds_cmli.py").write_text(CODE)
    model = CMLIModel.from_pretrained(folder)
    check_same(objective, model)
    return model


def portable(config: Config, student: Student) -> dict[str, dict[str, object]]:
    """Sections of the configuration that build the same student anywhere and prepare its inputs.

    They hold all sizes, and no weights or paths of this machine.
    """
    # In training alone fewer patches are kept.
    settings = asdict(config.student) | {"source": ""}
    if not config.student.source_config:
        settings |= {
            "image_weights": "random",
            "image_backbone": _name(registry.IMAGE, student.image),
            "text_weights": "random",
            "text_backbone": _name(registry.TEXT, student.text),
        }
    text = _text_config(student)
    if text is not None and not config.student.source_config:
        settings |= {"text_model": text.model_type, "text_overrides": _sizes(text)}
    data = {
        "image_size": config.data.image_size,
        "resize": config.data.resize,
        "interpolation": config.data.interpolation,
        "context_length": config.data.context_length,
        "padding": config.data.padding,
        "max_pixels": config.data.max_pixels,
        "source": sources(config.data),
    }
    return {"student": settings, "data": data}


def sources(data: DataConfig) -> list[str]:
    """What a model was trained on, by names without the paths of this machine."""
    given = [data.source] if isinstance(data.source, str) else data.source
    if given == [DEMO]:
        return given
    names = [Path(source).name for source in given]
    return [f"./{name}" if name == DEMO else name for name in names]


def _text_config(student: Student) -> PreTrainedConfig | None:
    """None for a backbone of another library."""
    return getattr(getattr(student.text, "model", None), "config", None)


def _name(table: Mapping[str, registry.BackboneEntry], backbone: nn.Module) -> str:
    return next(name for name, entry in table.items() if type(backbone) is registry.load(entry))


def _sizes(config: PreTrainedConfig) -> dict[str, object]:
    """The fields that have an effect and differ from the defaults of the model's family."""
    kind = type(config)
    usual = kind().to_dict()
    sizes = json.loads(json.dumps(config.to_dict()))
    names = {*inspect.signature(kind).parameters, *UNDECLARED.get(config.model_type, ())}
    out = {}
    for name in sorted(names & sizes.keys()):
        if sizes[name] != usual.get(name) and without_effect(kind, name) is None:
            out[name] = sizes[name]
    return out


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of each file of the folder. Called after everything else is written."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            lines.append(f"{checksums.of_file(path)}  {path.relative_to(folder)}\n")
    (folder / CHECKSUMS).write_text("".join(lines))


@torch.no_grad()
def check_same(objective: Objective, model: CMLIModel) -> None:
    """Raise `UserError` if the two models' features differ by more than rounding.

    The trained weights may lie in one buffer, where a matrix product adds up in another order.
    """
    image, ids, mask = example(model)
    student, g = objective.student, objective.student.projection
    image_cls, patches = student.encode_image(image)
    text_cls, tokens = student.encode_text(ids, mask)
    of_image, of_text = model.get_image_features(image), model.get_text_features(ids, mask)
    pairs = {
        "class tokens of images": (image_cls, of_image.pooler_output),
        "patches": (g(patches), of_image.last_hidden_state),
        "class tokens of texts": (text_cls, of_text.pooler_output),
        "tokens": (g(tokens), of_text.last_hidden_state),
    }
    for name, (trained, exported) in pairs.items():
        assert exported is not None
        most = (trained - exported).abs().max().item()
        if not most <= ROUNDING * trained.abs().max().item():  # a NaN is refused
            raise UserError(
                f"the exported model gives other {name} than the trained one, by up to {most:.1e}: "
                "its backbones cannot be exported"
            )


def example(model: CMLIModel) -> tuple[Tensor, Tensor, Tensor]:
    """Two random pictures and texts, the second text with padding, and the attention mask."""
    data, generator = model.config.settings["data"], torch.Generator().manual_seed(0)
    size, length = data["image_size"], data["context_length"]
    image = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -(length // 2) :] = False
    return image, ids.masked_fill(~mask, model.config.pad_id), mask


def is_exported(folder: Path) -> bool:
    try:
        content = read(folder / "config.json", dict)
    except (OSError, ValueError):
        return False
    return content.get("model_type") == "ds_cmli"


def load_exported(folder: Path) -> tuple[Config, Objective]:
    """The configuration, as far as the export holds it, and the student with its losses over pairs.

    Raises:
        UserError: the folder is damaged.
    """
    try:
        exported = CMLIConfig.from_pretrained(folder)
        data = {"source": "not named", **exported.settings["data"]}  # earlier exports name none
        given = {**exported.settings, "data": data, "loss": {"weights": dict(exported.losses)}}
        config = Config.from_dict(given)
        student = build_student(exported)
    except NotRegistered as error:
        raise UserError(f"{str(folder)!r}: its config.json has {error}") from None
    except Exception as error:  # a file of others may hold anything
        raise UserError(
            f"{str(folder)!r}: its config.json is damaged, or of another version: {one_line(error)}"
        ) from None
    objective = Objective(student, config.loss)
    load_weights(folder, objective, WEIGHTS, "the model")
    return config, objective
