"""The texts of an image: their hashes, their positions, and wrong ones that do not count.

Shapes: B images, each with W texts of its own, of which the first K are right; C = B * W texts,
image by image; a tile of R images and T texts; M text positions.
"""

import torch
from torch import Tensor

from ds_cmli.cmli.contrastive import Own


def left_out(absent: Tensor, own: Own, rows: int, everywhere: bool) -> Tensor:
    """Wrong texts that an image is not compared with: bool [R, T].

    Those that are `absent`, bool [T], and, unless they count `everywhere`, those of other images.
    """
    absent = absent.expand(rows, -1)
    if everywhere:
        return absent
    image, place = own.places(absent)
    other = image != torch.arange(rows, device=image.device)[:, None]
    return absent | (other & (place >= own.right))


def ids_of_texts(pair_id: Tensor, wrong: int = 0) -> Tensor:
    """Hashes of picture and caption of each text: int64 [B, 1 + W] of images -> [C, 2].

    The picture of the last `wrong` ones of an image is none.
    """
    if pair_id.shape[1] == 2:
        return pair_id
    captions = pair_id[:, 1:]
    pictures = pair_id[:, :1].repeat(1, captions.shape[1])
    pictures[:, captions.shape[1] - wrong :].bitwise_not_()
    return torch.stack([pictures, captions], 2).flatten(0, 1)


def by_image(texts: Tensor, images: int) -> Tensor:
    """The positions of an image's texts one after another: [C, M, ...] -> [B, K * M, ...], a view.

    Raises ValueError unless each of the `images` B has as many texts.
    """
    if len(texts) % images:
        raise ValueError(f"{len(texts)} texts are no multiple of {images} images")
    return texts.unflatten(0, (images, -1)).flatten(1, 2)
