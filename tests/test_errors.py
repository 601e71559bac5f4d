"""Exceptions of libraries as one line."""

import pytest
import torch

from ds_cmli.errors import UserError, blame


def test_what_a_library_raises_is_blamed_on_what_was_given(monkeypatch):
    with pytest.raises(UserError, match=r"^--data x: KeyError: 'caption'$"), blame("--data x"):
        raise KeyError("caption")
    with pytest.raises(torch.OutOfMemoryError), blame("DeepSpeed refuses the configuration"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setenv("DS_CMLI_TRACEBACK", "1")
    with pytest.raises(KeyError), blame("--data x"):
        raise KeyError("caption")
