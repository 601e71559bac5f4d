"""All-pairs CMLI in plain PyTorch, on any device: tiles of the similarity tensor that live one at a time.

The backend's two functions. Winners are private to it. They lie as the tiles use them, `code_i2t` [J, K] and
`code_t2i` [T, I], with texts and images sorted by length, K the valid patches of all images and T the valid tokens of
all texts; and they count backwards from the *last* valid position of the winning item, which is 0. So a row of NaN,
which equals no maximum, still names a position within range.
"""

from ds_cmli.cmli.chunked_backward import backward
from ds_cmli.cmli.chunked_forward import forward

__all__ = ["backward", "forward"]
