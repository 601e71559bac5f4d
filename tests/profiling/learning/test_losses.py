"""The oracle's and the shuffled match, and a training with them by the starter of the experiment."""

import json

import pytest
import torch

from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.distillation import TargetText
from profiling.learning.losses import OracleText, ShuffledText, others, scrambled
from profiling.learning.plan import PLUGIN
from tests.conftest import run

GIVEN = ("--plugin", PLUGIN)

GRID = (4, 4)
CELLS = torch.tensor([[[7, 2], [-1, 2]]])  # the picture in each quarter of 2 x 2 patches


class Matched:
    """What the losses read of their inputs, with these similarities of tokens and patches."""

    def __init__(self, similarity, token_picture):
        self.similarity = similarity
        batch = {"token_mask": torch.ones(similarity.shape[:2], dtype=torch.bool), "cell_picture": CELLS,
                 "token_picture": token_picture, "index": torch.arange(len(similarity))}  # fmt: skip
        self.batch = type("Batch", (), batch)
        self.student = type("Student", (), {"grid": GRID})


@pytest.fixture
def given(monkeypatch):
    """Inputs whose similarities are given, for losses that change the match of `TargetText`."""
    monkeypatch.setattr(TargetText, "similarities", lambda self, inputs: inputs.similarity.clone())
    return lambda similarity, *pictures: Matched(similarity, torch.tensor([pictures]))


def test_an_oracle_matches_within_the_named_picture(given):
    # The best of the whole image is the last patch, of picture 2; of the first quarter it is the sixth patch.
    similarity = torch.arange(16.0).expand(1, 4, 16).contiguous()
    inputs = given(similarity, 7, 2, -1, 5)
    loss = OracleText(LossConfig())
    assert loss.match(inputs)[0, :2].tolist() == [5, 15]
    assert loss.counted(inputs).tolist() == [[True, True, False, False]]  # no quarter shows picture 5
    # The mean of the top is of patches of the picture alone: 0, 1, 4 and 5 of the first quarter.
    top = OracleText(LossConfig(target="top", target_top=6)).match(inputs)
    assert top[0, 0].nonzero().flatten().tolist() == [0, 1, 4, 5] and top.isfinite().all()


def test_tokens_are_not_named_by_padding(given):
    inputs = given(torch.rand(1, 2, 16), 7, 7)
    inputs.batch.token_mask[0, 1] = False
    assert OracleText(LossConfig()).counted(inputs).tolist() == [[True, False]]


def test_a_shuffled_token_has_the_match_of_another(given):
    similarity = torch.eye(16)[None, :4].contiguous()  # token m matches patch m
    loss = ShuffledText(LossConfig())
    inputs = given(similarity, -1, -1, -1, -1)
    inputs.batch.token_mask[0, 2] = False
    match = loss.match(inputs)[0].tolist()
    assert sorted(match) == [0, 1, 2, 3] and match[2] == 2
    assert all(match[m] != m for m in (0, 1, 3))
    assert torch.equal(loss.counted(inputs), inputs.batch.token_mask)


def test_the_order_depends_on_the_index_alone():
    torch.manual_seed(0)
    index, mask = torch.randint(20_000, (64,)), torch.rand(64, 12) < 0.7
    mask[0], mask[1] = False, torch.arange(12) == 3
    result = others(index, mask)
    places = torch.arange(12)
    for b in range(64):  # another number of ranks, and another padding
        assert torch.equal(others(index[b : b + 1], mask[b : b + 1])[0], result[b])
        padded = torch.cat([mask[b], torch.zeros(4, dtype=torch.bool)])
        assert torch.equal(others(index[b : b + 1], padded[None])[0, :12], result[b])
        assert torch.equal(result[b].sort().values, places)  # a permutation
        assert torch.equal(result[b][~mask[b]], places[~mask[b]])
        assert mask[b].sum() < 2 or (result[b] != places)[mask[b]].all()
    full = others(torch.arange(400), torch.ones(400, 4, dtype=torch.bool))
    drawn = full[:, 0].bincount(minlength=4)
    assert drawn[0] == 0 and (drawn[1:] > 100).all()  # 133 of each are expected


def test_the_mixer_of_splitmix64():
    """The first numbers of the generator with seed 0 are the mixer of 1 and 2, times its constant: published values."""
    assert scrambled(torch.tensor([1, 2])).tolist() == [0xE220A8397B1DCDAF - 2**63, 0x6E789E6AA1B965F4]


def test_the_plugin_trains_with_them(tmp_path):
    losses = "cmli,oracle_text=0.5,shuffled_text=0.5"
    done = run("--preset", "tiny", "--steps", "2", "--losses", losses, "--output-dir", str(tmp_path), "--set",
               "run.match_maps=0", *GIVEN, script="ds_cmli.train")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == 2
    for line in logged:
        parts = line["loss/cmli"] + 0.5 * (line["loss/oracle_text"] + line["loss/shuffled_text"])
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_a_mistake_is_one_line(tmp_path):
    done = run("--losses", "oracle", *GIVEN, script="ds_cmli.train")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "oracle_text" in done.stdout + done.stderr
    assert run("--losses", "oracle_text").returncode == 2  # of the experiment alone
