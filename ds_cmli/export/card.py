"""Writes the model card: what the model is, code that uses it, its results with their names, and
licences.
"""

from pathlib import Path

from ds_cmli.common import documents
from ds_cmli.common.documents import markdown_table
from ds_cmli.common.provenance import versions
from ds_cmli.config.schema import Config, DataConfig
from ds_cmli.data.assets import ASSETS
from ds_cmli.export.modeling import CMLIModel
from ds_cmli.export.results import Results
from ds_cmli.export.settings import DEMO, sources

NAMES = {
    "i2t, t2i": "texts ranked for an image, images ranked for a text.",
    "R@k": "the share of queries with a right answer among the first k; equal scores count as in a random order.",
    "mean recall": "the mean of the six.",
    "global": "the cosine of the class tokens.",
    "cmli": "for i2t the mean over an image's patches of the similarity to the best token of the text, for t2i the "
    "mean over a text's tokens of the similarity to the best patch of the image.",
    "combined": "the sum of what was trained of these, each times its learned 1/temperature: `logits_per_image` for "
    "i2t, `logits_per_text` for t2i.",
    "chance": "what scores without information give.",
}
OF_SPLITS = {
    "seen": "scenes of pictures that training has shown, though never these in these places.",
    "unseen": "scenes of pictures that training has never shown.",
    "val": "the validation part of the data, or the share of it that training held out.",
    "test": "the test part of the data.",
}
POINTING = "the share of caption tokens whose best patch lies in the picture that they name."


def write_card(
    folder: Path, run: Path, model: CMLIModel, config: Config, results: Results | None, onnx: bool
) -> None:
    """Write `README.md` for the model of `run` that was exported to `folder`; `onnx`: with ONNX
    files.
    """
    rows, columns = model.student.grid
    data, installed = config.data, versions()
    settings = {
        "image encoder": f"{config.student.image_model}, {len(model.student.image.blocks)} blocks",
        "text encoder": f"{config.student.text_model}, {len(model.student.text.blocks)} blocks",
        "shared blocks": config.student.shared_blocks,
        "losses": ", ".join(f"{name} ({weight:g})" for name, weight in config.loss.weights.items()),
        "data": ", ".join(sources(data)),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    documents.write_page(
        str(folder / "README.md"),
        "the card",
        "ds_cmli.export",
        "card.md",
        name=run.resolve().name,
        demo=data.source == DEMO,
        N=rows * columns,
        H=model.student.width,
        D=config.student.embed_dim,
        S=data.image_size,
        M=data.context_length,
        onnx=onnx,
        results=results,
        names=_names(results),
        versions=", ".join(
            f"{name} {installed[name]}" for name in ("torch", "timm", "transformers")
        ),
        settings=markdown_table(["", ""], [[name, str(value)] for name, value in settings.items()]),
        licences=licences(config),
    )


def _names(results: Results | None) -> dict[str, str]:
    """The meaning of each name that the results use."""
    splits = results.splits if results else {}
    names = NAMES | {name: meaning for name, meaning in OF_SPLITS.items() if name in splits}
    if any("pointing_game" in found for found in splits.values()):
        names["pointing-game accuracy"] = POINTING
    return names


def licences(config: Config) -> dict[str, str]:
    """Under what the weights that training started from, the tokenizer and the data are."""
    student, data = config.student, config.data
    return {
        "The image encoder's weights": _of_weights(
            student.image_weights, "vit", student.image_model
        ),
        "The text encoder's weights": _of_weights(
            student.text_weights, "minilm", student.text_model
        ),
        "The tokenizer": _of_tokenizer(data),
        "The pictures and captions of the training (not in this folder)": _of_data(data),
    }


def _asset(name: str) -> str:
    return " ".join(ASSETS[name].licence.split()).split(" ", 1)[1]


def _of_weights(weights: str, asset: str, model: str) -> str:
    own = {
        "demo": _asset(asset),
        "hub": f"the licence of {model}, which its page at huggingface.co names.",
        "random": "none but those of this model's author, as they began random.",
    }
    unknown = f"those of the file or folder {Path(weights).name!r}: its licence is not known here, add it."
    return own.get(weights, unknown)


def _of_tokenizer(data: DataConfig) -> str:
    own = {
        "demo": _asset("minilm"),
        "builtin": "Apache-2.0, ds-cmli; its words are Unicode CLDR's.",
    }
    unknown = f"that of {Path(data.tokenizer).name!r}, whose page or folder names it."
    return own.get(data.tokenizer, unknown)


def _of_data(data: DataConfig) -> str:
    names = ", ".join(sources(data))
    return _asset("pictures") if data.source == DEMO else f"{names}: not known here, add it."
