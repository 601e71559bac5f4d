"""All-pairs CMLI on a GPU by Triton kernels that never store the similarities: the backend's two
functions."""

from ds_cmli.cmli.triton.backend import Sizes, backward, forward

__all__ = ["Sizes", "backward", "forward"]
