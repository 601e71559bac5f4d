"""All-pairs Cross-Modal Late Interaction (CMLI): exact scores of every image with every text, and
the loss on them.

Usable from any PyTorch project; knows nothing of DeepSpeed, configurations or data.
"""

from ds_cmli.cmli.loss import CMLILoss
from ds_cmli.cmli.op import cmli_scores
from ds_cmli.cmli.peak_memory import PeakBytes, cmli_peak_bytes

__all__ = [
    "CMLILoss",
    "PeakBytes",
    "cmli_peak_bytes",
    "cmli_scores",
]
