"""The loss regions: a formula in fp64 on random cases, ranks against one process, and trainings."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ds_cmli.cmli.ring import Scorer
from ds_cmli.config.schema import LossConfig, load_config
from ds_cmli.data.aspect import overlaps
from ds_cmli.data.batch import Regions as Boxes
from ds_cmli.losses.inputs import Features, LossInputs
from ds_cmli.losses.regions import Regions
from tests.checkpoint.test_restore import AUGMENTED, assert_same, json_file, ranks
from tests.conftest import spawn
from tests.drive_train import drive as train
from tests.models.test_any_aspect import NAFLEX, SIZES, of_many_aspects
from tests.stranger.drive import STEPS, check_memory, drive

D, F64 = 6, torch.float64


def share(box, row, column, grid):
    """The area of a box in one patch."""
    left, top, right, bottom = box
    high = min(bottom, (row + 1) / grid[0]) - max(top, row / grid[0])
    wide = min(right, (column + 1) / grid[1]) - max(left, column / grid[1])
    return max(0.0, high) * max(0.0, wide)


def formula(patches, phrases, boxes, present, ids, grids, places):
    """The mean over the regions that there are, each against the phrases of all, and each phrase against all."""
    B, R, N = len(patches), boxes.shape[1], patches.shape[1]
    regions, shown = [], []
    for n in range(B * R):
        b, r = divmod(n, R)
        weights = []
        for at in range(N):
            number = at if places is None else int(places[b, at])
            weights.append(share(boxes[b, r].tolist(), *divmod(number, int(grids[b][1])), grids[b].tolist()))
        shown.append(bool(present[n]) and sum(weights) > 0)
        unit = F.normalize(patches[b], dim=1)
        regions.append(F.normalize(sum(w * x for w, x in zip(weights, unit, strict=True)), dim=0))
    texts, total, count = F.normalize(phrases, dim=1), patches.new_zeros(()), sum(shown)
    for n in filter(shown.__getitem__, range(B * R)):
        others = [m for m in range(B * R) if shown[m] and (m == n or ids[m] != ids[n])]
        row = torch.stack([regions[n] @ texts[m] / 0.07 for m in others])
        column = torch.stack([regions[m] @ texts[n] / 0.07 for m in others])
        own = regions[n] @ texts[n] / 0.07
        total = total + (row.logsumexp(0) + column.logsumexp(0) - 2 * own) / (2 * count)
    return total


def case(number, images=None):
    """Random images, boxes, some of them absent or past the picture's patches, and phrases, some of them equal."""
    generator = torch.Generator().manual_seed(number)

    def whole(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    B, R, grid = images or whole(1, 4), whole(1, 4), (whole(1, 4), whole(1, 5))
    N = grid[0] * grid[1]
    patches = torch.randn(B, N, D, generator=generator, dtype=F64)
    sides = torch.rand(B, R, 2, 2, generator=generator, dtype=F64).sort(2).values
    present = torch.rand(B * R, generator=generator) < 0.8
    ids = torch.randint(0, 4 * R, (B * R,), generator=generator)
    phrases = torch.randn(B * R, D, generator=generator, dtype=F64)
    grids = places = None
    if whole(0, 3) == 0:  # pictures of any aspect
        grids = torch.tensor([[max(1, grid[0] - whole(0, 2)), max(1, grid[1] - whole(0, 2))] for _ in range(B)])
    elif whole(0, 2):  # of which training sees some patches
        kept = max(1, N // 2)
        places = torch.stack([torch.randperm(N, generator=generator)[:kept] for _ in range(B)])
        patches = patches[:, :kept]
    return patches, phrases, sides.flatten(2), present, ids, grid, grids, places


def computed(patches, phrases, boxes, present, ids, grid, grids, places):
    loss = Regions(LossConfig()).double()
    with torch.no_grad():
        loss.logit_scale.fill_(math.log(1 / 0.07))
    patches, phrases = patches.clone().requires_grad_(), phrases.clone().requires_grad_()
    features = Features(phrases, patches, phrases, phrases, phrases, places)
    none = torch.zeros(0)
    batch = SimpleNamespace(regions=Boxes(boxes, present, none, none, ids), grid=grids)
    student = SimpleNamespace(projection=nn.Identity(), grid=grid)
    value = loss(LossInputs(features, batch, None, student, None, Scorer()))
    return [value.detach(), *torch.autograd.grad(value, (patches, phrases, loss.logit_scale))]


@pytest.mark.parametrize("numbers", [range(15), pytest.param(range(15, 315), marks=pytest.mark.slow)], ids=str)
def test_values_and_gradients_are_those_of_the_formula(numbers):
    for number in numbers:
        patches, phrases, boxes, present, ids, grid, grids, places = case(number)
        ours = computed(patches, phrases, boxes, present, ids, grid, grids, places)
        leaves = [x.clone().requires_grad_() for x in (patches, phrases)]
        of_images = torch.tensor([grid] * len(patches)) if grids is None else grids
        expected = formula(*leaves, boxes, present, ids, of_images, places)
        assert_close(ours[0], expected.detach(), rtol=1e-9, atol=1e-9)
        if expected.requires_grad:
            theirs = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
            assert_close(ours[1:3], list(theirs), rtol=1e-8, atol=1e-9, msg=f"case {number}")
        else:  # no region is there
            assert not any(x.any() for x in ours[1:3])


def test_overlaps_by_hand():
    # Two rows and two columns of patches; the box is the middle of the right half.
    boxes = torch.tensor([[[0.5, 0.25, 1.0, 0.75]]])
    assert_close(overlaps(boxes, torch.tensor([[2, 2]]), 5), torch.tensor([[[0.0, 0.125, 0.0, 0.125, 0.0]]]))


def on_rank(rank, ranks, number):
    patches, phrases, boxes, present, ids, *others = case(number, 2 * ranks)
    R, mine = boxes.shape[1], slice(2 * rank, 2 * rank + 2)
    of_regions = slice(2 * R * rank, 2 * R * (rank + 1))
    parts = [part if part is None else part[mine] for part in others[1:]]
    return computed(
        patches[mine], phrases[of_regions], boxes[mine], present[of_regions], ids[of_regions], others[0], *parts
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one(ranks):
    for number in (0, 3):
        expected, results = computed(*case(number, 2 * ranks)), spawn(on_rank, ranks, number)
        assert_close(sum(r[0] for r in results) / ranks, expected[0], rtol=1e-10, atol=1e-12)
        for place in (1, 2):
            of_ranks = torch.cat([r[place] for r in results]) / ranks
            assert_close(of_ranks, expected[place], rtol=1e-9, atol=1e-12)
        assert_close(sum(r[3] for r in results) / ranks, expected[3], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("data.captions=2", "data.negatives=field", "student.patch_keep=0.5")])
def test_scenes_train_with_their_quarters(tmp_path, alone, settings):
    given = [option for setting in ("data.regions=3", *settings) for option in ("--set", setting)]
    content = drive(tmp_path, "--losses", "global,regions=0.5", *given)
    assert len(content["logged"]) == STEPS and "refused" not in content
    assert {"loss/regions", "temperature/regions"} <= content["logged"][0].keys()
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["losses"] == [["global", 1.0]]


@pytest.mark.slow
@pytest.mark.parametrize("stage, ranks_, aspect", [(3, 2, False), (1, 1, True), (2, 1, False)])
def test_a_run_with_boxes_goes_on_as_if_uninterrupted(tmp_path, alone, stage, ranks_, aspect):
    source = of_many_aspects(tmp_path / "pictures")
    region = {"x": 2, "y": 3, "width": 15, "height": 12}
    genome = []
    for n in range(60):
        regions = [{**region, "phrase": f"part {k} of picture {n % 9}"} for k in range(n % 4)]
        genome.append({"id": n, "regions": regions})
    (tmp_path / "boxes.json").write_text(json.dumps(genome))
    content = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000},
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": stage == 2},
    }
    settings = {
        "data.boxes": str(tmp_path / "boxes.json"),
        "data.regions": 3,
        "data.captions": 2,
        "data.split_sentences": True,
        "loss.weights": {"global": 1.0, "cmli": 1.0, "regions": 0.5},
        "student.dropout": 0.2,
        "student.layers": 1,
        "run.match_maps": 0,
    }
    if aspect:
        settings |= {"data.aspect_patch": 14, "data.image_size": 42, "student.image_overrides": SIZES | NAFLEX}
    given = [
        "--preset",
        "tiny",
        "--steps",
        "4",
        "--eval-every",
        "3",
        "--micro-batch",
        "4",
        *AUGMENTED[: 2 * (not aspect)],
    ]
    for name, value in settings.items():
        given += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    given += [*source, *json_file(tmp_path / "ds.json", content)]
    straight, broken = tmp_path / "run", tmp_path / "broken"
    tasks = [{"arguments": [*given, "--output-dir", str(straight)]}]
    tasks += [{"arguments": [*given, "--output-dir", str(broken), "--workers", "1"], "stop_at": 3}]
    tasks += [{"arguments": [*given, "--output-dir", str(broken)]}]
    if ranks_ == 2:
        codes, _ = ranks(tmp_path, 2, tasks)
    else:
        codes = [train(task["arguments"], task.get("stop_at")) for task in tasks]
    assert codes == [0, 85, 0]
    assert_same(straight, broken)
    check_memory(load_config(straight / "config.json", "the run"), content, ranks_, 512)
