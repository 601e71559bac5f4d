"""The losses, one file each; the table in `config/losses.py` names them."""

from typing import TYPE_CHECKING

from ds_cmli.common import registry
from ds_cmli.config.losses import LOSSES

if TYPE_CHECKING:
    from ds_cmli.losses.base import Loss


def load(name: str) -> "type[Loss]":
    """Import the file of the loss `name` and return its class."""
    return registry.load(__name__, LOSSES[name].implementation)
