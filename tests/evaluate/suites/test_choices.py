"""Choices of captions in the published formats, against the metrics computed one pair at a time."""

import csv
import json
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.evaluate.model import PictureFile
from ds_cmli.evaluate.suites.suite import read_suite
from ds_cmli.evaluate.suites.task import Measure
from tests.evaluate.suites import lists

KINDS = ("global", "cmli", "combined")


def measured(tmp_path, model, write):
    return read_suite(lists.write_suite(tmp_path, task=write(tmp_path)))["task"].run(model)


class Scores:
    """Scores of one picture's file with one text, by the plain equations."""

    def __init__(self, model):
        self.model, self.kind, self.known = model, "", {}

    def of(self, kind):
        self.kind = kind
        return self

    def embedded(self, key):
        if key not in self.known:
            embed = self.model.texts if isinstance(key, str) else self.model.images
            self.known[key] = embed([key if isinstance(key, str) else PictureFile(key)])
        return self.known[key]

    def both(self, file, text):
        """From the picture's side, and from the caption's."""
        if (self.kind, file, text) not in self.known:
            images, texts = self.embedded(file), self.embedded(text)
            cosine = float(images.cls[0] @ texts.cls[0])
            mask = torch.ones(1, len(texts.tokens), dtype=torch.bool)
            ways = cmli_scores_reference(images.patches.float(), texts.tokens[None].float(), mask)
            scales, out = self.model.scales, []
            for cmli in map(float, ways):
                combined = scales["global"] * cosine + scales["cmli"] * cmli
                out.append({"global": cosine, "cmli": cmli, "combined": combined}[self.kind])
            self.known[self.kind, file, text] = out
        return self.known[self.kind, file, text]

    def i2t(self, file, text):
        return self.both(file, text)[0]

    def t2i(self, file, text):
        return self.both(file, text)[1]


def values(result, kind):
    return {name.split("/", 1)[1]: m.value for name, m in result.measures.items() if name.startswith(f"{kind}/")}


def test_sugarcrepe(tmp_path, model):
    result, score = measured(tmp_path, model, lists.sugarcrepe), Scores(model)
    for kind in KINDS:
        score.of(kind)
        expected = {}
        for name in ("add_obj", "replace_att", "swap_obj"):
            entries = json.loads((tmp_path / "data" / f"{name}.json").read_text()).values()
            correct = 0
            for entry in entries:
                file = tmp_path / "val2017" / entry["filename"]
                correct += score.i2t(file, entry["caption"]) > score.i2t(file, entry["negative_caption"])
            expected[name] = correct / len(entries)
        expected["mean"] = sum(expected.values()) / 3
        assert values(result, kind) == pytest.approx(expected)
        assert result.samples == 15 and result.figures == {"chance/mean": 0.5}


@pytest.mark.parametrize("write", [lists.vg_relation, lists.vg_attribution], ids=["relation", "attribution"])
def test_visual_genome_of_aro(tmp_path, model, write):
    result, score = measured(tmp_path, model, write), Scores(model)
    for kind in KINDS:
        score.of(kind)
        by_group = defaultdict(list)
        for entry in json.loads(next(tmp_path.glob("visual*.json")).read_text()):
            x, y, w, h = (entry[f"bbox_{side}"] for side in "xywh")
            part = tmp_path / f"part-{entry['image_id']}.png"
            Image.open(tmp_path / "images" / entry["image_path"]).convert("RGB").crop((x, y, x + w, y + h)).save(part)
            right = score.i2t(part, entry["true_caption"]) > score.i2t(part, entry["false_caption"])
            by_group[entry.get("relation_name") or "_".join(entry["attributes"])].append(right)
        every = [right for hits in by_group.values() for right in hits]
        counted = [
            hits
            for name, hits in by_group.items()
            if name != "next to" and ("attribution" not in write.__name__ or len(hits) >= 25)
        ]
        assert len(counted) == (3 if write is lists.vg_relation else 1)
        mean = sum(sum(hits) / len(hits) for hits in counted) / len(counted)
        assert values(result, kind) == pytest.approx({"accuracy": sum(every) / len(every), "mean": mean})


def test_order_of_aro_takes_the_first_of_equal_scores(tmp_path, model):
    result, score = measured(tmp_path, model, lists.coco_order), Scores(model)
    for kind in KINDS:
        score.of(kind)
        correct = []
        for entry in json.loads((tmp_path / "coco_order.json").read_text()):
            scores = [score.i2t(tmp_path / entry["image"], text) for text in entry["caption_options"]]
            assert scores[0] == scores[2]
            correct.append(max(range(5), key=scores.__getitem__) == 0)
        assert values(result, kind) == pytest.approx({"accuracy": sum(correct) / 6})
        assert sum(correct) > 0 or kind != "global"


