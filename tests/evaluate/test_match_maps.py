"""Match maps of an evaluation: the right pairs, the right pixels, on any number of ranks, and no other result."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.utils.data import Subset

from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import build_models
from ds_cmli.evaluate.embed import EmbedSettings, Images, Share, Texts
from ds_cmli.evaluate.match_maps import match_maps
from ds_cmli.evaluate.split import evaluate_split


def test_the_same_pairs_on_any_number_of_ranks_and_the_same_results(device, data, monkeypatch):
    config = load_preset("tiny", {})
    objective, _ = build_models(config, data.vocab_size, special=data.special)
    few = Subset(data.evals["seen"], range(3, 23))
    shown, how = [], EmbedSettings(50, torch.device("cpu"))
    before = torch.random.get_rng_state()
    measured = evaluate_split(objective, few, data, how, show=shown.append)
    (share,) = shown
    held_out, grid = share.held_out, share.images.grid
    alone = match_maps(share, data.tokenizer, 5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert measured == evaluate_split(objective, few, data, how)
    assert len(alone) == 5
    for number, one in enumerate(alone):
        sample = data.evals["seen"].pair(3 + number)
        assert torch.equal(one.image, sample.image) and one.text == sample.tokens.text
        assert "".join(one.match.words) == one.text.replace(" ", "")
        shape = (sum(sample.tokens.valid), grid[0] * grid[1])
        assert one.match.similarity.shape == shape == (len(one.match.words), 16)
        assert 0.05 < one.match.similarity.abs().max() <= 1 + 1e-5

    # Of two ranks one has the even pictures, the other the odd ones.
    parts = []
    for rank in (0, 1):
        images = share.images.select(share.images.number % 2 == rank)
        texts = share.texts.select(held_out.image_of[share.texts.number] % 2 == rank)
        monkeypatch.setattr(distributed, "gather_objects", lambda mine: parts.append(mine) or [*parts])
        both = match_maps(replace(share, images=images, texts=texts), data.tokenizer, 5)
    assert [sorted(part) for part in parts] == [[0, 2, 4], [1, 3]]
    for one, other in zip(alone, both, strict=True):
        assert (one.text, one.match.words) == (other.text, other.match.words)
        assert torch.equal(one.match.similarity, other.match.similarity)


def test_a_caption_more_and_a_picture_that_is_left_out():
    """Each picture once, with the first caption that can be used; one without such is not shown."""

    class Pairs:
        def pair(self, row):
            return SimpleNamespace(
                image=torch.full((3, 4, 4), row),
                tokens=SimpleNamespace(text=f"猫{row} …", valid=[False, True, False]),
            )

    held_out = SimpleNamespace(image_of=torch.tensor([0, 0, 1, 2, 2]), rows=[10, 11, 12, 13, 14], pairs=Pairs())
    one = torch.eye(4)
    images = Images(torch.tensor([0, 2]), one[:2], one[:2, None], torch.zeros(2, 2, 2), (1, 1))
    captions = torch.tensor([1, 3, 4])  # the first has no token, and the second picture is broken
    texts = Texts(captions, one[:3], one[:3], torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    tokenizer = SimpleNamespace(spans=lambda text: [(0, 0), (0, 3), (0, 0)])
    result = match_maps(Share(held_out, images, texts, captions, []), tokenizer, 4)
    assert [(x.text, x.match.words, x.match.similarity.tolist()) for x in result] == [
        ("猫11", ["猫11"], [[1.0]]),
        ("猫13", ["猫13"], [[1.0]]),
    ]
