"""Writes the model card: what the model is, code that uses it, its results, and licences.

The results are measured on the run's held-out pairs by the exported weights themselves.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ds_cmli.checkpoint.save import FOLDER, latest, step_of
from ds_cmli.common import checksums, documents
from ds_cmli.common.cli import say
from ds_cmli.common.documents import markdown_table
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse
from ds_cmli.common.provenance import versions
from ds_cmli.config.schema import Config, DataConfig
from ds_cmli.data.assets import ASSETS, image_asset
from ds_cmli.data.load import build_eval_data
from ds_cmli.evaluate.embed import EmbedSettings
from ds_cmli.evaluate.report import SCORES
from ds_cmli.evaluate.split import evaluate_split
from ds_cmli.export.folder import DEMO, load_exported, sources
from ds_cmli.export.modeling import CMLIModel

BATCH = 50  # pictures or captions a step
# The measures of the table and their columns.
MEASURES = {
    "i2t_r1": "i2t R@1",
    "i2t_r5": "i2t R@5",
    "i2t_r10": "i2t R@10",
    "t2i_r1": "t2i R@1",
    "t2i_r5": "t2i R@5",
    "t2i_r10": "t2i R@10",
    "mean_recall": "mean recall",
}
NAMES = {
    "i2t, t2i": "texts ranked for an image, images ranked for a text.",
    "R@k": "the share of queries with a right answer among the first k; equal scores count as in a "
    "random order.",
    "mean recall": "the mean of the six.",
    "global": "the cosine of the class tokens.",
    "cmli": "for i2t the mean over an image's patches of the similarity to the best token of the "
    "text, for t2i the mean over a text's tokens of the similarity to the best patch of the image.",
    "flair": "the cosine of the text's class token with what it pools of the image's patches.",
    "combined": "the sum of what was trained of these, each times its learned 1/temperature: "
    "`logits_per_image` for i2t, `logits_per_text` for t2i.",
    "chance": "what scores without information give.",
}
OF_SPLITS = {
    "seen": "scenes of pictures that training has shown, though never these in these places.",
    "unseen": "scenes of pictures that training has never shown.",
    "val": "the validation part of the data, or the share of it that training held out.",
    "test": "the test part of the data.",
}
EVALUATED = re.compile(r"eval/([^/]+)/(.+)")  # the columns of an evaluation
POINTING = "the share of caption tokens whose best patch lies in the picture that they name."


@dataclass
class Results:
    splits: dict[str, dict[str, Any]]  # of each split what `evaluate_split` returns
    how: str  # a sentence: which weights, in which precision, after which step

    def table(self) -> str:
        """Recalls in Markdown, a row for each split and kind of scores."""
        rows = []
        for split, figures in self.splits.items():
            for score in (*SCORES, "chance"):
                values = [figures.get(f"{score}/{name}") for name in MEASURES]
                if any(value is not None for value in values):
                    cells = ["-" if value is None else f"{value:.4f}" for value in values]
                    rows.append([split, score, *cells])
        return markdown_table(["split", "scores", *MEASURES.values()], rows)

    def lines(self) -> list[str]:
        """What accompanies the recalls, a line for each split."""
        out = []
        for split, figures in self.splits.items():
            size = [f"{figures[name]} {name}" for name in ("pairs", "pictures") if name in figures]
            if "pointing_game" in figures:
                size.append(f"pointing-game accuracy {figures['pointing_game']:.4f} (chance 0.25)")
            if size:
                out.append(f"`{split}`: {', '.join(size)}.\n")
        return out

    def names(self) -> dict[str, str]:
        """The meaning of each name that the results use."""
        names = NAMES | {name: OF_SPLITS[name] for name in OF_SPLITS if name in self.splits}
        if any("pointing_game" in figures for figures in self.splits.values()):
            names["pointing-game accuracy"] = POINTING
        return names


@dataclass(frozen=True)
class ExportedRun:
    """The run whose model is exported."""

    run: Path
    config: Config
    ema: bool  # the averaged weights
    share: float | None = None  # as of `load_run`

    def weights(self) -> str:
        """Which weights of the run these are."""
        checkpoint = latest(self.run / FOLDER)
        step = f"after step {step_of(checkpoint)}" if checkpoint else "of the run's last checkpoint"
        weights = f"the {'averaged weights (EMA)' if self.ema else 'weights'} {step}"
        if self.share is not None:
            weights = f"{self.share:g} of the way from student.source to {weights}"
        return weights


def find_results(
    exported: Path, source: ExportedRun, tokenizer: str | None, measure: bool
) -> Results | None:
    """The results for the card: measured, or where that cannot be, those that the run recorded."""
    if measure:
        config = source.config
        if tokenizer is not None:
            config = replace(config, data=replace(config.data, tokenizer=tokenizer))
        try:
            return measured(exported, replace(source, config=config))
        except UserError as error:
            has = "the run's own" if source.share is None else "no"
            say(f"not measured, the card has {has} results: {error}")
    return recorded(source) if source.share is None else None


def measured(exported: Path, source: ExportedRun) -> Results:
    """Evaluate the model in `exported` on the held-out pairs of its run.

    Raises:
        UserError: they cannot be read.
    """
    config = source.config
    data = build_eval_data(config.data, config.run.seed, None)
    _, objective = load_exported(exported)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = objective.to(device)
    pairs = 0
    for dataset in data.evals.values():
        pairs += len(dataset)  # type: ignore[arg-type]
    say(f"measuring {pairs} held-out pairs for the card (--no-measure leaves it out)")
    how = EmbedSettings(BATCH, device, config.data.workers)
    splits = {}
    for split, dataset in data.evals.items():
        splits[split] = evaluate_split(objective, dataset, data, how)
    weights = source.weights()
    return Results(
        splits, f"Measured on this model, {weights}, in fp32, on the run's held-out pairs."
    )


def recorded(source: ExportedRun) -> Results | None:
    """The last evaluation that the run recorded of the same kind of weights; None without one."""
    file = source.run / "metrics.jsonl"
    last: dict[str, dict[str, Any]] = {}
    step = 0
    lines = file.read_bytes().splitlines() if file.is_file() else []
    changed = checksums.changed(lines, file)
    for number, line in enumerate(lines, 1):
        values = _parsed(line)
        for column, value in values.items():
            evaluated = EVALUATED.fullmatch(column)
            numeric = isinstance(value, int | float)
            if number in changed or not evaluated or not numeric:
                continue
            split, name = evaluated.groups()
            if split.endswith("_ema") == source.ema:
                last.setdefault(split.removesuffix("_ema"), {})[name] = value
                step = values.get("step", step)
    if not last:
        return None
    how = (
        f"Not measured on this model ({source.weights()}, fp32): recorded by the run itself at "
        f"step {step}, in the precision in which it trained."
    )
    return Results(last, how)


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of `metrics.jsonl`; nothing of a torn one."""
    try:
        return parse(line, dict)
    except ValueError:
        return {}