@pytest.mark.parametrize("write", [lists.winoground, lists.colorswap], ids=["winoground", "colorswap"])
def test_two_pictures_with_two_captions(tmp_path, model, write):
    result, score = measured(tmp_path, model, write), Scores(model)
    for kind in KINDS:
        score.of(kind)
        if write is lists.winoground:
            rows = list(map(json.loads, (tmp_path / "examples.jsonl").read_text().splitlines()))
            files = [[tmp_path / "images" / f"{row[f'image_{k}']}.png" for k in (0, 1)] for row in rows]
            texts = [[row["caption_0"], row["caption_1"]] for row in rows]
        else:
            rows = json.loads((tmp_path / "test.json").read_text())
            files = [[tmp_path / row["image_1"], tmp_path / row["image_2"]] for row in rows]
            texts = [[row["caption_1"], row["caption_2"]] for row in rows]
        sums = dict.fromkeys(("text", "image", "group"), 0)
        for (i0, i1), (c0, c1) in zip(files, texts, strict=True):
            text = score.i2t(i0, c0) > score.i2t(i0, c1) and score.i2t(i1, c1) > score.i2t(i1, c0)
            image = score.t2i(i0, c0) > score.t2i(i1, c0) and score.t2i(i1, c1) > score.t2i(i0, c1)
            sums["text"] += text
            sums["image"] += image
            sums["group"] += text and image
        assert values(result, kind) == pytest.approx({name: count / len(rows) for name, count in sums.items()})


def test_mmvp(tmp_path, model):
    result, score = measured(tmp_path, model, lists.mmvp), Scores(model)
    for kind in KINDS:
        score.of(kind)
        with open(tmp_path / "Questions.csv") as file:
            rows = list(csv.reader(file))[1:]
        hits = defaultdict(list)
        for (q1, pattern, s1), (q2, _, s2) in zip(rows[::2], rows[1::2], strict=True):
            files = [tmp_path / "MMVP_VLM_Images" / pattern / f"{q}.jpg" for q in (q1, q2)]
            predicted = []
            for text in (s1, s2):
                logits = torch.tensor([score.t2i(file, f"a photo of {text}") for file in files], dtype=torch.float64)
                predicted.append("img1" if logits.softmax(0)[0] > 0.5 else "img2")
            hits[pattern].append(predicted == ["img1", "img2"])
        expected = {pattern: sum(of) / len(of) for pattern, of in hits.items()}
        assert values(result, kind) == pytest.approx({**expected, "mean": sum(expected.values()) / 2})


def test_ties_are_counted_as_published():
    from ds_cmli.evaluate.suites.aro import Order
    from ds_cmli.evaluate.suites.choices import first_is_best
    from ds_cmli.evaluate.suites.mmvp import MMVP
    from ds_cmli.evaluate.suites.winoground import Winoground

    nan = float("nan")
    assert first_is_best(torch.tensor([[1.0, 1.0], [1, 0.5], [nan, 0], [1, nan]])).tolist() == [
        False,
        True,
        False,
        False,
    ]
    equal = torch.ones(1, 2, 2)
    assert {m.value for m in Winoground.measures(None, equal, equal).values()} == {0.0}
    assert Order.measures(None, torch.ones(1, 1, 5), equal)["accuracy"].value == 1
    # The second statement's tie is its own picture, the first's is not.
    for t2i, value in (([[1.0, 1], [0, 1]], 1), ([[1.0, 0], [1, 1]], 0)):
        game = SimpleNamespace(groups=["a"])
        assert MMVP.measures(game, equal, torch.tensor([t2i]))["mean"].value == value


@pytest.mark.parametrize("write", lists.CHOICES, ids=lambda write: write.__name__)
def test_chance_is_that_of_random_scores(tmp_path, write):
    task, generator = read_suite(lists.write_suite(tmp_path, task=write(tmp_path)))["task"], np.random.default_rng(0)
    shape = len(task.questions), len(task.questions[0].pictures), len(task.questions[0].captions)
    for metric, chance in task.chance.items():
        drawn = []
        for _ in range(400):
            scores = torch.from_numpy(generator.random(shape))
            drawn.append(task.measures(scores, scores)[metric].value)
        assert np.mean(drawn) == pytest.approx(chance, abs=0.03)


def test_measures_by_hand():
    right, groups = torch.tensor([1.0, 0, 1, 1]), ["a", "a", "a", "b"]
    assert Measure.accuracy(right).value == 0.75
    mean = Measure.mean_of_groups(right, groups)
    assert mean.value == pytest.approx((2 / 3 + 1) / 2)
    # Only the second and third are drawn: of the groups, a is left.
    assert mean.resampled(torch.tensor([[0.0], [1], [1], [0]], dtype=torch.float64)).item() == 0.5
    assert Measure.by_group(right, groups)["b"].value == 1
    assert Measure.mean([Measure.accuracy(right), Measure.accuracy(1 - right)]).value == 0.5
    # An intersection over union of two classes: 3 of 4 and 1 of 6 pixels, over two pictures.
    pixels = Measure(torch.tensor([[1.0, 1], [2, 0]]), torch.tensor([[2.0, 5], [2, 1]]))
    assert pixels.resampled(torch.ones(2, 1)).item() == pytest.approx((3 / 4 + 1 / 6) / 2)
