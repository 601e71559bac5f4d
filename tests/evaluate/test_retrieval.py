import copy
from unittest import mock

import pytest
import torch

from ds_cmli.data.sources.lists import ListedImages
from ds_cmli.errors import UserError
from ds_cmli.evaluate.embed import Evaluator
from ds_cmli.evaluate.match_map import match_maps
from ds_cmli.evaluate.retrieval import evaluate_split
from ds_cmli.evaluate.summary import summary
from tests import make
from tests.ranks import run


def untrained(source="demo"):
    """Return a model of random weights, and its held-out data: of the demo 11 scenes."""
    config, objective, words = make.untrained(run={"seed": 3}, data={"source": str(source)})
    pairs = copy.copy(next(iter(make.data_of(config).evals.values())))
    if source == "demo":
        pairs.length = 11
    return Evaluator(objective, words, torch.device("cpu"), 2), pairs


def parts(folder):
    """Write a folder with a picture to train on and five held-out ones, of which the second is broken."""
    make.pairs(folder / "train", 1)
    make.pairs(folder / "validation", 5, broken=[1])
    return folder / "validation"


def on_rank(rank, world_size, path):
    """Return figures and match maps of scenes, and figures and opened pictures of a folder with a broken picture."""
    model, scenes = untrained()
    figures, embedded = evaluate_split(model, scenes)
    maps = match_maps(embedded, model.tokenizer, model.student.grid, 5)
    folder_model_and_pairs = untrained(path)
    opened = []
    read = ListedImages.image
    with mock.patch.object(ListedImages, "image", lambda source, i: opened.append(source.name(i)) or read(source, i)):
        return figures, maps, evaluate_split(*folder_model_and_pairs)[0], opened


def test_ranks_share_the_work_and_agree_with_one_process(tmp_path, monkeypatch):
    parts(tmp_path)
    expected, maps, expected_of_folder, opened = on_rank(0, 1, tmp_path)
    results = run(on_rank, 2, tmp_path)  # 11 pictures: shares of 6 and 5
    for figures, drawn, folder_figures, _ in results:
        assert figures == pytest.approx(expected, abs=1e-9) and folder_figures == expected_of_folder
        assert len(drawn) == 5 and all((one == other).all() for one, other in zip(drawn, maps, strict=True))
    assert sorted(file for *_, files in results for file in files) == opened  # each is read once
    # Scored in several blocks: the same again.
    monkeypatch.setattr("ds_cmli.evaluate.retrieval.MAX_PICTURES", 4)
    assert on_rank(0, 1, tmp_path)[0] == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["pointing_game"] < 1
    assert (expected["pairs"], expected["pictures"]) == (11, 11)
    assert expected["chance/t2i_r5"] == pytest.approx(5 / 11)


def test_training_mode_and_random_numbers_stay_as_they_were():
    model, scenes = untrained()
    for dropout in [module for module in model.model.modules() if isinstance(module, torch.nn.Dropout)]:
        dropout.p = 0.5
    expected, _ = evaluate_split(model, scenes)
    model.model.train()
    generator_state = torch.random.get_rng_state()
    figures, embedded = evaluate_split(model, scenes)
    assert figures == expected, "an evaluation has dropout"
    match_maps(embedded, model.tokenizer, model.student.grid, 2)
    assert model.model.training and torch.equal(generator_state, torch.random.get_rng_state())


def test_what_is_broken_is_left_out_counted_and_named(tmp_path):
    held_out = parts(tmp_path)
    (held_out / "4.png").unlink()
    with open(held_out / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0.png", "text": "\\u200b"}\n')
        file.write('{"file_name": "2.png", "text": "square \\udcff"}\n')
        file.write('{"file_name": "3.png", "text": " "}\n')  # a blank caption beside others is none
    result, _ = evaluate_split(*untrained(tmp_path))
    assert (result["pairs"], result["pictures"], result["left_out"]) == (3, 3, 4)
    assert result["chance/t2i_r1"] == pytest.approx(1 / 3)
    lines = " ".join(result["left_out_first"])
    reasons = "1.png (cannot identify", "4.png (no such file)", "0.png (caption without", "2.png (caption that is no"
    assert [reason for reason in reasons if reason not in lines] == []
    heading, columns, *rows = summary(result, "bf16", "val").splitlines()
    assert heading.startswith("  val 3 pairs, 3 pictures, in bf16, 4 left out: ")
    assert max(map(len, [columns, *rows])) < 80 and rows[-1].split()[:2] == ["chance", "0.333"]
    for file in held_out.glob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no picture can be used.*png \(cannot identify"):
        evaluate_split(*untrained(tmp_path))