def write_card(
    folder: Path, source: ExportedRun, model: CMLIModel, results: Results | None
) -> None:
    """Write `README.md` for the model that was exported to `folder`."""
    config, student = source.config, model.student
    data, installed = config.data, versions()
    rows, columns = student.grid
    settings = {
        "image encoder": f"{config.student.image_model}, {len(student.image.blocks)} blocks",
        "text encoder": f"{config.student.text_model}, {len(student.text.blocks)} blocks",
        "shared blocks": str(config.student.shared_blocks),
        "losses": ", ".join(f"{name} ({weight:g})" for name, weight in config.loss.weights.items()),
        "data": ", ".join(sources(data)),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    if source.share is not None:
        settings["weights"] = source.weights()
    libraries = [f"{name} {installed[name]}" for name in ("torch", "timm", "transformers")]
    documents.write_page(
        str(folder / "README.md"),
        "the card",
        "ds_cmli.export",
        "card.md",
        name=source.run.resolve().name,
        demo=data.source == DEMO,
        N=rows * columns,
        H=student.width,
        D=config.student.embed_dim,
        S=data.image_size,
        M=data.context_length,
        results=results,
        names=results.names() if results else NAMES,
        versions=", ".join(libraries),
        settings=markdown_table(["", ""], list(map(list, settings.items()))),
        licences=licences(config),
    )


def licences(config: Config) -> dict[str, str]:
    """The licences of the weights that training started from, the tokenizer and the data."""
    student, data = config.student, config.data
    model = student.image_model
    image = _of_weights(student.image_weights, image_asset(model), model)
    return {
        "The image encoder's weights": image,
        "The text encoder's weights": _of_weights(
            student.text_weights, "minilm", student.text_model
        ),
        "The tokenizer": _of_tokenizer(data),
        "The pictures and captions of the training (not in this folder)": _of_data(data),
    }


def _asset(name: str) -> str:
    return " ".join(ASSETS[name].licence.split()).split(" ", 1)[1]


def _of_weights(weights: str, asset: str, model: str) -> str:
    if weights == "demo":
        return _asset(asset)
    if weights == "hub":
        return f"the licence of {model}, which its page at huggingface.co names."
    if weights == "random":
        return "none but those of this model's author, as they began random."
    name = Path(weights).name
    return f"those of the file or folder {name!r}: its licence is not known here, add it."


def _of_tokenizer(data: DataConfig) -> str:
    if data.tokenizer == "demo":
        return _asset("minilm")
    if data.tokenizer == "builtin":
        return "Apache-2.0, ds-cmli; its words are Unicode CLDR's."
    return f"that of {Path(data.tokenizer).name!r}, whose page or folder names it."


def _of_data(data: DataConfig) -> str:
    if data.source == DEMO:
        return _asset("pictures")
    return f"{', '.join(sources(data))}: not known here, add it."
