"""Which backend runs where."""

import re
from types import SimpleNamespace

import pytest
import torch

from ds_cmli.cmli import backends, chunked

ON_GPU = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(2, 4, 16))


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((7, 5), "3.9.0", "8.0 or later, this GPU has 7.5"),
        ((10, 0), "3.7.1", "Triton 3.7.1 does not compile .* 10.0"),
        ((10, 3), "3.4.0+git", r"Triton 3\.4\.0\+git does not"),
        ((10, 0), "3.10.0", None),
        ((8, 0), "3.4.0", None),
        ((12, 0), "3.7.1", None),
    ],
)
def test_gpus_that_do_not_run_the_kernels_are_known(capability, triton, reason):
    found = backends.unsuited(capability, triton)
    assert found is None if reason is None else re.search(reason, found)


def test_where_the_kernels_do_not_run_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(backends, "why_no_kernels", lambda *_: "no room")
    with pytest.warns(UserWarning, match="the slower chunked backend: no room"):
        assert backends.backend_of("auto", ON_GPU, ON_GPU) is chunked
    with pytest.raises(RuntimeError, match=r"'triton' cannot be used here \(no room\): use backend='chunked'"):
        backends.backend_of("triton", ON_GPU, ON_GPU)
    assert backends.backend_of("chunked", ON_GPU, ON_GPU) is chunked
