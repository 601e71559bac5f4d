"""The names of what holds memory, by the stacks that PyTorch records."""

from typing import Any

import pytest

from ds_cmli.allocator.state import State
from profiling.memory.holders import holders

UNWIND = ("??", "torch::unwind::unwind()")
EMPTY = ("RegisterCUDA.cpp", "at::_ops::empty_memory_format::redispatch(c10::DispatchKeySet, ...)")
BMM = ("??", "at::_ops::bmm::call(at::Tensor const&, at::Tensor const&)")


@pytest.mark.parametrize(
    "stack, name",
    [
        ([UNWIND, ("/home/me/run/train.py", "step"), ("/home/me/run/main.py", "main")], "run/train.py:7 step"),
        ([("/x/site-packages/torch/nn/linear.py", "forward"), ("/home/me/model.py", "f")], "me/model.py:7 f"),
        # Threads of the backward pass run no Python.
        (
            [UNWIND, EMPTY, BMM, ("??", "torch::autograd::generated::BmmBackward0::apply(std::vector<at::Tensor>&&)")],
            "backward pass: BmmBackward0",
        ),
        ([UNWIND, ("??", "torch::autograd::AccumulateGrad::apply(...)")], "backward pass: AccumulateGrad"),
        ([UNWIND, EMPTY, BMM], "aten::bmm"),
        ([("ncclUtils.cpp", "start()")], "ncclUtils.cpp:7 start()"),
        ([], "blocks of 1,024 B without a recorded stack"),
    ],
)
def test_a_block_is_named_by_its_stack(stack, name):
    frames = [{"filename": filename, "name": function, "line": 7} for filename, function in stack]
    event: dict[str, Any] = {"action": "alloc", "addr": 512, "size": 1024, "stream": 0, "frames": frames}
    content = {"segments": [], "device_traces": [[event]]}
    assert [(holder.name, holder.bytes) for holder in holders(content, 0, State())] == [(name, 1024)]
