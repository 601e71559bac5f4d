"""The command on an untrained model: what it reads, prints and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from ds_cmli.evaluate.__main__ import command
from ds_cmli.evaluate.measures import recalls
from ds_cmli.inference import Model
from ds_cmli.models.hf import AVERAGE, WEIGHTS
from tests import make, ranks
from tests.make import write_run

WORDS = ("red apple", "green pear", "blue bird", "black cat")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(folder / f"{k}.jpg")
    return folder


def evaluate(tmp_path, *arguments):
    """Return what is printed, and the metrics."""
    done = CliRunner().invoke(command, [*arguments, "--json", str(tmp_path / "x.json")], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output, json.loads((tmp_path / "x.json").read_text())


def captions(picture):
    return [f"{WORDS[picture % 4]} {number}" for number in range(2 + picture % 3)]


def karpathy(path):
    """Write a list with two to four captions of each picture."""
    splits = enumerate(["train"] * 3 + ["val"] * 3 + ["test"] * 6)
    return make.karpathy(path, [(f"{k}.jpg", split, captions(k)) for k, split in splits])


def test_karpathys_test_split_has_the_recalls_of_the_models_own_scores(tmp_path, model, photographs):
    data = ["--data", karpathy(tmp_path / "dataset.json"), "--image-root", str(photographs), "--workers", "2"]
    printed, result = evaluate(tmp_path, "--checkpoint", model, *data, "--split", "test")
    assert "dataset.json: 6 images to evaluate on" in printed, "the data is named before it is measured"
    assert "test 18 pairs, 6 pictures, in float32" in printed and "    combined  " in printed
    assert result["eval/test/chance/t2i_r1"] == pytest.approx(1 / 6)
    loaded = Model.load(model, device="cpu")
    shown = range(6, 12)
    texts = loaded.embed_texts([caption for k in shown for caption in captions(k)])
    scores = loaded.scores(loaded.embed_images([photographs / f"{k}.jpg" for k in shown]), texts)
    image_of = torch.arange(6).repeat_interleave(torch.tensor([2, 3, 4, 2, 3, 4]))
    for kind in ("global", "cmli", "combined"):
        for name, value in recalls(*scores[kind], image_of).items():
            assert result[f"eval/test/{kind}/{name}"] == pytest.approx(value, abs=1e-6), (kind, name)


def entities(path, photographs):
    """Write two captions of each of four photographs of 90 x 60 pixels, of which the middle 60 x 60 are seen."""
    for part in ("Annotations", "Sentences"):
        (path / part).mkdir(parents=True)
    for k in range(4):
        sentences = [f"[/EN#{k}/animals {WORDS[k]}] on [/EN#9/other grass] .", f"some [/EN#{k}/animals {WORDS[k]}] ."]
        (path / "Sentences" / f"{k}.txt").write_text("\n".join(sentences))
        box = "<bndbox><xmin>15</xmin><ymin>0</ymin><xmax>45</xmax><ymax>60</ymax></bndbox>"
        (path / "Annotations" / f"{k}.xml").write_text(
            "<annotation><size><width>90</width><height>60</height></size>"
            f"<object><name>{k}</name>{box}</object><object><name>9</name><scene>1</scene></object></annotation>"
        )
    (path / "test.txt").write_text("0\n1\n3\n")
    return ["--boxes", str(path), "--image-root", str(photographs)]


def test_the_pointing_game_on_boxes(tmp_path, model, photographs):
    chosen = entities(tmp_path / "entities", photographs)
    printed, result = evaluate(tmp_path, "--checkpoint", model, *chosen, "--split", "test")
    assert "6 phrases, 3 pictures, in float32" in printed and "100% of the phrases" in printed
    # The box is the left half of what is seen: half of the patches' centres.
    assert result["entities/chance/pointing_game"] == pytest.approx(0.5)
    assert result["entities/pointing_game"] * 6 == pytest.approx(round(result["entities/pointing_game"] * 6))
    line = make.refused(evaluate, tmp_path, "--checkpoint", model, *chosen)
    assert "--split is 'val': --boxes has test, and 'all'" in line
    assert not torch.distributed.is_initialized()  # a process that exits with its group up may abort


def test_choices_between_captions(tmp_path, model, photographs):
    lines = [
        {"image": f"{k}.jpg", "captions": [WORDS[k % 4], WORDS[(k + 1) % 4], "a"], "group": k // 2} for k in range(6)
    ]
    lines[5]["captions"][1] = lines[5]["captions"][0]  # no model can tell them apart
    lines.append({"image": "none.jpg", "captions": ["red", "blue"]})
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = ["--choices", str(file), "--image-root", str(photographs)]
    printed, result = evaluate(tmp_path, "--checkpoint", model, *chosen)
    assert "6 choices, 6 pictures, in float32, 2 left out: none.jpg (no such file)" in printed
    assert result["choices/chance/accuracy"] == pytest.approx(1 / 3)
    loaded = Model.load(model, device="cpu")
    is_right = []
    for line in lines[:6]:
        pictures = loaded.embed_images([str(photographs / line["image"])])
        scores = loaded.scores(pictures, loaded.embed_texts(line["captions"]))["combined"].i2t[0]
        is_right.append(bool((scores[0] > scores[1:]).all()))
    is_right[5] = False
    assert result["choices/combined/accuracy"] == pytest.approx(sum(is_right) / 6)
    assert (
        result["choices/combined/group"] == sum(a and b for a, b in zip(is_right[::2], is_right[1::2], strict=True)) / 3
    )
    file.write_text('{"image": "0.jpg", "captions": ["red"]}\n')
    line = make.refused(evaluate, tmp_path, "--checkpoint", model, *chosen)
    assert "line 1: give two captions or more" in line


def test_a_file_of_weights_is_that_model(tmp_path, photographs):
    folder = write_run(tmp_path)
    torch.manual_seed(1)
    average = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(average, folder / AVERAGE)
    data = ["--data", karpathy(tmp_path / "dataset.json"), "--image-root", str(photographs), "--split", "all"]
    metrics, averaged_metrics = (evaluate(tmp_path, str(folder), *data, *more)[1] for more in ([], ["--ema"]))
    file = str(folder / AVERAGE)
    assert evaluate(tmp_path, file, *data)[1] == averaged_metrics != metrics
    assert evaluate(tmp_path, str(folder / WEIGHTS), *data)[1] == metrics


def prompts_of_rank(rank: int, world: int, folder: str, run: str, out: str) -> dict:
    more = ["--zero-shot", folder, "--templates", f"{out}/templates.txt", "--json", f"{out}/{world}.json"]
    command.main(["--checkpoint", run, *more], standalone_mode=False)
    return json.loads(Path(f"{out}/{world}.json").read_text()) if rank == 0 else {}


def zero_shot_by_class(run: str, classes: Path, templates: list[str]) -> dict[str, float]:
    """Return the share of pictures whose own class is best: cosines with mean prompts, means of CMLI over prompts."""
    model = Model.load(run, device="cpu")
    files = [file for file in sorted(classes.rglob("*.png")) if file.name != "x.png"]
    images = model.embed_images(files)
    names = sorted({file.parent.name for file in files})
    cosines = []
    cmli = []
    for name in names:
        texts = model.embed_texts([template.replace("{}", name.replace("_", " ")) for template in templates])
        cosines.append(images.cls @ torch.nn.functional.normalize(texts.cls.mean(0), dim=0))
        cmli.append(model.scores(images, texts)["cmli"].i2t.mean(1))
    scores = {"global": torch.stack(cosines, 1), "cmli": torch.stack(cmli, 1)}  # [pictures, classes]
    scores["combined"] = scores["global"] / 0.07 + scores["cmli"] / 0.02  # the temperatures at the start
    target = torch.tensor([names.index(file.parent.name) for file in files])
    return {kind: (values.argmax(1) == target).float().mean().item() for kind, values in scores.items()}


def test_zero_shot_of_two_ranks_is_that_of_one(model, tmp_path):
    """Three classes of three templates and 7 pictures, one more broken: nothing divides by two."""
    make.pictures(tmp_path / "classes", *(f"class_{n % 3}/{n}.png" for n in range(7)))
    (tmp_path / "classes" / "class_0" / "x.png").write_bytes(b"no picture")
    (tmp_path / "templates.txt").write_text("a photo of {}\n{} here\nthe {}\n")
    arguments = str(tmp_path / "classes"), model, str(tmp_path)
    metrics, two_ranks = (ranks.run(prompts_of_rank, world, *arguments, group=False)[0] for world in (1, 2))
    (left_out,) = metrics.pop("zero_shot/left_out_first")
    assert two_ranks.pop("zero_shot/left_out_first") == [left_out] and "x.png (cannot identify" in left_out
    assert metrics == pytest.approx(two_ranks) and "zero_shot/cmli/mean_per_class" in metrics
    assert (metrics["zero_shot/pictures"], metrics["zero_shot/classes"], metrics["zero_shot/left_out"]) == (7, 3, 1)
    expected = zero_shot_by_class(model, tmp_path / "classes", ["a photo of {}", "{} here", "the {}"])
    for kind, accuracy in expected.items():
        assert metrics[f"zero_shot/{kind}/top1"] == pytest.approx(accuracy), kind
    assert metrics["zero_shot/combined/top5"] == 1 and metrics["zero_shot/chance/top1"] == pytest.approx(1 / 3)


def test_zero_shot_while_training_is_the_commands_figure_after_it(tmp_path):
    make.pictures(tmp_path / "pets", *(f"class_{n % 3}/{n}.png" for n in range(6)))
    run = tmp_path / "run"
    settings = {"run.zero_shot": str(tmp_path / "pets"), "run.best_by": "zero_shot", "run.keep_best": True}
    options = {"--output-dir": run, "--steps": 4, "--eval-every": 2}
    assert make.train(*make.small(options, settings)) == 0
    logged = make.lines(run, "zero_shot/pets/pictures")
    assert [line["step"] for line in logged] == [2, 4]
    _, measured = evaluate(tmp_path, str(run), "--zero-shot", str(tmp_path / "pets"))
    last = {name.replace("zero_shot/pets/", "zero_shot/"): value for name, value in logged[-1].items()}
    assert measured.keys() <= last.keys()
    for name, value in measured.items():
        assert last[name] == pytest.approx(value, abs=1e-9), name
    best = json.loads((run / "checkpoint" / "step4" / "state.json").read_text())["best"]
    accuracies = [line["zero_shot/pets/combined/top1"] for line in logged]
    assert best["metric"] == "pets combined top-1 accuracy" and best["value"] == pytest.approx(max(accuracies))
    assert best["step"] == logged[accuracies.index(max(accuracies))]["step"]
    assert (run / "model.best.safetensors").exists()
