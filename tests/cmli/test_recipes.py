"""The recipes of docs/op.md, as they stand."""

import io
import re
from contextlib import redirect_stdout

import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.conftest import ROOT, rank_environments, spawn
from tests.processes import CONTEXT


def recipe(word: str) -> str:
    """The one piece of Python of the page with this word."""
    page = (ROOT / "docs" / "op.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"(?ms)^```python\n(.*?)^```", page) if word in code]
    return code


def run(code: str, names: dict) -> list[str]:
    """Its printed lines."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "docs/op.md", "exec"), names)
    return printed.getvalue().splitlines()


def definitions() -> dict:
    """`Model` and `batch`, of the first recipe."""
    names: dict = {}
    torch.manual_seed(0)
    run(recipe("CMLILoss(").split("\nmodel = Model()\n")[0], names)
    return names


def test_one_process():
    torch.manual_seed(0)
    first, *_, last = run(recipe("CMLILoss("), {})
    assert float(first.split()[1]) > 2 and float(last.split()[1]) < 0.5


def ddp(rank, environments):
    import os

    os.environ.update(environments[rank])
    names = definitions()
    run(recipe("dist.init"), names)
    values = [None, None]
    temperature = names["model"].module.loss.logit_scale.item()
    torch.distributed.all_gather_object(values, (temperature, names["loss"].item()))
    torch.distributed.destroy_process_group()
    assert values[0][0] == values[1][0] and values[0][1] != values[1][1]
    assert max(values)[1] < 2.5


def test_ddp():
    mp.start_processes(ddp, (rank_environments(2),), nprocs=2, start_method=CONTEXT.get_start_method())


def gradients(rank, world_size):
    names = definitions()
    torch.manual_seed(1)
    patches, words = names["batch"](8)
    torch.manual_seed(2)
    model = names["Model"]()
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    if world_size > 1:
        model = DistributedDataParallel(model)
    loss = model(patches[share], words[share])
    loss.backward()
    by_name = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return loss.detach(), by_name


def test_ddp_gives_the_gradients_of_one_process():
    expected, of_one = gradients(0, 1)
    ranks = spawn(gradients, 2)
    assert_close((ranks[0][0] + ranks[1][0]) / 2, expected)
    for _, result in ranks:
        assert result.keys() == of_one.keys() and "loss.logit_scale" in result
        for name in result:
            assert_close(result[name], of_one[name], rtol=1e-5, atol=1e-6, msg=name)
