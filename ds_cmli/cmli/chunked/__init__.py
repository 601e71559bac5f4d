"""All-pairs CMLI on any device, in plain PyTorch. One tile of the similarities exists at a time.

`forward` and `backward` are the backend's two functions. The layout of the argmax indices that one
passes to the other is private to this backend: `arg_i2t` is [J, K] and `arg_t2i` is [T, I], where K
is the number of valid patches of all images, T the number of valid tokens of all texts, and images
and texts are sorted by length. An index counts backwards from the last valid position of its
sequence, which has index 0: a row of NaN, in which no element equals the maximum, then still gets
an index within range. On a CPU, in fp32 and fp64, compiled kernels do all this (`kernels.py`), and
lay the indices out as they need them.
"""

from ds_cmli.cmli.chunked.backward import backward
from ds_cmli.cmli.chunked.forward import forward

__all__ = ["backward", "forward"]
