"""Recall, accuracies and the pointing game by hand; and the command's numbers by the scores of the model itself."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from ds_cmli.config.schema import DataConfig
from ds_cmli.evaluate import metrics
from ds_cmli.evaluate.embed import Embedded
from ds_cmli.evaluate.pointing_game import pointing_game, quarters
from ds_cmli.evaluate.zero_shot import ClassPictures
from tests import make, ranks


def recall(i2t: list, t2i: list | None = None, image_of: list | None = None) -> dict[str, float]:
    scores = torch.tensor(i2t)
    return metrics.recalls(
        scores, scores if t2i is None else torch.tensor(t2i), torch.tensor(image_of or list(range(len(i2t[0]))))
    )


def test_recall_of_images_goes_by_rows_and_of_texts_by_columns_of_their_own_scores():
    right, wrong = [[2.0, 1.0], [1.0, 2.0]], [[1.0, 2.0], [2.0, 1.0]]
    assert recall(right, wrong)["i2t_r1"] == 1 and recall(right, wrong)["t2i_r1"] == 0
    assert recall([[5.0, 6.0], [6.0, 5.0]], right)["t2i_r1"] == 1
    assert recall([[3.0, 2.0], [0.0, 1.0]], [[3.0, 2.0], [0.0, 1.0]])["t2i_r1"] == 0.5


def test_a_tie_is_a_random_order():
    assert recall([[1.0] * 4] * 4)["i2t_r1"] == pytest.approx(0.25)
    scores = [[1.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [5.0, 5.0, 4.0, 0.0], [1.0, 2.0, 3.0, 3.0]]
    assert recall(scores)["i2t_r1"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)


def test_what_is_no_number_finds_nothing():
    scores = [[float("nan"), 1.0], [0.0, 1.0]]
    assert recall(scores)["i2t_r1"] == 0.5
    assert recall([[float("nan")] * 2] * 2)["i2t_r1"] == 0


def recall_by_sorting(i2t, t2i, image_of, k):
    """As COCO's evaluations compute it: sort, and look for an own one among the first k."""
    order = np.argsort(-i2t, axis=1)[:, :k]
    by_image = np.mean([(image_of[order[i]] == i).any() for i in range(len(i2t))])
    order = np.argsort(-t2i, axis=0)[:k]
    return by_image, np.mean([image_of[j] in order[:, j] for j in range(len(image_of))])


@pytest.mark.parametrize("case", range(5))
def test_recall_as_by_sorting(case):
    draw = np.random.default_rng(case)
    m = int(draw.integers(2, 8)) * 2
    image_of = draw.permutation(np.concatenate([np.arange(m), draw.integers(0, m, draw.integers(0, 3 * m))]))
    i2t, t2i = draw.normal(size=(2, m, len(image_of)))
    i2t[np.arange(m)[:, None] == image_of] += draw.uniform(0, 2)
    found = metrics.recalls(torch.tensor(i2t), torch.tensor(t2i), torch.tensor(image_of))
    for k in metrics.RECALLS:
        assert (found[f"i2t_r{k}"], found[f"t2i_r{k}"]) == pytest.approx(recall_by_sorting(i2t, t2i, image_of, k))


def test_constant_scores_are_worth_chance_and_a_picture_without_a_caption_is_a_candidate_alone():
    image_of = torch.arange(60) // 5
    constant = torch.full((12, 60), 0.5)
    found = metrics.recalls(constant, constant, image_of)
    assert found == pytest.approx(metrics.chance(image_of))
    for k in metrics.RECALLS:
        drawn = 1 - math.comb(55, k) / math.comb(60, k)
        assert (found[f"i2t_r{k}"], found[f"t2i_r{k}"]) == pytest.approx((drawn, k / 12))
    # Caption 0 finds picture 2, which has none, before its own.
    found = recall([[2.0, 0.5], [0.0, 1.0], [3.0, 0.0]])
    assert (found["i2t_r1"], found["t2i_r1"], found["t2i_r5"]) == (1.0, 0.5, 1.0)


