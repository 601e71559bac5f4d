"""`ds-cmli-memory fits`: programs run unchanged on tensors without data, and their memory is told."""

import json
import pickle
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from ds_cmli.common import cli
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.fits import guard, null_gpu
from ds_cmli.fits.answer import KEEPS_WORKSPACES, Answer, Room
from ds_cmli.fits.command import command
from ds_cmli.fits.report import ProgramReport, rooms
from ds_cmli.fits.results import largest_results
from ds_cmli.fits.world import World
from ds_cmli.memory.predict import predict
from tests.conftest import ROOT, clean_environment
from tests.processes import Server, finished

LOOP = str(Path(__file__).parent / "loop.py")
OPERATORS = str(Path(__file__).parent / "operators.py")
COMMAND = str(Path(sys.executable).with_name("ds-cmli-memory"))
ENVIRONMENT = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("DS_ACCELERATOR", None)  # the tests' own; a program is on a GPU here
SERVER = Server("tests.fits.preload", ENVIRONMENT)


PENALTY = """
import torch
from torch import nn
print("node", (torch.ones(1, device="cuda", requires_grad=True) * 2).grad_fn._sequence_nr())
generator = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1024)).cuda()
critic = nn.Sequential(nn.Linear(1024, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2))
critic = critic.append(nn.Linear(256, 1)).cuda()
critic[0].weight.register_hook(lambda gradient: gradient * torch.tensor(0.5, device="cuda"))
steps = [torch.optim.Adam(part.parameters()) for part in (generator, critic)]
for step in range(6):
    real = torch.randn(128, 1024, device="cuda")
    made = generator(torch.randn(128, 64, device="cuda"))
    between = torch.lerp(real, made.detach(), torch.rand(128, 1, device="cuda")).requires_grad_()
    [slope] = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    (critic(made.detach()).mean() - critic(real).mean() + 10 * penalty).backward()
    steps[1].step()
    steps[1].zero_grad()
    (-critic(made).mean()).backward()
    steps[0].step()
    steps[0].zero_grad()
"""


