"""The fake CUDA device by small programs: sizes by hand, or of PyTorch's own allocator on the null GPU."""

import weakref
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ds_cmli.errors import UserError
from ds_cmli.fake_cuda.device import fake_cuda, guard
from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.memory.step_memory import one_rank
from ds_cmli.memory_model import gpus, workspaces

A100 = gpus.find("A100 80GB")
MIB = 2**20


@pytest.fixture
def recorder():
    recorder = Recorder(gpu=A100)
    with fake_cuda(recorder, A100):
        yield recorder


def live(recorder: Recorder) -> int:
    return sum(event.bytes for event in recorder.events())


def test_torch_finds_a_gpu_inside_and_none_outside():
    assert not torch.cuda.is_available()
    for _ in range(2):
        with fake_cuda(Recorder(gpu=A100), A100):
            assert torch.cuda.get_device_capability() == (8, 0) and torch.cuda.current_device() == 0
            x = torch.ones(4, 4, device="cuda", requires_grad=True)
            (x @ x).sum().backward()
            assert x.grad.device == torch.device("cuda", 0)
            x.itself = x
            tensor = weakref.ref(x)
            del x
        assert tensor() is None, "an engine, which is part of a reference cycle, outlives its prediction"
        assert not torch.cuda.is_available()
        x = torch.ones(2, requires_grad=True)
        (x * 2).sum().backward()
        assert x.grad.tolist() == [2.0, 2.0]


def test_a_storage_is_live_from_its_allocation_until_nobody_has_it(recorder):
    x = torch.empty(1000, device="cuda")
    assert live(recorder) == 4000
    view = x[10:]
    host = torch.empty(1 << 20)
    del x
    assert live(recorder) == 4000 and host.device.type == "cpu"
    del view
    assert live(recorder) == 0


def test_a_module_moves_and_its_parameters_stay_the_same_objects(recorder):
    layer = nn.Linear(300, 300)  # more elements than have data on the host
    weight = layer.weight
    bias = layer.bias
    weight.ours = True
    layer.half().cuda()
    assert layer.weight is weight and layer.bias is bias and weight.ours
    assert {p.device.type for p in layer.parameters()} == {"cuda"} and weight.dtype == torch.float16
    assert live(recorder) == 2 * (300 * 300 + 300)
    before = live(recorder)
    weight.data = weight.data.cpu()
    assert weight.device.type == "cpu" and live(recorder) == before - 2 * 300 * 300


def test_what_is_read_is_known_or_stood_in_for(recorder):
    sizes = torch.tensor([8, -8, 32], device="cuda")
    assert sizes.tolist() == [8, -8, 32] and int(sizes[2] + 1) == 33
    x = torch.randn(5, device="cuda")
    assert x.sum().item() == 2.0 and bool(torch.isfinite(x).all()) and not bool(x.isnan().any())
    assert torch.zeros(3, dtype=torch.int64, device="cuda").cpu().tolist() == [0, 0, 0]


def test_ranks_have_what_this_one_has():
    with fake_cuda(Recorder(gpu=A100), A100), one_rank(4, 2):
        values = torch.tensor([7, 9], device="cuda")
        dist.all_reduce(values, dist.ReduceOp.MAX)
        assert values.tolist() == [7, 9] and (dist.get_rank(), dist.get_world_size()) == (2, 4)


def kept(recorder: Recorder, function) -> int:
    x = nn.Parameter(torch.empty(2, 3, 32, 16, dtype=torch.float16, device="cuda"))
    before = live(recorder)
    out = function(x)
    size = live(recorder) - before
    del out
    return size


def test_operators_are_those_of_cuda(recorder):
    """Attention with dropout keeps no scores, and dropout one byte an element."""
    elements = 2 * 3 * 32 * 16
    statistics = 2 * 3 * 32 * 4
    mask = torch.ones(2, 1, 1, 32, dtype=torch.bool, device="cuda")
    assert kept(recorder, lambda q: F.dropout(q, 0.1)) == elements * (2 + 1)
    attention = kept(recorder, lambda q: F.scaled_dot_product_attention(q, q, q))
    assert elements * 2 + statistics <= attention <= elements * 2 + statistics + 64  # out, log-sum-exp, seeds
    masked = kept(recorder, lambda q: F.scaled_dot_product_attention(q, q, q, mask, dropout_p=0.1))
    # The mask as numbers is kept for all heads once.
    assert masked <= elements * 2 + statistics + 2 * 32 * 2 + 64


