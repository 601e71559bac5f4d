"""Choices of captions in the published formats, against the metrics computed one pair at a time."""

import pytest
import torch

from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.evaluate.model import EvaluatedModel, PictureFile
from ds_cmli.evaluate.suites.suite import read_suite
from tests.evaluate.suites import lists
from tests.run_folder import write_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return EvaluatedModel.load(str(write_run(tmp_path_factory.mktemp("run"))), 3, 0)


def score(model, file, text, kind, way, box=None):
    """One pair alone, by the plain equations: `way` 0 is from the picture's side."""
    images, texts = model.images([PictureFile(file, box)]), model.texts([text])
    cosine = float(images.cls[0] @ texts.cls[0])
    tokens, mask = texts.tokens[None], torch.ones(1, len(texts.tokens), dtype=torch.bool)
    cmli = float(cmli_scores_reference(images.patches.float(), tokens.float(), mask)[way])
    both = model.scales["global"] * cosine + model.scales["cmli"] * cmli
    return {"global": cosine, "cmli": cmli, "combined": both}[kind]


def test_sugarcrepe(tmp_path, model):
    task = read_suite(lists.write_suite(tmp_path, crepe=lists.sugarcrepe(tmp_path)))["crepe"]
    measured = task.run(model)
    assert measured.samples == 15
    for kind in ("global", "cmli", "combined"):
        accuracies = []
        for name in ("add_obj", "replace_att", "swap_obj"):
            hits = []
            for question in (q for q in task.questions if q.group == name):
                right, wrong = (score(model, question.pictures[0].file, t, kind, 0) for t in question.captions)
                hits.append(right > wrong and question.captions[0] != question.captions[1])
            accuracies.append(sum(hits) / len(hits))
            assert measured.measures[f"{kind}/{name}"].value == pytest.approx(accuracies[-1])
        assert measured.measures[f"{kind}/mean"].value == pytest.approx(sum(accuracies) / 3)
