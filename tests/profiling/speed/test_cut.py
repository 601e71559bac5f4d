"""The benchmark of a cut: each step it times sees the same features."""

from types import SimpleNamespace

import torch

from ds_cmli.losses.pair_features import PairFeatures
from profiling.speed.cut import cached_step


def test_a_timed_step_leaves_the_features_as_they_were():
    """A step writes gradients over what it is given, and would be timed on those the next time."""

    def compare(step):
        for features in step.features:
            step.set_gradient(features, "patches", torch.ones(2, 3, 4))

    patches = torch.randn(2, 3, 4)
    ids, mask = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    features = PairFeatures({"patches": patches.clone(), "tokens": torch.randn(2, 5, 4)}, mask, ids)
    cached_step(SimpleNamespace(compare=compare, cut=None), [features])()
    assert torch.equal(features.features["patches"], patches)
