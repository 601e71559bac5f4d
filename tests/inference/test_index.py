"""Search over an index on disk finds what the scores of all pairs say."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner

from ds_cmli.common.errors import UserError
from ds_cmli.inference import Index, Model, topk
from ds_cmli.inference.search import command

TEXTS = ["a red car", "two dogs under a tree"]


@pytest.fixture(scope="module")
def model(run):
    return Model.load(run, "cpu")


@pytest.fixture(scope="module")
def index(model, pictures, run, tmp_path_factory):
    return Index.build(tmp_path_factory.mktemp("index"), model, pictures, str(run), batch_size=5)[0]


def test_the_best_of_all_scores_come_in_their_order(model, index, pictures):
    images = model.embed_images(pictures)
    combined = model.scores(images, model.embed_texts(TEXTS))["combined"].t2i  # [12, 2]
    for j, results in enumerate(index.search(model, TEXTS, k=4)):
        best = combined[:, j].topk(4)
        assert [r.name for r in results] == [images.names[i] for i in best.indices]
        torch.testing.assert_close(torch.tensor([r.score for r in results]), best.values, atol=0.05, rtol=1e-3)  # fp16


def test_of_candidates_by_global_score_alone_the_best_is_found(model, index, pictures):
    images, texts = model.embed_images(pictures), model.embed_texts(TEXTS[0])
    scores = model.scores(images, texts)
    (results,) = index.search(model, TEXTS[0], k=10, candidates=3)
    candidates = scores["global"].t2i[:, 0].topk(10).indices
    assert {r.name for r in results} == {images.names[i] for i in candidates}  # k results need k candidates
    (results,) = index.search(model, TEXTS[0], k=1, candidates=3)
    chosen = scores["global"].t2i[:, 0].topk(3).indices.tolist()
    best = max(chosen, key=lambda i: scores["combined"].t2i[i, 0])
    assert results[0].name == images.names[best]


def test_without_a_global_score_nothing_chooses_candidates(run_without_global, pictures, tmp_path, monkeypatch):
    model = Model.load(run_without_global, "cpu")
    index, _ = Index.build(tmp_path, model, pictures)
    monkeypatch.setattr("ds_cmli.inference.index.EXACT", 2)
    monkeypatch.setattr("ds_cmli.inference.index.CANDIDATES", 2)
    scores = model.scores(model.embed_images(pictures), model.embed_texts(TEXTS))["cmli"].t2i
    for j, (result,) in enumerate(index.search(model, TEXTS, k=1)):
        assert result.name == index.names[scores[:, j].argmax()]
    with pytest.raises(UserError, match="candidates is 3: the model was trained without a global loss"):
        index.search(model, TEXTS, candidates=3)


def test_pictures_that_cannot_be_read_are_left_out_and_told(model, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    files = [broken, *sorted(pictures.rglob("*.png"))]
    index, refused = Index.build(tmp_path / "index", model, files)
    assert len(index) == 12 and len(refused) == 1 and "broken.png' cannot be read" in refused[0]
    assert index.cls.shape[0] == index.patches.shape[0] == 12
    assert [len(results) for results in index.search(model, TEXTS, k=20)] == [12, 12]
    with pytest.raises(UserError, match="none of the 1 pictures can be read"):
        Index.build(tmp_path / "other", model, [broken])
    with pytest.raises(UserError, match="none is there; make one with --build"):
        Index(tmp_path / "other")


@pytest.mark.parametrize("rows, columns, k", [(3, 7, 2), (1, 1, 5), (40, 9000, 10), (2, 4097, 4097)])
def test_topk_without_the_matrix_is_that_of_the_matrix(rows, columns, k):
    scores = torch.randint(0, 50, (rows, columns), generator=torch.Generator().manual_seed(0)).float()
    values, numbers = topk(lambda down, across: scores[down, across], rows, columns, k)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k]) and torch.equal(numbers, expected.indices[:, :k])


def test_the_command_builds_searches_and_writes_a_page(run, pictures, tmp_path):
    folder, page = str(tmp_path / "index"), tmp_path / "page.html"

    def call(*arguments):
        return CliRunner().invoke(command, [folder, *arguments], catch_exceptions=True)

    built = call("--build", str(pictures), "--model", str(run))
    assert built.stdout.splitlines()[-1] == f"12 pictures in {folder}"
    done = call(TEXTS[0], "-k", "3", "--page", str(page))
    lines = done.stdout.splitlines()
    assert "note: this model was trained on the demo and knows its scenes" in done.stderr
    assert "knows its scenes" in page.read_text()
    assert lines[0] == TEXTS[0] and len(lines) == 5 and lines[1].endswith(".png")
    assert page.read_text().count('<img src="data:image/jpeg;base64,') == 3
    again = ["--build", str(pictures), "--model", str(run), "--page", str(page)]
    objects = [json.loads(line) for line in call(*TEXTS, "--json", *again).stdout.splitlines()]
    assert [o["text"] for o in objects] == TEXTS and len(objects[0]["results"]) == 10
    for arguments, line in {
        (): "nothing to do",
        ("--build", str(pictures)): "--build needs --model",
        ("a", "-k", "0"): "k is 0: give at least 1",
        ("a", "--candidates", "0"): "candidates is 0: give at least 1",
        ("a", "--batch-size", "3"): "--batch-size has no effect without --build",
        ("--build", str(pictures), "--model", str(run), "--json"): "--json has no effect without a text",
        ("--build", str(pictures), "--model", str(run), "-k", "3"): "-k has no effect without a text",
        ("a", ""): "the text is '', which has no word",
    }.items():
        error = call(*arguments).exception
        assert isinstance(error, UserError) and line in str(error)


def test_an_index_of_other_weights_is_told(model, index, pictures, run_without_global, tmp_path):
    with pytest.raises(UserError, match="was built by another model, or by earlier weights"):
        index.search(Model.load(run_without_global, "cpu"), TEXTS)
    other, _ = Index.build(tmp_path, model, pictures)
    other.patches = other.patches[:, :7]
    with pytest.raises(UserError, match="was built by another model"):
        other.search(model, TEXTS)
    content = json.loads((tmp_path / "index.json").read_text())
    for key in ("weights", "files", "sha256"):  # as earlier versions wrote it
        del content[key]
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert len(Index(tmp_path).search(model, TEXTS)) == 2


def test_names_and_texts_that_are_no_unicode(model, pictures, run, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, file in enumerate(sorted(pictures.rglob("*.png"))[:3]):
        shutil.copy(file, folder / os.fsdecode(b"red\xff%d.png" % number))
    arguments = [str(tmp_path / "index"), "--build", str(folder), "--model", str(run), "a red car"]
    done = CliRunner().invoke(command, [*arguments, "--page", str(tmp_path / "page.html"), "--json"])
    assert done.exception is None
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "red\\udcff0.png" in page and page.count("data:image/jpeg") == 3
    for text in ("\udcff", ["a red car", "half \ud83d"]):
        with pytest.raises(UserError, match=r"a text is '.*\\ud.*', which is no Unicode: give whole characters"):
            model.embed_texts(text)


def test_a_flipped_byte_of_any_file_is_refused(model, index, tmp_path):
    names = ("index.json", "cls.npy", "patches.npy", "sums.npy")
    for name in names:
        for place in (0.2, 0.5, 0.9):
            folder = tmp_path / f"{name} {place}"
            shutil.copytree(index.folder, folder)
            content = bytearray((folder / name).read_bytes())
            content[int(place * len(content))] ^= 1
            (folder / name).write_bytes(content)
            with pytest.raises(UserError, match="build it anew"):
                Index(folder).search(model, TEXTS)
