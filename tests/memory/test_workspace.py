"""What libraries take inside their operators, asked of them once."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_cmli.memory import workspace
from ds_cmli.memory.cpu_events import sizes as cpu_sizes
from ds_cmli.memory.tracker import MemoryTracker
from ds_cmli.memory_model.blocks import Event

calls: list[tuple[int, ...]] = []


@torch.library.custom_op("ds_cmli_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """Holds 1,000 bytes of its own beside its result, and for a moment 24 more."""
    calls.append(tuple(x.shape))
    out = torch.empty_like(x)
    held = torch.empty(1000, dtype=torch.uint8)
    torch.empty(24, dtype=torch.uint8)
    del held
    return out


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


OP = torch.ops.ds_cmli_test.doubled.default


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    monkeypatch.setattr(workspace, "LIBRARY_OPS", workspace.LIBRARY_OPS | {OP})
    calls.clear()
    workspace._asked.cache_clear()
    yield calls
    workspace._asked.cache_clear()


def test_what_an_operator_holds_beside_its_result(asked):
    assert workspace.workspace_bytes(OP, (torch.ones(5),), {}) == 1024


def test_an_operator_of_the_same_sizes_is_asked_once(asked):
    with FakeTensorMode():
        for shape in ((3, 4), (3, 4), (4, 3)):
            assert workspace.workspace_bytes(OP, (torch.ones(shape),), None) == 1024
    # Each is called twice: what a library keeps from its first call on is no workspace.
    assert asked == [(3, 4), (3, 4), (4, 3), (4, 3)]


def test_operands_of_several_types_are_cast_to_a_common_one():
    wide, narrow, aten = torch.ones(100), torch.ones(100, dtype=torch.bfloat16), torch.ops.aten
    for function in (aten.add.Tensor, aten.add_.Tensor):
        assert workspace.workspace_bytes(function, (wide, narrow), {}) == narrow.numel() * 4
        assert workspace.workspace_bytes(function, (wide, wide), {}) == 0
    assert workspace.workspace_bytes(aten.copy_.default, (wide, narrow), {}) == 0


def test_layer_norm_adds_up_its_gradients_in_a_row_for_each_thread():
    x, one, weight = torch.ones(64, 32), torch.ones(64, 1), torch.ones(32)
    arguments = (x, x, [32], one, one, weight, weight, [True, True, True])
    held = workspace.workspace_bytes(torch.ops.aten.native_layer_norm_backward.default, arguments, {})
    assert held == 2 * torch.get_num_threads() * weight.nbytes


@pytest.mark.parametrize("x", [torch.ones(5, 1).expand(5, 3), torch.ones(0, 3), torch.ones(2, 6)[:, ::2].t()])
def test_any_strides(asked, x):
    assert workspace.workspace_bytes(OP, (x,), {}) == 1024
    assert asked == [x.shape] * 2


def test_operators_of_no_library_are_not_asked():
    assert workspace.workspace_bytes(torch.ops.aten.sin.default, (torch.ones(5),), {}) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_takes_what_the_allocator_reports(threads):
    """The weight gradient of a layer, [384, 1024] x [1024, 1536] in bf16, for which oneDNN takes memory a thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.zeros(1024, 384, dtype=torch.bfloat16).t(), torch.zeros(1024, 1536, dtype=torch.bfloat16)
        torch.mm(a, b)
        sizes = cpu_sizes(lambda: torch.mm(a, b))
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.empty(1024, 384, dtype=torch.bfloat16).t(), torch.empty(1024, 1536, dtype=torch.bfloat16)
        result = workspace.workspace_bytes(torch.ops.aten.mm.default, fake, {})
    finally:
        torch.set_num_threads(before)
    assert result == sum(size for size in sizes if size > 0) - 384 * 1536 * 2


def test_the_tracker_counts_it_while_the_operator_runs(asked):
    with FakeTensorMode(), MemoryTracker(workspaces=True) as tracker:
        x = torch.ones(5)
        y = OP(x)
        del x, y
    assert [event.bytes for event in tracker.events()] == [20, 1024, 20, -1024, -20, -20]
    assert tracker.events()[1] == Event(1, 1024, "temporaries", "init", f"{OP}, inside")


def test_without_being_asked_for_the_tracker_runs_nothing(asked):
    with FakeTensorMode(), MemoryTracker() as tracker:
        OP(torch.ones(5))
    assert [abs(event.bytes) for event in tracker.events()] == [20, 20, 20, 20] and not asked
