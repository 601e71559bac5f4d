"""What PyTorch's CPU allocator takes, counted below torch, beside the recorder of `fits`; sizes by hand."""

import pytest

from profiling.fits import cpu as fit_cpu

SIZE = 4 << 20  # a tensor [1024, 1024] in fp32
PROGRAM = """
import torch
layer = torch.nn.Linear(1024, 1024, bias=False).cuda()
optimizer = torch.optim.SGD(layer.parameters(), 1e-3, momentum=0.9, foreach=False)
for step in range(9):
    layer(torch.randn(1024, 1024, device="cuda")).backward(torch.ones(1024, 1024, device=torch.device("cuda:0")))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    (folder / "program.py").write_text(PROGRAM)
    library = fit_cpu.built(folder)
    return fit_cpu.peaks("counted", folder / "program.py", 2, library), fit_cpu.peaks("fits", folder / "program.py", 2)


@pytest.mark.slow
def test_both_peaks_are_those_by_hand(peaks):
    """In the second backward pass: weight, momentum, both gradients, the input, the output and its gradient."""
    counted, recorded = peaks
    assert recorded["requested"] == 7 * SIZE
    assert 7 * SIZE <= counted["requested"] < 7 * SIZE + 100  # and numbers, which are tensors below torch


def test_a_program_that_fails_is_told_in_one_line(tmp_path):
    (tmp_path / "program.py").write_text("raise KeyError('mine')")
    with pytest.raises(fit_cpu.UserError, match=r"^fits: exit code 1: KeyError: 'mine'$"):
        fit_cpu.peaks("fits", tmp_path / "program.py", 2)
