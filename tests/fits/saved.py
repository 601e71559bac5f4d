"""A program that saves and loads, also in threads, with what it has to find. Weights are [1024, 1024] fp32, 4 MiB."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

MIB, HOST, DEVICE = 1 << 20, torch.device("cpu"), torch.device("cuda", 0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
        self.second.weight = self.first.weight


def taken() -> int:
    """Bytes that were taken on the device since the last call."""
    before, taken.before = taken.before, torch.cuda.memory_allocated()
    return taken.before - before


model, taken.before = Tied().to(DEVICE), 0
optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
assert taken() == 4 * MIB + 2 * 4096

torch.save({"model": model.state_dict(), "epoch": 3}, "state.pt")
assert os.stat("state.pt").st_size > 4 * MIB > 20 * 512 * os.stat("state.pt").st_blocks
for place, device in (
    (None, DEVICE),
    ("cpu", HOST),
    (DEVICE, DEVICE),
    ({"cuda:0": "cpu"}, HOST),
    (lambda storage, location: storage, HOST),
    (lambda storage, location: storage.cuda(0), DEVICE),
):
    loaded = torch.load("state.pt", map_location=place, weights_only=True)
    weights = loaded["model"]
    assert weights["first.weight"].device == device and loaded["epoch"] == 3
    assert taken() == (4 * MIB + 2 * 4096 if device == DEVICE else 0)  # the tied weight once
    model.load_state_dict(weights)
    del loaded, weights
    taken()
    assert taken.before == 4 * MIB + 2 * 4096

random = {"host": torch.get_rng_state(), "all": torch.cuda.get_rng_state_all()}
torch.save(random | {"GPU": torch.cuda.random.get_rng_state()}, "random.pt")
for place in ("cpu", DEVICE):
    random = torch.load("random.pt", map_location=place)
    torch.set_rng_state(random["host"].cpu())
    torch.random.set_rng_state(random["host"].cpu())
    torch.cuda.set_rng_state_all(random["all"])
    torch.cuda.random.set_rng_state(random["GPU"])
del random
taken()

torch.save(obj=model, f="model.pt")
other = torch.load(f="model.pt", weights_only=False)
assert other.first.weight is other.second.weight and taken() == 4 * MIB + 2 * 4096
memory = io.BytesIO()
torch.save(model.state_dict(), memory, _use_new_zipfile_serialization=False)
memory.seek(0)
assert torch.load(memory)["first.weight"].shape == (1024, 1024) and taken() == 0
with open("again.pt", "wb") as file:
    torch.save(model.state_dict(), file)
assert torch.load("again.pt", map_location="cpu")["first.weight"].shape == (1024, 1024) and taken() == 0

save_model(model, "model.safetensors", metadata={"format": "pt"})
load_model(other, "model.safetensors")
kinds = {str(kind): torch.ones(3, dtype=kind) for kind in (torch.bfloat16, torch.int64, torch.uint8, torch.bool)}
save_file(kinds | {"whole": torch.zeros(1 << 20, device=DEVICE)}, "kinds.safetensors")
assert {name: str(each.dtype) for name, each in load_file("kinds.safetensors").items() if name in kinds} == {
    name: name for name in kinds
}
taken()
assert load_file("kinds.safetensors", device="cuda")["whole"].device == DEVICE and taken() == 0

with ThreadPoolExecutor(2) as pool:
    parts = list(pool.map(lambda size: torch.zeros(size, MIB // 4, device=DEVICE), (1, 2, 3)))
assert taken() == 6 * MIB
thread = Thread(target=lambda: parts.append(parts[0] + 1))
thread.start()
thread.join()
assert taken() == MIB
for _ in range(2):
    model.second(model.first(torch.ones(8, 1024, device=DEVICE))).sum().backward()
    optimizer.step()