@pytest.mark.parametrize("width, copies", [(40, 0), (36, 1), (33, 1)])
def test_rows_of_a_mask_begin_at_multiples_of_8_elements(recorder, width, copies):
    q = torch.empty(2, 3, width, 16, dtype=torch.float16, requires_grad=True, device="cuda")
    mask = torch.zeros(2, 1, 1, width, dtype=torch.float16, device="cuda")
    before = len(recorder.log)
    out = F.scaled_dot_product_attention(q, q, q, mask)
    assert [size for _, size, _ in recorder.log[before:]].count(2 * 40 * 2) == copies
    del out


def test_attention_by_products_is_in_fp32_under_autocast(recorder):
    """PyTorch casts it as a whole and leaves autocast, and then computes products and softmax in fp32."""
    q = torch.empty(2, 3, 32, 12, requires_grad=True, device="cuda")
    mask = torch.zeros(2, 1, 32, 32, device="cuda")  # with which 12 features fit no fused kernel
    before = len(recorder.log)
    with torch.autocast("cuda", torch.float16):
        out = F.scaled_dot_product_attention(q, q, q, mask)
    sizes = [size for _, size, _ in recorder.log[before:]]
    assert out.dtype == torch.float16 and sizes.count(2 * 3 * 32 * 32 * 4) >= 2  # the scores, and their softmax
    assert sizes.count(2 * 3 * 32 * 32 * 2) == 1  # of which the operator returns a copy


def test_what_another_stream_may_still_read_is_not_free_yet(recorder):
    other = torch.cuda.Stream()
    x = torch.empty(1000, device="cuda")
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        y = x + 1
    x.record_stream(other)
    del x
    torch.empty(1, device="cuda")
    assert live(recorder) == 8004 - 4  # what ended waits for the stream
    assert [event.block_id for event in recorder.events() if event.requests_free] == [0]
    torch.cuda.current_stream().wait_stream(other)
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert live(recorder) == 4000
    assert {event.stream for event in recorder.events() if event.bytes == 4000} == {0, other.stream_id}
    del y


def test_waits_of_streams_pass_on_to_those_that_wait_for_them(recorder):
    first, second, third = (torch.cuda.Stream() for _ in range(3))
    first.work.launch()
    event = first.record_event()
    second.wait_stream(first)
    third.wait_stream(second)
    assert not event.query()
    third.synchronize()
    assert event.query()


def test_gradients_add_up_in_place(recorder):
    x = torch.empty(1000, device="cuda", requires_grad=True)
    recorder.phase = "backward"
    y = x * 2
    before = len(recorder.log)
    (y.sin() + y.cos() + y.exp()).sum().backward()
    added = [
        block
        for block, size, _ in recorder.log[before:]
        if size == 4000 and "add.Tensor" in recorder.allocations[block].op
    ]
    assert len(added) <= 2  # the forward's own two sums: autograd's are in place


@pytest.mark.parametrize(
    ("keeps", "taken"),
    [
        (True, [("forward", 2 * MIB), ("backward", 2 * MIB)]),
        (False, [*[("forward", 2 * MIB)] * 2, ("forward", MIB), *[("backward", 2 * MIB)] * 6]),
    ],
)
def test_cublas_takes_a_workspace_after_a_product(monkeypatch, keeps, taken):
    """Before PyTorch 2.15 for good, once in each thread; a product with a bias takes 1 MiB from then on."""
    monkeypatch.setattr(workspaces, "KEEPS_WORKSPACES", keeps)
    recorder = Recorder(gpu=A100, workspace_bytes=2 * MIB)
    with fake_cuda(recorder, A100):
        recorder.phase = "forward"
        x = torch.ones(4, 4, device="cuda", requires_grad=True)
        y = F.linear((x @ x) @ x, x, x[0])
        recorder.phase = "backward"
        y.sum().backward()
        events = recorder.events()
    after = [(last.op, event) for last, event in pairwise(events) if event.op == "cuBLAS" and event.bytes > 0]
    assert [(event.phase, event.bytes) for _, event in after] == taken
    assert {op for op, _ in after} <= {"aten.mm.default", "aten.addmm.default"}, "the result is allocated first"
    assert sum(event.bytes for event in events if event.op == "cuBLAS") == (4 * MIB if keeps else 0)


def test_without_a_compiler_a_prediction_is_refused_in_one_line(monkeypatch, tmp_path):
    guard.cache_clear()
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        guard()
