"""The results that the model card shows: measured on the run's held-out pairs by the exported
weights themselves.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_cmli.checkpoint.save import FOLDER, latest, step_of
from ds_cmli.common.cli import say
from ds_cmli.common.documents import markdown_table
from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import Config
from ds_cmli.evaluate.report import SCORES
from ds_cmli.evaluate.split import evaluate_split
from ds_cmli.export.read import load_exported

BATCH = 50  # pictures or captions a step
MEASURES = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)] + ["mean_recall"]
COLUMNS = [f"{way} R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)] + ["mean recall"]


@dataclass
class Results:
    splits: dict[str, dict[str, Any]]  # of each split what `evaluate_split` returns
    how: str  # a sentence: which weights, in which precision, after which step

    def table(self) -> str:
        """Recalls in Markdown, a row for each split and kind of scores."""
        rows = []
        for split, found in self.splits.items():
            for score in (*SCORES, "chance"):
                values = [found.get(f"{score}/{name}") for name in MEASURES]
                if any(value is not None for value in values):
                    cells = ["-" if value is None else f"{value:.4f}" for value in values]
                    rows.append([split, score, *cells])
        return markdown_table(["split", "scores", *COLUMNS], rows)

    def lines(self) -> list[str]:
        """What stands beside the recalls, a line for each split."""
        out = []
        for split, found in self.splits.items():
            size = [f"{found[name]} {name}" for name in ("pairs", "pictures") if name in found]
            if "pointing_game" in found:
                size.append(f"pointing-game accuracy {found['pointing_game']:.4f} (chance 0.25)")
            if size:
                out.append(f"`{split}`: {', '.join(size)}.\n")
        return out


def measured(exported: Path, run: Path, config: Config, ema: bool) -> Results:
    """Evaluate the model in `exported` on the held-out pairs of its run.

    Raises:
        UserError: they cannot be read.
    """
    import torch

    from ds_cmli.data.load import build_eval_data

    data = build_eval_data(config.data, config.run.seed, None)
    _, objective = load_exported(exported)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = objective.to(device)
    sizes: list[Any] = [*data.evals.values()]
    pairs = sum(len(dataset) for dataset in sizes)
    say(f"measuring {pairs} held-out pairs for the card (--no-measure leaves it out)")
    splits = {
        split: evaluate_split(objective, dataset, data, BATCH, device, config.data.workers)
        for split, dataset in data.evals.items()
    }
    how = f"Measured on this model, {_weights(run, ema)}, in fp32, on the run's held-out pairs."
    return Results(splits, how)


def recorded(run: Path, ema: bool) -> Results | None:
    """The last evaluation that the run recorded of the same kind of weights; None if there is none."""
    file, last, step = run / "metrics.jsonl", dict[str, dict[str, Any]](), 0
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        values = _parsed(line)
        found = [name.split("/", 2)[1:] for name in values if name.startswith("eval/")]
        for split, name in found:
            if split.endswith("_ema") == ema:
                last.setdefault(split, {})[name] = values[f"eval/{split}/{name}"]
                step = values.get("step", step)
    if not last:
        return None
    how = (
        f"Not measured on this model ({_weights(run, ema)}, fp32): recorded by the run itself at step {step}, "
        "in the precision in which it trained."
    )
    return Results({split.removesuffix("_ema"): found for split, found in last.items()}, how)


def _parsed(line: str) -> dict[str, Any]:
    """A line of `metrics.jsonl`; nothing of a torn one."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _weights(run: Path, ema: bool) -> str:
    """Which weights of the run these are."""
    checkpoint = latest(run / FOLDER)
    step = f"after step {step_of(checkpoint)}" if checkpoint else "of the run's last checkpoint"
    return f"the {'averaged weights (EMA)' if ema else 'weights'} {step}"


def of_run(
    exported: Path, run: Path, config: Config, tokenizer: str | None, ema: bool, measure: bool
) -> Results | None:
    """The results for the card: measured, or where that cannot be, those that the run recorded."""
    if measure:
        if tokenizer is not None:
            config = replace(config, data=replace(config.data, tokenizer=tokenizer))
        try:
            return measured(exported, run, config, ema)
        except UserError as error:
            say(f"not measured, the card has the run's own results: {error}")
    return recorded(run, ema)