def fits(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, forked with torch imported after the library that it needs first."""
    with tempfile.TemporaryDirectory() as folder:
        return finished([COMMAND, "fits", *arguments], ENVIRONMENT, cwd, Path(folder), 300, SERVER)


def fresh(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run the command as a user does, in a process in which torch has not been imported."""
    command = [COMMAND, "fits", *arguments]
    return subprocess.run(command, env=ENVIRONMENT | env, cwd=cwd, capture_output=True, text=True, timeout=300)


def script(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(text)
    return str(path)


def test_a_linear_layer_by_hand(tmp_path):
    """[1024, 1024] fp32 is 4 MiB: the weight, its gradient and SGD's momentum."""
    program = script(
        tmp_path,
        "import torch\n"
        "layer = torch.nn.Linear(1024, 1024, bias=False).cuda()\n"
        "optimizer = torch.optim.SGD(layer.parameters(), 1e-3, momentum=0.9, foreach=False)\n"
        "for step in range(9):\n"
        "    layer(torch.randn(1024, 1024, device='cuda')).backward(torch.ones(1024, 1024, device='cuda'))\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad(set_to_none=False)\n",
    )
    options = ("--gpu", "A100 80GB", "--json", "out.json", "--snapshot", "out.pickle", "--plot", "out.svg")
    done = fresh(*options, "--", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "out.json").read_text())
    size = 4 << 20
    sizes = answer["categories"]
    assert sizes["parameters"] == sizes["gradients"] == sizes["optimizer states"] == size
    # In the second backward pass: its gradient beside that of the first, cuBLAS' two workspaces of 8,519,680 B, and the
    # input, the output and the output's gradient. From PyTorch 2.15 on there is one workspace, during a product alone.
    kept, passing = (2 * 8_519_680, 0) if KEEPS_WORKSPACES else (0, 8_519_680)
    drawn = (tmp_path / "out.svg").read_text()
    for word in ("program.py on A100 80GB", "optimizer states", "reserved", " backward", " optimizer"):
        assert word in drawn
    assert answer["phase"] == "backward" and sizes["data"] == sizes["other"] == 0
    assert sizes["activations"] == 3 * size and sizes["temporaries"] == size + kept + passing
    assert answer["totals"]["requested"] == sum(sizes.values())
    # The output's gradient is made before backward. 2% of what is reserved should stay free.
    assert answer["phases"] == {
        "init": 2 * size,
        "forward": (5 if passing else 6) * size + kept + passing,
        "backward": 7 * size + kept + passing,
        "optimizer": 3 * size + kept,
        "afterwards": 4 * size + kept,  # the next step's input
    }
    reserved, margin = (62_914_560, 1_258_291) if kept else (41_943_040, 838_860)
    assert answer["totals"]["reserved"] == reserved and answer["margin"] == margin
    assert re.search(rf"context +471,859,200  assumed\n  margin +{margin:,}  not in device", done.stdout)
    assert done.stdout.startswith("2 steps of program.py fit on A100 80GB (84.98 GB): they take ")
    largest = "0.02 GB of temporaries, by cuBLAS" if kept else "0.01 GB of activations, by program.py:5"
    assert done.stdout.splitlines()[0].endswith(largest)
    assert "program.py:5" in done.stdout
    assert pickle.loads((tmp_path / "out.pickle").read_bytes())["segments"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.pickle", "out.svg", "program.py"]


@pytest.mark.parametrize("limit, said", [(102_100_000, ""), (101_900_000, ", less than the margin of 0.00 GB")])
def test_less_than_the_margin_free_is_told(limit, said):
    sizes = {"requested": 90_000_000, "allocated": 95_000_000, "reserved": 100_000_000, "device": 100_000_000}
    answer = Answer(True, 2, sizes, {}, "backward", {}, [(1, "other", "")], (1, "mm", ""))
    report = ProgramReport(2, [Room("T4 16GB", limit)], [answer], [], World(None, 0), [], False)
    retried = ", only as PyTorch's allocator returns its cache (2 retries)"
    assert f" are free{retried}{said}; the largest" in report.sentence("program.py")
    report.compiled, report.rooms = True, [Room("T4 16GB", 100_000_000 + report.margin + 1)]
    assert ", less than the margin of 0.16 GB" in report.sentence("program.py")


def test_the_graph_of_a_gradient_is_walked_as_in_the_thread_of_backward(tmp_path):
    """A gradient penalty: PyTorch's allocator counts as much on a null GPU (45,553,692 B in the program's thread).

    Where workspaces last, which is before PyTorch 2.15.
    """
    done = fits("--gpu", "A100 80GB", "--json", "out.json", "--", script(tmp_path, PENALTY), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    requested = json.loads((tmp_path / "out.json").read_text())["totals"]["requested"]
    assert requested == 45_685_792 or not KEEPS_WORKSPACES
    assert done.stdout.startswith("node 0\n")  # each thread numbers the nodes of its graphs from 0


@pytest.mark.parametrize("switches", [("fp16", "values"), ("bf16", "fused", "checkpoint")], ids=str)
def test_a_loop_runs_as_it_is(switches, tmp_path):
    done = fits("--limit", "1.2GB", "--", LOOP, *switches, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("loss 2.00" in done.stdout) == ("values" in switches)
    assert ("as large as they can be" in done.stdout) == ("values" in switches)
    assert "steps of loop.py fit on 1.20 GB" in done.stdout
    small = fits("--limit", "400MB", "--", LOOP, *switches, cwd=tmp_path)
    assert "do not fit on 0.40 GB" in small.stdout and small.returncode == 3


ON_A_STREAM = """
import torch

side, seen = torch.cuda.Stream(), []

class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        seen.append(torch.cuda.current_stream().stream_id)
        return gradient.clone()

weight = torch.nn.Parameter(torch.zeros(1024, 1024, device="cuda"))
optimizer = torch.optim.SGD([weight], 1e-3)
for step in range(9):
    with torch.cuda.stream(side):
        moved = Noted.apply(weight)
    torch.cuda.current_stream().wait_stream(side)
    Noted.apply(moved).sum().backward()
    assert seen[-2:] == [0, side.stream_id], seen
    assert torch.cuda.current_stream().stream_id == 0
    optimizer.step()
    optimizer.zero_grad()
"""


def test_backward_runs_on_the_streams_of_forward(tmp_path):
    """The gradient that is made on a stream of its own, [1024, 1024] fp32, lies in a segment of that stream."""
    options = ("--gpu", "A100 80GB", "--snapshot", "out.pickle")
    done = fits(*options, "--", script(tmp_path, ON_A_STREAM), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    taken = [content["stream"] for content in pickle.loads((tmp_path / "out.pickle").read_bytes())["segments"]]
    assert len(set(taken)) == 2


OWN = """
import copy, os, torch
from torch.utils.data import dataloader

class Named(torch.Tensor):
    pass

class Momentum:
    def __init__(self, weight):
        self.weight, self.held = weight, None
    def step(self):
        with torch.no_grad():
            self.held = self.weight.grad.clone() if self.held is None else self.held.mul_(0.9).add_(self.weight.grad)
            self.weight -= 0.1 * self.held
            self.weight.grad = None

layer = torch.nn.Linear(1024, 1024, bias=False)
layer.weight.data = layer.weight.data.cuda()
assert layer.weight.is_cuda and layer.weight.grad is None
parts = [torch.ones(2, 512, device="cuda") for _ in range(2)]
assert len({part.data_ptr() for part in parts}) == 2 and parts[0][1].data_ptr() - parts[0].data_ptr() == 2048
assert parts[0].untyped_storage().data_ptr() == parts[0].data_ptr() and not parts[0].data_ptr() % 512
teacher = copy.deepcopy(layer)
assert teacher.weight.t().untyped_storage()._cdata == teacher.weight.untyped_storage()._cdata
del teacher
optimizer = Momentum(layer.weight)
for name in ("log.txt", "gone.txt"):
    open(name, "w").close()
os.remove("gone.txt")
data = torch.utils.data.DataLoader([torch.ones(1024).as_subclass(Named) for _ in range(99)], num_workers=2)
assert isinstance(iter(data), dataloader._MultiProcessingDataLoaderIter)
for number, x in enumerate(dataloader._MultiProcessingDataLoaderIter(data)):
    x = x.as_subclass(Named).cuda()
    x.as_subclass(Named).reshape(1, 1024)
    layer(x).sum().backward()
    optimizer.step()
print(f"steps: {number}")
"""


def test_an_optimizer_of_its_own_and_tensors_of_a_class(tmp_path):
    """As fastai has them; [1024, 1024] fp32 is 4 MiB: the weight, its gradient, the optimizer's and 0.1 times it."""
    done = fits("--gpu", "A100 80GB", "--json", "out.json", "--", script(tmp_path, OWN), cwd=tmp_path)
    assert done.returncode == 0 and "steps:" not in done.stdout, done.stderr
    assert "16 steps of program.py fit" in done.stdout
    assert "files that the program wrote: log.txt\n" in done.stdout
    assert "no optimizer of torch.optim did a step: each backward pass is taken for one" in done.stdout
    requested = json.loads((tmp_path / "out.json").read_text())["totals"]["requested"]
    size, workspace = 4 << 20, 8_519_680
    most = 4 * size + 2 * workspace if KEEPS_WORKSPACES else 3 * size + workspace  # in the step, or in backward
    assert 0 <= requested - most < 20_000


def test_an_optimizer_of_its_own_beside_one_of_torch_waits_for_that(tmp_path):
    """Twenty backward passes before the first step are no end."""
    text = (
        "import torch\n"
        "layer = torch.nn.Linear(8, 8).cuda()\n"
        "optimizer = torch.optim.SGD(layer.parameters(), 1e-3)\n"
        "for number in range(60):\n"
        "    layer(torch.ones(8, 8, device='cuda')).sum().backward()\n"
        "    if number % 20 == 19:\n"
        "        optimizer.step()\n"
    )
    done = fits("--gpu", "A100 80GB", "--", script(tmp_path, text), cwd=tmp_path)
    assert done.stdout.startswith("2 steps of program.py fit") and "taken for one" not in done.stdout


ADVERSARIAL = """
import sys, torch
maker, critic = torch.nn.Linear(1024, 1024).cuda(), torch.nn.Linear(1024, 1).cuda()
both = [torch.optim.SGD(each.parameters(), 1e-3, 0.9) for each in (maker, critic)]
for number in range(1, int(sys.argv[2]) if len(sys.argv) > 2 else 10_000):
    for each, optimizer in zip((maker, critic), both):
        if each is critic or number % int(sys.argv[1]) == 0:
            critic(maker(torch.ones(1, 1024, device="cuda"))).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    "arguments, steps, code", [(["8"], 2, 0), (["12"], 1, 0), (["99"], 22, 3), (["99", "5"], 4, 0)]
)
def test_a_second_optimizer_is_waited_for(arguments, steps, code, tmp_path):
    """In 22 steps of the other; one that a program never steps until its own end takes nothing."""
    done = fits("--limit", "2GB", "--json", "out.json", "--", script(tmp_path, ADVERSARIAL), *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert re.match(rf"{steps} steps? of program.py fit on", done.stdout)
    said = ", but SGD did no step, and what that takes is not counted: give more --steps; the largest"
    assert (said in done.stdout) == (code == 3)
    assert ("not seen until then: an evaluation, saving, inputs" in done.stdout) == (len(arguments) == 1)
    states = json.loads((tmp_path / "out.json").read_text())["categories"]["optimizer states"]
    assert (states > 4 * 1024 * 1024) == (arguments[0] != "99")


EVALUATED = """
import sys, torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
for step in range(9):
    model(torch.ones(8, 64, device="cuda")).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2:
        with torch.no_grad():
            model.eval()(torch.ones(2**16, 64, device="cuda"))
        torch.save(model.state_dict(), "model.pt")
        model.train()
        exec("".join(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "then, line",
    [
        ("pass", "not seen until then: inputs of another size, steps of another kind; give more --steps"),
        ("raise KeyError('mine')", "not counted: what follows the steps, which ended in KeyError: 'mine'"),
        ("sys.exit(5)", "not counted: what follows the steps, which ended in SystemExit: 5"),
        (
            "torch.multiprocessing.spawn(print, nprocs=2)",
            "not counted: what follows the steps, which ended in NotFollowed: ",
        ),
    ],
)
def test_an_evaluation_and_saving_after_the_steps_count(then, line, tmp_path):
    """[65536, 64] fp32 takes 16 MiB, as the input and as the output."""
    done = fits("--limit", "2GB", "--json", "out.json", "--", script(tmp_path, EVALUATED), then, cwd=tmp_path)
    assert done.returncode == 0 and line in done.stdout and "Traceback" not in done.stderr, done.stderr
    phases = json.loads((tmp_path / "out.json").read_text())["phases"]
    assert 32 << 20 < phases["afterwards"] < 50 << 20 and phases["forward"] < 20 << 20


def test_gradients_move_with_their_module(tmp_path):
    """A weight of 4 MiB, its gradient and its momentum, which a cast in between does not lose."""
    text = (
        "import torch\n"
        "layer = torch.nn.Linear(1024, 1024, bias=False).cuda()\n"
        "optimizer = torch.optim.SGD(layer.parameters(), 1e-3, 0.9, foreach=False)\n"
        "for step in range(3):\n"
        "    layer(torch.ones(1, 1024, device='cuda')).sum().backward()\n"
        "    gradient = layer.weight.grad\n"
        "    assert layer.half().weight.grad.dtype == torch.float16 and layer.float().weight.grad is gradient\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
    )
    done = fits("--limit", "2GB", "--json", "out.json", "--", script(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = json.loads((tmp_path / "out.json").read_text())["categories"]
    assert sizes["parameters"] == sizes["gradients"] == sizes["optimizer states"] == 4 << 20


def test_an_optimizer_that_has_one_group_at_a_time(tmp_path):
    """As ZeRO-3 steps its groups: [1024, 1024] fp32 is 4 MiB, and each of two weights has a momentum."""
    program = script(
        tmp_path,
        "import torch\n"
        "weights = [torch.nn.Parameter(torch.ones(1024, 1024, device='cuda')) for _ in range(2)]\n"
        "optimizer = torch.optim.SGD([{'params': [weight]} for weight in weights], 1e-3, 0.9, foreach=False)\n"
        "for group in optimizer.param_groups:\n"
        "    group['params'] = []\n"
        "for step in range(9):\n"
        "    (weights[0] * weights[1]).sum().backward()\n"
        "    for group, weight in zip(optimizer.param_groups[::-1], weights):\n"
        "        group['params'] = [weight]\n"
        "        optimizer.step()\n"
        "        group['params'], weight.grad = [], None\n",
    )
    done = fits("--limit", "1.2GB", "--json", "out.json", "--", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "out.json").read_text())
    assert answer["steps"] == 2 and answer["categories"]["optimizer states"] == 2 * (4 << 20)
    assert "has done no step" not in done.stdout


def test_what_a_program_asks_of_a_gpu(tmp_path):
    done = fits("--limit", "1.2GB", "--", str(Path(__file__).parent / "asked.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a kernel of Triton did not run: 1 times" in done.stdout
    assert "flex_attention is taken as compiled" in done.stdout
    assert "as large as on a CPU" in done.stdout and "aten._sample_dirichlet.default (1 times)" in done.stdout
    assert sum(int(count) for count in re.findall(r"asked.py:\d+ \((\d+) times\)", done.stdout)) < 99


def test_what_operators_hold_at_most(tmp_path):
    """A tensor has 4 MiB. A gradient of rows is beside the function's result and that result's gradient."""
    done = fits("--gpu", "A100 80GB", "--", OPERATORS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout.splitlines()[0])
    for name in ("silu", "mish", "index_select", "index"):
        assert content[name][0] == 4 * MIB and content[name][1] < 12.01 * MIB  # nothing beside its gradient
    assert content["softmax"] == [4 * MIB, 16 * MIB]  # the product of gradient and result
    # Half the rows of the mask, which a range tells, and backward's zeros, into which they are added.
    assert content["index by a mask"][0] < 2.01 * MIB and content["index by a mask"][1] < 8.01 * MIB
    # Gradients that are views are added into a third one.
    assert content["sum of two linear"][1] > 32 * MIB
    # These keep what they reduce, of which the Huber loss holds a copy.
    assert content["mse_loss"][0] > 8 * MIB and content["huber_loss"][0] > 4 * MIB
    # A copy of the input, and in backward of the same.
    for name, few in (("softmax", 0), ("RMS norm", 4096), ("layer norm", 8192)):
        rows, columns = content[name], content[f"{name} by columns"]
        assert columns[0] - rows[0] == 4 * MIB and columns[1] <= 16 * MIB + 2 * few
        assert rows[0] - 4 * MIB <= 2 * few
    assert content["linear by columns"][0] == 8 * MIB  # its product and the copied input


def test_the_largest_results():
    boxes, scores = torch.zeros(7, 4), torch.zeros(7)
    assert largest_results("torchvision::nms", boxes, scores, 0.5).shape == (7,)
    assert largest_results("aten::masked_select", boxes, torch.zeros(3, 1, 1, dtype=torch.bool)).shape == (84,)
    assert [item.shape for item in largest_results("aten::_unique2", boxes)] == [(28,), (7, 4), (28,)]
    assert [item.shape for item in largest_results("aten::unique_dim", boxes, 1)] == [(7, 4), (4,), (4,)]
    assert [len(largest_results("aten::bincount", scores, None, least)) for least in (0, 3)] == [7, 3]
    assert largest_results("aten::repeat_interleave", scores) is None


RANKS = str(Path(__file__).parent / "ranks.py")
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "views", "fsdp", "zero2"])
def test_one_rank_of_a_world_that_is_not_there(kind, tmp_path):
    """A weight of 4 MiB. DDP's two buckets, of the first step and rebuilt, are there in the second backward pass. FSDP
    has a quarter of it, of its gradient and of its momentum; ZeRO-2 has it, and a quarter of Adam's three copies."""
    world = ("--world-size", "4", "--rank", "3", "--json", "out.json", "--gpu", "A100 80GB")
    done = fits(*world, "--", RANKS, kind, "alone", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 steps of ranks.py as rank 3 of 4 fit on" in done.stdout
    sizes = json.loads((tmp_path / "out.json").read_text())["categories"]
    if kind in ("ddp", "views"):
        bucket = 8 * MIB if kind == "ddp" else 4 * MIB  # with views, the rebuilt one holds the gradients
        assert sizes["parameters"] == sizes["optimizer states"] == 4 * MIB
        assert sizes["communication"] == 0 if kind == "views" else bucket
        assert sizes["gradients"] == 8 * MIB if kind == "views" else 4 * MIB
    elif kind == "fsdp":
        assert sizes["parameters"] == sizes["gradients"] == sizes["optimizer states"] == MIB
    else:
        assert sizes["parameters"] == 5 * MIB and sizes["optimizer states"] == 2 * MIB


def test_tensors_without_storage_and_kernels_that_a_cpu_does_not_have(tmp_path):
    text = (
        "import torch, torch.distributed as dist\n"
        "from torch import nn\n"
        "dist.init_process_group('nccl')\n"
        "words, layer = nn.EmbeddingBag(1000, 8, sparse=True).cuda(), nn.Linear(8, 8).cuda()\n"
        "norm = nn.SyncBatchNorm(8).cuda()\n"
        "sparse, dense = torch.optim.SparseAdam(words.parameters()), torch.optim.Adam(layer.parameters())\n"
        "def loss(weights, x): return torch.func.functional_call(layer, weights, (x,)).sum()\n"
        "for _ in range(2):\n"
        "    x = norm(words(torch.arange(64, device='cuda')[:, None]))\n"
        "    weights = dict(layer.named_parameters())\n"
        "    of_each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)\n"
        "    sum(each.square().sum() for each in of_each.values()).add(layer(x).sum()).backward()\n"
        "    assert words.weight.grad.is_sparse\n"
        "    sparse.step(), dense.step(), sparse.zero_grad()\n"
    )
    done = fits("--gpu", "T4", "--world-size", "2", "--", script(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 0 and "2 steps of program.py as rank 0 of 2 fit on T4" in done.stdout, done.stderr


def test_a_group_without_a_world_size_is_one_rank(tmp_path):
    text = (
        "import os, torch, torch.distributed as dist\n"
        "assert 'RANK' not in os.environ and 'WORLD_SIZE' not in os.environ\n"
        "dist.init_process_group('nccl', init_method='tcp://localhost:1', rank=0, world_size=1)\n"
        "layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8).cuda(), find_unused_parameters=True)\n"
        "optimizer = torch.optim.SGD(layer.parameters())\n"
        "for _ in range(2): layer(torch.ones(8, 8, device='cuda')).sum().backward(); optimizer.step()\n"
    )
    done = fits("--gpu", "T4", "--", script(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 0 and "2 steps of program.py fit on T4" in done.stdout, done.stderr


def test_all_gpus_are_compared(tmp_path):
    """The weight, momentum and two gradients take 4 GB each: more than a T4 has, and an A10G has enough."""
    script(
        tmp_path,
        "import torch\n"
        "layers = torch.nn.Linear(50_000, 20_000, bias=False, device='cuda')\n"
        "optimizer = torch.optim.SGD(layers.parameters(), 1e-3, momentum=0.9, foreach=False)\n"
        "for step in range(2):\n"
        "    layers(torch.randn(1, 50_000, device='cuda')).mean().backward()\n"
        "    optimizer.step()\n",
    )
    first = fits("--", "-m", "program", cwd=tmp_path).stdout.splitlines()[0]
    assert first.startswith("2 steps of program need ") and " and fit on " in first
    assert "A10G 24GB" in first and "T4" not in first


def test_a_model_on_the_host_takes_the_hosts_kernels(tmp_path):
    """As a program that tries its model, or keeps an average of it, before it moves it to the GPU."""
    program = script(
        tmp_path,
        "import torch\n"
        "F = torch.nn.functional\n"
        "layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)\n"
        "q = torch.randn(2, 2, 4, 4)\n"
        "assert F.scaled_dot_product_attention(query=q, key=q, value=q).device.type == 'cpu'\n"
        "F.dropout(layer(*3 * [torch.randn(2, 4, 8)])[0], 0.1).sum().backward()\n"
        "layer.zero_grad()\n"
        "optimizer = torch.optim.SGD(layer.cuda().parameters(), 1e-3)\n"
        "for step in range(2):\n"
        "    F.dropout(layer(*3 * [torch.randn(2, 4, 8, device='cuda')])[0], p=0.1).sum().backward()\n"
        "    optimizer.step()\n",
    )
    done = fits("--gpu", "A100 80GB", "--", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_trial_of_an_optimizer_is_not_the_training(tmp_path):
    """Nor is the answer lost where the program leaves without Python's own end."""
    program = script(
        tmp_path,
        "import os, torch\n"
        "def steps(layer, count):\n"
        "    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)\n"
        "    for step in range(count):\n"
        "        layer(torch.ones(2, layer.in_features, device='cuda')).sum().backward()\n"
        "        optimizer.step()\n"
        "trial = torch.optim.SGD([torch.ones(1, device='cuda', requires_grad=True)], 1e-3)\n"
        "for step in range(4): trial.step()\n"
        "del trial\n"
        "steps(torch.nn.Linear(1000, 1000, device='cuda'), 2)\n"
        "os._exit(0)\n",
    )
    done = fits("--gpu", "A100 80GB", "--json", "out.json", "--", program, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("2 steps of program.py fit"), done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["categories"]["parameters"] == 4 * 1001 * 1000


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_our_own_trainer_takes_what_its_own_prediction_says(ranks, tmp_path):
    """But for the texts, which are not the longest ones in every batch. Several ranks meet by a store of their own."""
    options = ["--preset", "tiny", "--set", "loss.cmli_backend=chunked", "--set", "run.match_maps=0"]
    options += ["--set", "student.layers=1", "--set", "teacher.block=0"]
    options += ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json")]
    trainer = str(ROOT / "ds_cmli" / "train.py")
    world = () if ranks == 1 else ("--world-size", "2")
    request = ("--gpu", "A100 80GB", "--json", "out.json", *world, "--", trainer, "--output-dir", str(tmp_path / "run"))
    done = fits(*request, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())["totals"]
    one_block = {"student": {"layers": 1}, "teacher": {"block": 0}}
    config = load_preset("tiny", {"loss": {"cmli_backend": "chunked"}, **one_block})
    ds_json = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    expected = predict(config, ds_json, ranks, gpu="A100 80GB").report.totals
    assert content["reserved"] == expected["reserved"] and content["device"] == expected["device"]
    assert 0 <= 1 - content["requested"] / expected["requested"] < 0.002


def test_another_rank_of_our_trainer_is_refused_at_once(tmp_path):
    trainer = str(ROOT / "ds_cmli" / "train.py")
    done = fits("--world-size", "2", "--rank", "1", "--", trainer, "--preset", "tiny", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "this connects to rank 0, and fits runs rank 1 alone: give --rank 0" in done.stderr


def test_a_loop_ends_that_waits_for_a_small_number(tmp_path):
    """A loss is 2.0 for 50 readings of a step, and small then; an action that is drawn is a possible one."""
    text = (
        "import torch\n"
        "layer = torch.nn.Linear(8, 8).cuda()\n"
        "optimizer = torch.optim.SGD(layer.parameters(), 1e-3)\n"
        "for step in range(9):\n"
        "    chances = torch.distributions.Categorical(logits=layer(torch.ones(4, 8, device='cuda')))\n"
        "    loss = -chances.log_prob(chances.sample()).mean()\n"
        "    readings = 0\n"
        "    while loss.detach() > 0.1: readings += 1\n"
        "    print(readings)\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
    )
    done = fits("--", script(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("51\n51\n") and "2 steps" in done.stdout


def test_a_mistake_is_the_programs_own(tmp_path):
    done = fits("--", LOOP, "fp32", "mistake", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("File ") == 2 and done.stderr.endswith("KeyError: 'mine'\n")
    text = "import sys; assert __name__ == '__main__'; print(sys.argv[1:]); sys.exit('ended')"
    done = fits("--", script(tmp_path, text), "--gpu", "x", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "['--gpu', 'x']\n", "ended\n")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("print('none')", "before an optimizer"),
        ("import torch\ntry: torch.multiprocessing.spawn(print, nprocs=2)\nexcept Exception: 0", "starts 2 processes"),
        (
            "import torch.distributed as dist\ndist.TCPStore('localhost', 1, 2).get('of another')",
            "program.py:2: this waits for 'of another' in a store, which another rank would write",
        ),
        (
            "import torch\ntorch.ones(1).cuda()\ntorch.ones(1, device='cuda:1')",
            "program.py:3: this asks for cuda:1, a second",
        ),
        (
            "import multiprocessing\ndef work(): 0\nmultiprocessing.Process(target=work).start()",
            "program.py:3: the program starts work in a process of its own",
        ),
        ("import torch.distributed as dist\ndist.recv_object_list([None])", "program.py:2: recv_object_list: fits"),
        ("import torch\ntorch.cuda.CUDAGraph()", "program.py:2: fits does not follow CUDA graphs"),
    ],
)
def test_what_is_not_followed_is_said_in_one_line(text, reason, tmp_path):
    done = fits("--", script(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 2
    assert reason in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, program",
    [
        (["-m", "module", "-m", "x"], ("-m", "module", "-m", "x")),
        (["--gpu", "T4", "-m", "module"], ("-m", "module")),
        (["--gpu", "T4", "--", "-m", "module"], ("-m", "module")),
        (["script.py", "-m", "x"], ("script.py", "-m", "x")),
        (["--", "script.py", "-m"], ("script.py", "-m")),
    ],
)
def test_where_the_program_begins(arguments, program):
    assert command.make_context("fits", arguments).params["program"] == program


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "no program is given"),
        (["--gpu", "T4", "--", "-m"], "no program is given"),
        (["--", "absent.py"], "the script 'absent.py' is not there"),
        (["--gpu", "T4", "--limit", "2GB", "--", LOOP], "--gpu is 'T4' and --limit '2GB': give one"),
        (["--world-size", "2", "--rank", "2", "--", LOOP], "--rank is 2 of --world-size 2"),
        (["--json", "absent/x", "--", LOOP], "cannot write 'absent/x'"),
        (["--engine", "null", "--", LOOP], "--engine null runs on one device: give --gpu or --limit"),
        (["--engine", "null", "--gpu", "T4", "--plot", "x.svg", "--", LOOP], "--plot draws categories"),
        (["--plot", "x.bmp", "--", LOOP], "--plot is 'x.bmp': end its name in one of .png .svg .pdf"),
    ],
)
def test_refusals(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fits", *arguments])
    assert cli.exit_code(command) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_without_a_null_gpu(monkeypatch, tmp_path):
    options = null_gpu.NullGpu(rooms("T4", None)[0], 2, World())
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match=r"no null GPU can be built: python.* failed: ERROR: No matching"):
        null_gpu.answer(options, [LOOP], None)
    monkeypatch.setattr(null_gpu, "SOURCES", tmp_path / "absent")
    with pytest.raises(UserError, match="clone the repository"):
        null_gpu.answer(options, [LOOP], None)


def test_unknown_devices():
    for gpu, limit in (("A1", None), (None, "24 apples")):
        with pytest.raises(UserError, match=r"give one of|give a size"):
            rooms(gpu, limit)
    assert rooms(None, "24GB")[0].bytes == 24 * 10**9 and len(rooms(None, None)) > 5


def test_a_gpu_of_this_machine_is_not_touched(tmp_path):
    """Whoever asks for the driver or its management library is answered that there is no GPU."""
    asks = (
        "import ctypes, pynvml, torch\n"
        "print('driver', ctypes.CDLL('libcuda.so.1').cuInit(0))\n"
        "try:\n"
        "    pynvml.nvmlInit()\n"
        "except pynvml.NVMLError_DriverNotLoaded:\n"
        "    print('not loaded, CUDA', torch.version.cuda)\n"
        "layer = torch.nn.Linear(4, 4).cuda()\n"
        "optimizer = torch.optim.SGD(layer.parameters(), 1e-3)\n"
        "for step in range(2):\n"
        "    layer(torch.ones(1, 4, device='cuda')).sum().backward()\n"
        "    optimizer.step()\n"
    )
    done = fits("--gpu", "T4", "--", script(tmp_path, asks), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"driver 100\nnot loaded, CUDA {torch.version.cuda or '13.0'}\n2 steps of ")


@pytest.mark.parametrize("installed", ["2.7.1+cu126", "1.13.1"])
def test_versions_of_torch_that_are_too_old(monkeypatch, installed):
    monkeypatch.setattr(guard, "version", lambda _: installed)
    with pytest.raises(UserError, match=re.escape(f"torch is {installed}: fits needs 2.8")):
        guard.library()


def test_a_version_of_torch_that_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path))
    (tmp_path / "guard.cpp").write_text("unknown;")
    monkeypatch.setattr(guard, "SOURCE", tmp_path / "guard.cpp")
    with pytest.raises(UserError, match=rf"torch is {re.escape(version('torch'))}: .* cannot compile .*guard.cpp"):
        guard.library()


def test_a_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "text.so").write_text("")  # as where the cache's file system takes no programs
    monkeypatch.setattr(guard.native, "library", lambda *_: tmp_path / "text.so")
    with pytest.raises(UserError, match=r"text\.so: file too short: set DS_CMLI_CACHE"):
        guard.load()
