"""Writes the model card: what the model is, how to load it, and the results that its run recorded."""

import json
from pathlib import Path
from typing import Any

from ds_cmli.common.provenance import versions
from ds_cmli.common.tables import markdown_table
from ds_cmli.export.modeling import CMLIModel

TEXT = """---
library_name: transformers
tags:
- image-text
- late-interaction
- ds-cmli
---

# {name}

An image-text model with fine-grained alignment, trained by ds-cmli. An image becomes a class token of {H} numbers and
{N} patches of {D} numbers each, a text a class token and its tokens in the same sizes. Pairs are scored by the cosine
of the class tokens, and by Cross-Modal Late Interaction (FILIP) between patches and tokens.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)  # or `import ds_cmli` before
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
inputs = processor(images=[picture], text=["a red car", "two dogs"])
model(**inputs).logits_per_image  # [images, texts]; softmax over a row ranks the texts
model.match(picture, "a red car")  # what each word finds in the picture
```

The code in this folder needs torch, timm and transformers ({versions}).
Pictures are {S} pixels square: the shorter side is resized (bicubic), the centre cropped. Texts are truncated at {M}
tokens.

## Trained with

{settings}

## Results of the run

{results}
"""


def write_card(folder: Path, run: Path, model: CMLIModel, config: Any) -> None:
    """Write `README.md`, with the results that `run` recorded in its `metrics.jsonl`."""
    rows, columns = model.student.grid
    data = config.data
    sources = [data.source] if isinstance(data.source, str) else data.source
    settings = {
        "image encoder": f"{config.student.image_model}, {len(model.student.image.blocks)} blocks",
        "text encoder": f"{config.student.text_model}, {len(model.student.text.blocks)} blocks",
        "shared blocks": config.student.shared_blocks,
        "losses": ", ".join(f"{name} ({weight:g})" for name, weight in config.loss.weights.items()),
        "data": ", ".join(source.rstrip("/").rsplit("/", 1)[-1] for source in sources),  # without paths of this machine
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    installed = versions()
    (folder / "README.md").write_text(
        TEXT.format(
            name=run.resolve().name,
            N=rows * columns,
            H=model.student.width,
            D=config.student.embed_dim,
            S=data.image_size,
            M=data.context_length,
            versions=", ".join(f"{name} {installed[name]}" for name in ("torch", "timm", "transformers")),
            settings=markdown_table(["", ""], [[name, str(value)] for name, value in settings.items()]),
            results=_results(run / "metrics.jsonl"),
        ),
        encoding="utf-8",
    )


def _results(file: Path) -> str:
    """A table of the last value of each column of the evaluation."""
    last: dict[str, float] = {}
    step = 0
    if file.is_file():
        for line in file.read_text().splitlines():
            values = json.loads(line)
            found = {name.removeprefix("eval/"): v for name, v in values.items() if name.startswith("eval/")}
            step = values["step"] if found else step
            last |= found
    if not last:
        return "The run has recorded no evaluation."
    rows = [[name, f"{value:.4f}".rstrip("0").rstrip(".")] for name, value in last.items()]
    return f"On held-out pairs, after step {step}.\n\n" + markdown_table(["measure", "value"], rows)
