"""Pointing-game accuracy on Flickr30k Entities: whether the best patch of a phrase lies in one of its boxes."""

from typing import Any

import torch

from ds_cmli.data import EvalData
from ds_cmli.data.bad import told
from ds_cmli.data.entities import Entities
from ds_cmli.data.held_out import HeldOut
from ds_cmli.data.transforms import central_square
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import pair_positions
from ds_cmli.evaluate.pointing_game import patches_inside, phrase_hits
from ds_cmli.evaluate.split import embed_share


def pointing_game(
    student: Any, entities: Entities, data: EvalData, batch_size: int, device: Any, workers: int = 0
) -> dict[str, Any]:
    """Measure pointing-game accuracy, the same on every rank. Collective.

    Returns:
        `pointing_game`, the share of `phrases` with a hit; `chance/pointing_game`, that of a random patch; `visible`,
        the share of phrases with the centre of a patch in one of their boxes (the model sees only the central square of
        a picture, and a phrase outside of it counts as missed); `pictures`, their number; and if captions cannot be
        used, `left_out` (their number) and `left_out_first` (the names of some).
    """
    held_out = HeldOut(entities)
    share = embed_share(student, held_out, data.collate, batch_size, device, workers)  # collective
    sums = torch.zeros(4, dtype=torch.float64)  # hits, phrases, chance, visible phrases
    for image, text in pair_positions(share.images, share.texts, held_out.image_of):
        caption = entities.captions[int(share.texts.number[text])]
        view = central_square(*caption.size)
        inside = torch.stack(
            [patches_inside(boxes, view, student.grid) for boxes in caption.boxes]
        )  # [F, N]
        tokens = share.texts.tokens_of(text)
        found = phrase_hits(
            share.images.patches[image],
            share.texts.tokens[tokens],
            share.texts.token_picture[tokens],
            inside,
        )
        chance = inside.double().mean(1).sum().item()
        sums += torch.tensor(
            [found.sum(), len(found), chance, inside.any(1).sum()], dtype=torch.float64
        )
    hits, phrases, chance, visible = distributed.sum_over_ranks(sums).tolist()  # collective
    out: dict[str, Any] = {
        "pointing_game": hits / phrases,
        "chance/pointing_game": chance / phrases,
    }
    pictures = held_out.image_of[share.captions].unique()
    out |= {"visible": visible / phrases, "phrases": int(phrases), "pictures": len(pictures)}
    if share.left_out:
        lost = len(held_out.image_of) - len(share.captions)
        out |= {"left_out": lost, "left_out_first": told(share.left_out)}
    return out
