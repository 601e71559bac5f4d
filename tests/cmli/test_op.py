"""The implementations of the op against the fp64 reference, and what is around them."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_cmli.cmli import cmli_scores, cpu, op
from ds_cmli.cmli.loss import CMLILoss
from tests.cmli.cases import LIMITS, case, check, with_gradients

IMAGE, TEXT, MASK = torch.randn(3, 20, 8), torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.bool)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_cases(backend, first):
    for seed in range(first, first + 20):
        check(partial(cmli_scores, backend=backend), case(seed))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_300_random_cases(backend):
    for seed in range(300):
        check(partial(cmli_scores, backend=backend), case(seed))


def test_fp64_is_fp64_throughout():
    for seed in range(12):
        check(cmli_scores, case(seed, dtype=torch.float64))
    assert LIMITS[torch.float64] == 1e-12


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_same_bits_each_time_and_for_any_number_of_threads(backend):
    of = case(7, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        results.append(with_gradients(partial(cmli_scores, backend=backend), of))
    torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    if backend == "cpu":
        assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ((IMAGE[0], TEXT, MASK), "image .* and text .* do not fit"),
        ((IMAGE[..., :7], TEXT, MASK), "do not fit"),
        ((IMAGE[:0], TEXT, MASK), "do not fit"),
        ((IMAGE.half(), TEXT, MASK), "of one dtype"),
        ((IMAGE.long(), TEXT.long(), MASK), "must be floats"),
        ((IMAGE, TEXT, MASK.long()), "token_mask must be bool"),
        ((IMAGE, TEXT, MASK[:, :5]), "token_mask must be bool"),
        ((IMAGE, TEXT, MASK, MASK), "patch_mask must be bool"),
        ((IMAGE, TEXT, MASK, None, "numpy"), "backend='numpy' is unknown"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        cmli_scores(*arguments)
    assert "\n" not in str(raised.value)


def test_kernels_that_do_not_run_are_replaced_with_a_warning_or_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (cpu.library, op.why_not_cpu, op._warn):
        cached.cache_clear()
    try:
        expected = cmli_scores(IMAGE, TEXT, MASK, backend="torch")
        with pytest.warns(UserWarning, match="without kernels, and slower.*nowhere"):
            assert all(map(torch.equal, cmli_scores(IMAGE, TEXT, MASK), expected))
        with pytest.raises(RuntimeError, match="backend='cpu' does not run here"):
            cmli_scores(IMAGE, TEXT, MASK, backend="cpu")
    finally:
        for cached in (cpu.library, op.why_not_cpu, op._warn):
            cached.cache_clear()


def test_the_library_is_renamed_into_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cpu.library.cache_clear()
        cpu.library()
    finally:
        cpu.library.cache_clear()
    (built,) = (tmp_path / "ds-cmli").iterdir()
    assert built.suffix == ".so"


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_tensors_without_data_have_the_shapes_of_others(backend):
    with FakeTensorMode():
        image, text = (torch.empty(x.shape).requires_grad_() for x in (IMAGE, TEXT))
        out = cmli_scores(image, text, torch.ones(4, 6, dtype=torch.bool), backend=backend)
        grads = torch.autograd.grad([s.sum() for s in out], (image, text))
    assert [x.shape for x in (*out, *grads)] == [(3, 4), (3, 4), IMAGE.shape, TEXT.shape]


def test_autocast_changes_nothing_but_a_narrower_side():
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, cmli_scores(IMAGE, TEXT, MASK), cmli_scores(IMAGE, TEXT, MASK, backend="cpu")))
        mixed = cmli_scores(IMAGE.bfloat16(), TEXT, MASK)
    torch.testing.assert_close(mixed, cmli_scores(IMAGE.bfloat16().float(), TEXT, MASK))


def test_a_second_derivative_is_refused():
    image = IMAGE.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cmli_scores(image, TEXT, MASK)[0].sum(), image, create_graph=True)


def test_the_op_imports_torch_alone():
    loaded = []
    for module in ("torch", "ds_cmli.cmli"):
        code = f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"
        loaded.append(set(subprocess.check_output([sys.executable, "-c", code], text=True).split()))
    assert loaded[1] - loaded[0] == {"ds_cmli"}


def test_a_compiled_model_trains_with_the_loss():
    torch.manual_seed(0)
    model, loss = torch.nn.Linear(8, 8), CMLILoss()

    def value(image, text):
        return loss(model(image), model(text), MASK[:3])

    expected = value(IMAGE, TEXT[:3])
    (right,) = torch.autograd.grad(expected, model.weight)
    torch._dynamo.reset()
    compiled = torch.compile(value, backend="aot_eager")(IMAGE, TEXT[:3])
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, model.weight)[0], right)
