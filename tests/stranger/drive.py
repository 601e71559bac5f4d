"""Uses a run through every door: evaluated, exported and loaded again; and its memory predicted."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoModel, AutoProcessor

from ds_cmli.config.schema import Config
from ds_cmli.evaluate.__main__ import command as evaluate
from ds_cmli.export import command as export
from ds_cmli.inference import Model
from ds_cmli.memory.step_memory import Step, predicted
from ds_cmli.memory_model import gpus


def used(run: Path) -> dict[str, float]:
    """Return the results of evaluating a run. Export it too, and load the export; files are written next to it."""
    evaluated = run.with_name("evaluated.json")
    exported = run.with_name("exported")
    for command, words in ((evaluate, ["--checkpoint", run, "--json", evaluated]), (export, [run, exported])):
        done = CliRunner().invoke(command, [*map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    compare(run, exported)
    return json.loads(evaluated.read_text())


@torch.no_grad()
def compare(run: Path, exported: Path) -> None:
    """Assert that the exported model's scores are those of the run."""
    model = AutoModel.from_pretrained(exported)
    processor = AutoProcessor.from_pretrained(exported)
    trained = Model.load(run, "cpu")
    loaded = Model.load(exported, "cpu")
    assert loaded.evaluator.scales == trained.evaluator.scales
    texts = ["a red car", "two dogs", "x"]
    pictures = [Image.new("RGB", (80, 60), colour) for colour in ("red", "blue", "green")]
    out = model(**processor(images=pictures, text=texts))
    scores = trained.scores(trained.embed_images(pictures), trained.embed_texts(texts))
    torch.testing.assert_close(out.logits_per_image, scores["combined"].i2t)
    torch.testing.assert_close(out.logits_per_text, scores["combined"].t2i.t())


def check_memory(config: Config, ds_config: dict, world_size: int) -> dict[str, int]:
    """Predict a configuration's memory, and return it by category."""
    report = predicted(Step(config, ds_config, world_size), gpus.find("A100 80GB"))
    assert sum(report.categories.values()) == report.totals["requested"] <= report.totals["reserved"]
    # The peak of a very small model may lie in the first step, before the optimizer has states.
    assert report.categories["parameters"] and report.categories["master weights"], report.categories
    return report.categories
