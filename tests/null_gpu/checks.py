"""Prints as JSON what a process sees of its null GPU."""

import ctypes
import json

import torch

LIBRARY = ctypes.CDLL("libcudart.so.13")


def count(name: str) -> int:
    return ctypes.c_long.in_dll(LIBRARY, f"nullgpu_{name}").value


def addresses_beside_a_copy() -> dict[str, bool]:
    """Whether a block that another stream may still read is given again: at once, and after a wait for it."""
    side = torch.cuda.Stream()
    used = torch.ones(1 << 20, device="cuda")
    address = used.data_ptr()
    used.record_stream(side)
    with torch.cuda.stream(side):
        used.mul_(2)
    del used
    before = torch.empty(1 << 20, device="cuda").data_ptr() == address
    side.synchronize()
    return {"before": before, "after": torch.empty(1 << 20, device="cuda").data_ptr() == address}


def captured() -> list[object]:
    """Whether streams are captured: before, inside, one that waits there, another, after; then the pool's segments."""
    graph, joins, other, states = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream(), []

    def note(stream: torch.cuda.Stream | None = None) -> None:
        with torch.cuda.stream(stream):
            states.append(torch.cuda.is_current_stream_capturing())

    note()
    x, launched = torch.ones(3 << 20, device="cuda"), count("launches")
    with torch.cuda.graph(graph):
        note()
        joins.wait_stream(torch.cuda.current_stream())
        y = x + 1
        note(joins)
        note(other)
        torch.cuda.current_stream().wait_stream(joins)
    note()
    note(joins)
    inside = count("launches") - launched
    graph.replay()
    pools = [part["total_size"] for part in torch.cuda.memory_snapshot() if part["segment_pool_id"] == graph.pool()]
    return [*states, pools == [y.nbytes], count("launches") - launched - inside]


def events() -> list[bool]:
    """Whether an event is done: at once, after a stream that waits for it was waited for, after 1,024 more launches."""
    stream, waits, done = torch.cuda.Stream(), torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        x = torch.zeros(4, device="cuda")
        event = stream.record_event()
    done.append(event.query())
    waits.wait_event(event)
    with torch.cuda.stream(waits):
        x.add_(1)
    waits.synchronize()
    done.append(event.query())
    with torch.cuda.stream(stream):
        x.add_(1)
        event = stream.record_event()
        done.append(event.query())
        for _ in range(1024):
            x.add_(1)
    return [*done, event.query()]


def values() -> dict[str, object]:
    """What arrives on the host."""
    numbers = torch.tensor([3, 0, 5], device="cuda")
    noise = torch.full((3,), torch.inf, device="cuda")
    return {
        "copied": torch.arange(3.0).cuda().half().tolist(),
        "filled": torch.full((2,), 7, device="cuda").tolist(),
        "compared": (numbers > 2).tolist(),
        "all": [(numbers > 2).all().item(), (numbers >= 0).all().item(), (numbers < 0).any().item()],
        "sum": numbers.sum().item(),
        "most": (numbers - 7).max().item(),
        "joined": torch.cat([numbers, numbers[:2]]).tolist(),
        "masked": numbers.masked_fill(numbers > 3, -100).tolist(),
        "strided": strided(),
        "selected": [len(numbers[numbers > 0]), len((torch.arange(40_000) % 4).cuda().nonzero())],
        "norm": torch.linalg.vector_norm(noise).item(),
        "finite": noise.isfinite().all().item(),
        "foreach": torch.stack(torch._foreach_norm([noise, noise])).tolist(),
    }


def strided() -> list[list]:
    """Of operands that do not lie in one piece."""
    table = torch.arange(1, 12, 2, device="cuda").view(2, 3)
    mask = torch.zeros(2, 3, dtype=torch.bool, device="cuda")
    mask[:, 1] = True
    results = table.t() == 5, table[:, 1:] + table[:, :2], table[:, ::2] - 1, ~mask[:, 1:], table.t().contiguous()
    joined = torch.cat([table, table[:, :1]], 1), torch.cat([table.t(), table.t()], 1), torch.cat([table.t()[:1]] * 2)
    reduced = table.sum(1), table.sum(0), table.amax(1), (table > 3).any(0)
    return [item.tolist() for item in (*results, *joined, (table > 3).cumsum(-1), *reduced)]


def out_of_memory() -> bool:
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.empty(total + 1, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError:
        return True
    return False


def main() -> None:
    properties = torch.cuda.get_device_properties(0)
    launches = count("launches")
    torch.zeros(5, device="cuda").add_(1)
    by_name = {
        "launches": count("launches") - launches,
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "devices": torch.cuda.device_count(),
        "values": values(),
        "out of memory": out_of_memory(),
        "events": events(),
        "captured": captured(),
        "reused": addresses_beside_a_copy(),
    }
    print(json.dumps(by_name))


if __name__ == "__main__":
    main()
