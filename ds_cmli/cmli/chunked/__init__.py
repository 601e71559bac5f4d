"""All-pairs CMLI in plain PyTorch, on any device: tiles of the similarity tensor that live one at a time.

These are the backend's two functions. The layout of its argmax indices is private to it: they lie as the tiles use
them, `arg_i2t` [J, K] and `arg_t2i` [T, I], with texts and images sorted by length, where K counts the valid patches of
all images and T the valid tokens of all texts. An index counts backwards from the *last* valid position of its
sequence, which is 0. So a row of NaN, which equals no maximum, still names a position within range.
"""

from ds_cmli.cmli.chunked.backward import backward
from ds_cmli.cmli.chunked.forward import forward

__all__ = ["backward", "forward"]
