"""Writes an exported model's README: how to load it, what it began as, and the licences of that."""

from pathlib import Path

from ds_cmli.common.provenance import versions
from ds_cmli.config.schema import Config, DataConfig
from ds_cmli.data.assets import ASSETS
from ds_cmli.export.folder import DEMO, sources

README = """\
---
library_name: transformers
license: other
---

# {name}

An image-text model trained by ds-cmli: {weights}. It needs `pip install ds-cmli`, and was
written with {versions}.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({folder!r}, trust_remote_code=True)
out = model(**processor(images=[picture], text=["a red car"]))  # logits_per_image, logits_per_text
```

{origins}

The licences of what it was trained from hold for it.
"""


def write_readme(folder: Path, name: str, config: Config, weights: str) -> None:
    """Write `README.md` into `folder`, which becomes the folder `name`.

    Args:
        weights: which ones of the run these are.
    """
    installed = versions()
    libraries = ", ".join(f"{part} {installed[part]}" for part in ("torch", "timm", "transformers"))
    lines = [f"- {what}: {licence}" for what, licence in origins(config).items()]
    text = README.format(
        name=name, weights=weights, versions=libraries, folder=name, origins="\n".join(lines)
    )
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def origins(config: Config) -> dict[str, str]:
    """What the weights, the tokenizer and the data of a run are, each with its licence."""
    student, data = config.student, config.data
    if student.source:
        started = {"Started from": f"{Path(student.source).name}, under its own licence"}
    else:
        model = student.image_model
        started = {
            "Image encoder": _of_weights(model, student.image_weights, "vit"),
            "Text encoder": _of_weights(student.text_model, student.text_weights, "minilm"),
        }
    return {**started, "Tokenizer": _of_tokenizer(data), "Data": _of_data(data)}


def _of_weights(model: str, weights: str, asset: str) -> str:
    if weights == "demo":
        return ASSETS[asset].licence
    if weights == "random":
        return f"{model}, from random weights"
    if weights == "hub":
        return f"{model}, under the licence that its page at huggingface.co names"
    return f"{model}, from {Path(weights).name}, under a licence not known here"


def _of_tokenizer(data: DataConfig) -> str:
    if data.tokenizer == "demo":
        return ASSETS["minilm"].licence
    if data.tokenizer == "builtin":
        return "of ds-cmli, Apache-2.0; its words are Unicode CLDR's"
    return f"{Path(data.tokenizer).name}, under its own licence"


def _of_data(data: DataConfig) -> str:
    if data.source == DEMO:
        return ASSETS["pictures"].licence
    return f"{', '.join(sources(data))}, under licences not known here"
