"""The recipes of docs/op.md, as they stand."""

import io
import re
from contextlib import redirect_stdout

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.cmli.test_multi_vector import Encoder, columns, encoder, library
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


def test_maxsim():
    names: dict = {}
    assert run(recipe("maxsim(queries"), names) == ["torch.Size([16, 4])"]
    assert names["queries"].grad.any() and not names["documents"].grad[~names["document_mask"]].any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(tmp_path, monkeypatch):
    """With a tiny model in place of the published one."""
    library("sentence_transformers", "6.0")
    monkeypatch.chdir(tmp_path)
    code = recipe("MultiVectorEncoderTrainer(")
    published = 'MultiVectorEncoder("answerdotai/ModernBERT-base")'
    assert published in code
    names = {"tiny": encoder(True)}
    run(code.replace(published, "tiny"), names)
    assert names["trainer"].state.global_step == 3 and names["loss"].similarity_fct.across_ranks


@pytest.mark.slow
def test_pylate():
    """With an encoder in place of its model, which it builds with sentence-transformers 5 alone."""
    library("pylate", "1.5")
    code = recipe("models.ColBERT(")
    published = 'models.ColBERT("lightonai/GTE-ModernColBERT-v1")'
    assert published in code
    names = {"tiny": Encoder(True)}
    names["tiny"].tokenize = lambda texts, is_query, pad=False: columns(range(len(texts)), 1, is_query)[0]
    run(code.replace(published, "tiny"), names)
    assert names["loss"].score_metric.across_ranks and names["tiny"].words.grad.any()


@pytest.mark.slow
def test_colpali():
    pytest.importorskip("colpali_engine", reason="colpali-engine is not installed")
    names: dict = {}
    run(recipe("MaxSimLoss("), names)
    assert 1 < names["loss"].item() < 50 and names["model"].weight.grad.any()


def test_accelerate_in_bf16():
    from accelerate import state

    state.AcceleratorState._reset_state(reset_partial_state=True)  # of other tests' trainers
    names = definitions()
    (last,) = run(recipe("Accelerator("), names)
    assert names["accelerator"].mixed_precision == "bf16"
    assert float(last) < 0.5
    assert {p.dtype for p in names["model"].parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore")
def test_lightning_in_bf16(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = definitions()
    *_, last = run(recipe("LightningModule"), names)
    assert names["trainer"].precision == "bf16-mixed" and names["trainer"].global_step == 100
    assert float(last) < 0.5


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
