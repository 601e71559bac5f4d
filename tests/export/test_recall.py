"""The exported model ranks held-out pairs exactly as the evaluation says, recalls counted by numpy."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from ds_cmli.config.schema import load_config
from ds_cmli.data.build import build_data
from ds_cmli.evaluate.embed import EmbedSettings
from ds_cmli.evaluate.model import load_objective
from ds_cmli.evaluate.split import evaluate_split

PAIRS = 60


def recalls(own_first):
    """Of scores [queries, candidates] in which query i's only right candidate is i."""
    above = (own_first > np.diag(own_first)[:, None]).sum(1)
    return {k: float((above < k).mean()) for k in (1, 5, 10)}


def caption(scenes, i):
    return " ".join(scenes.pictures.names[concept] for concept, _ in scenes.layout(i))


@pytest.mark.parametrize("split", ["seen", "unseen"])
@torch.no_grad()
def test_recalls_of_the_exported_logits_are_those_of_the_evaluation(run, exported, split):
    config = load_config(run / "config.json", "the run")
    data = build_data(config.data, config.run.seed)
    some = torch.utils.data.Subset(data.evals[split], range(PAIRS))
    objective = load_objective(config, run, False, data, "cpu")
    result = evaluate_split(objective, some, data, EmbedSettings(16, torch.device("cpu")))

    samples = [some[i] for i in range(PAIRS)]
    texts = [caption(data.evals[split], i) for i in range(PAIRS)]
    pictures = [sample.image.permute(1, 2, 0).numpy() for sample in samples]
    inputs = AutoProcessor.from_pretrained(exported)(images=pictures, text=texts)
    out = AutoModel.from_pretrained(exported)(**inputs)
    for way, logits in (("i2t", out.logits_per_image), ("t2i", out.logits_per_text)):
        for k, share in recalls(logits.numpy()).items():
            assert result[f"combined/{way}_r{k}"] == pytest.approx(share, abs=1e-9), (way, k)