def test_accuracies_by_class_weigh_classes_alike():
    scores = torch.eye(6)[[0, 0, 0, 1, 2]]
    found = metrics.accuracies(scores, torch.tensor([0, 0, 0, 1, 5]))
    assert found["top1"] == pytest.approx(4 / 5) and found["mean_per_class"] == pytest.approx(2 / 3)
    # The wrong class 2 has 1, and of the right one and four others with 0 four more are among the first five.
    assert found["top5"] == pytest.approx((4 + 0.8) / 5)


def test_hits_of_phrases():
    """Of the patches in four rows and two columns, the first two of the first column lie in the box."""
    patches, tokens = torch.eye(8), torch.eye(8)[[2, 3, 7, 5]]
    inside = metrics.patches_inside([(0.0, 0.0, 40.0, 40.0)], (0.0, 0.0, 80.0, 80.0), (4, 2))
    assert inside.nonzero().flatten().tolist() == [0, 2]
    found = metrics.phrase_hits(patches, tokens, torch.tensor([0, 1, 1, -1]), inside.repeat(2, 1))
    assert found.tolist() == [True, False]


def test_a_token_of_a_scene_hits_in_the_quarter_of_its_picture():
    """Pictures 0 and 1 in the first and the last quarter; each token's best patch is one of 4 x 4."""
    tokens = SimpleNamespace(valid=[False, True, True, True, True, False])
    sample = SimpleNamespace(tokens=tokens, token_picture=[-1, 0, 0, 1, -1, -1], cell_picture=[0, -1, -1, 1])
    texts = {0: (torch.ones(1), torch.eye(16)[[5, 2, 10, 0]])}
    own = Embedded(SimpleNamespace(pair=lambda row: sample), [0], {0: (torch.ones(1), torch.eye(16))}, texts, [0], {})
    found = pointing_game(own, quarters, (4, 4))
    assert found == {"pointing_game": 2 / 3, "chance/pointing_game": 0.25, "visible": 1.0, "phrases": 3}


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    source = make.pairs(folder / "pairs", 9)
    rows = [{"file_name": f"{n % 8}.png", "text": f"a red square {n}"} for n in range(12)]  # two captions of four
    Path(source, "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"data": {"source": source, "val_source": source}, "loss": {"weights": {"global": 1.0, "cmli": 1.0}}}
    make.run_folder(folder / "run", **sections)
    return folder / "run"


def evaluated(*arguments: str) -> dict[str, float]:
    from ds_cmli.evaluate.__main__ import command

    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, one):
        assert not command.main(list(arguments), standalone_mode=False)
    return json.loads(Path(arguments[-1]).read_text())


def test_the_command_has_the_recalls_of_the_models_own_scores(run, tmp_path):
    from ds_cmli.inference import Model

    found = evaluated("--checkpoint", str(run), "--json", str(tmp_path / "found.json"))
    model, source = Model.load(run, device="cpu"), run.parent / "pairs"
    texts = [f"a red square {n}" for n in range(12)]
    images = [str(source / f"{n}.png") for n in range(8)]
    scores = model.scores(model.embed_images(images), model.embed_texts(texts))
    image_of = torch.tensor([n % 8 for n in range(12)])
    for kind in ("global", "cmli", "combined"):
        expected = metrics.recalls(scores[kind].i2t, scores[kind].t2i, image_of)
        for name, value in expected.items():
            (key,) = [key for key in found if key.endswith(f"{kind}/{name}") and "chance" not in key]
            assert found[key] == pytest.approx(value, abs=1e-6), key


def prompts_of_rank(rank: int, world: int, folder: str, run: str, out: str) -> dict:
    from ds_cmli.evaluate.__main__ import command

    more = ["--zero-shot", folder, "--templates", f"{out}/templates.txt", "--json", f"{out}/{world}.json"]
    command.main(["--checkpoint", run, *more], standalone_mode=False)
    return json.loads(Path(f"{out}/{world}.json").read_text()) if rank == 0 else {}


