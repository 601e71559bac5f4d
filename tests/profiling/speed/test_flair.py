"""The benchmark of FLAIR's scores: each way computes the same, and the tiles hold less."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

from ds_cmli.cmli.pooling import TextConditionedPooling
from profiling.speed import flair


@pytest.mark.slow
def test_ways_agree_and_tiles_hold_less():
    pooling = TextConditionedPooling(flair.H, flair.D)
    patches = torch.nn.functional.normalize(torch.randn(2, 3, flair.D), dim=2)
    texts = torch.nn.functional.normalize(torch.randn(4, flair.H), dim=1)
    for fused in (False, True):
        assert_close(flair.stored(patches, texts, pooling, fused), pooling(patches, texts))
    result = CliRunner().invoke(flair.main, ["--pairs", "8", "--texts", "8", "--repeats", "1", "--json"])
    assert not result.exception, result.output
    held = {row["way"]: row["bytes"] for row in json.loads(result.stdout)}
    assert held["tiles"] < held["stored"]