def zero_shot_by_loops(run: Path, classes: Path, templates: list[str]) -> dict[str, float]:
    """The share of pictures whose own class is best: cosines with mean prompts, means of CMLI over prompts."""
    from ds_cmli.inference import Model

    model, right = Model.load(run, device="cpu"), {"global": 0, "cmli": 0, "combined": 0}
    files = [file for file in sorted(classes.rglob("*.png")) if file.name != "x.png"]
    images, names = model.embed_images(files), sorted({file.parent.name for file in files})
    prompts = [model.embed_texts([t.replace("{}", name.replace("_", " ")) for t in templates]) for name in names]
    for i, file in enumerate(files):
        scores: dict[str, list[float]] = {kind: [] for kind in right}
        for texts in prompts:
            cosine = images.cls[i] @ torch.nn.functional.normalize(texts.cls.mean(0), dim=0)
            similar = [images.patches[i] @ x[mask].t() for x, mask in zip(texts.tokens, texts.token_mask, strict=True)]
            cmli = torch.stack([x.amax(1).mean() for x in similar]).mean()
            scores["global"].append(float(cosine))
            scores["cmli"].append(float(cmli))
            scores["combined"].append(float(cosine / 0.07 + cmli / 0.02))  # the temperatures at the start
        for kind, values in scores.items():
            right[kind] += names[int(np.argmax(values))] == file.parent.name
    return {kind: count / len(files) for kind, count in right.items()}


def test_zero_shot_of_two_ranks_is_that_of_one(run, tmp_path):
    """Three classes of three templates and 7 pictures, one more broken: nothing divides by two."""
    for n in range(7):
        (tmp_path / "classes" / f"class_{n % 3}").mkdir(parents=True, exist_ok=True)
        make.picture(n).save(tmp_path / "classes" / f"class_{n % 3}" / f"{n}.png")
    (tmp_path / "classes" / "class_0" / "x.png").write_bytes(b"no picture")
    (tmp_path / "templates.txt").write_text("a photo of {}\n{} here\nthe {}\n")
    arguments = str(tmp_path / "classes"), str(run), str(tmp_path)
    one, two = (ranks.run(prompts_of_rank, world, *arguments, group=False)[0] for world in (1, 2))
    named = one.pop("zero_shot/left_out_first")
    assert two.pop("zero_shot/left_out_first") == named and "x.png (cannot identify" in named[0]
    assert one == pytest.approx(two) and "zero_shot/cmli/mean_per_class" in one
    assert (one["zero_shot/pictures"], one["zero_shot/classes"], one["zero_shot/left_out"]) == (7, 3, 1)
    by_loops = zero_shot_by_loops(run, tmp_path / "classes", ["a photo of {}", "{} here", "the {}"])
    for kind, right in by_loops.items():
        assert one[f"zero_shot/{kind}/top1"] == pytest.approx(right), kind
    assert one["zero_shot/combined/top5"] == 1 and one["zero_shot/chance/top1"] == pytest.approx(1 / 3)


def folders(path):
    for name, colour in (("blue_bird", "blue"), ("red_car", "red")):
        (path / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (30, 20), colour).save(path / name / f"{k}.png")
    os.mkfifo(path / "red_car" / "b.png")  # to open it would block
    return str(path)


def test_a_folder_of_class_folders(tmp_path):
    pictures = ClassPictures(folders(tmp_path / "data"), None, None, DataConfig(image_size=8))
    assert pictures.names == ["blue bird", "red car"] and len(pictures.templates) == 7
    assert [number for _, number in pictures.rows] == [0, 0, 1, 1]
    assert [int(pictures.image(k)[2, 0, 0]) for k in range(4)] == [255, 255, 0, 0]
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("bird\ncar\n")
    templates.write_text("a {}\n\n{}s\n")
    pictures = ClassPictures(str(tmp_path / "data"), str(names), str(templates), DataConfig())
    assert pictures.names == ["bird", "car"] and pictures.templates == ["a {}", "{}s"]
