"""colpali-engine's own losses and trainer with `maxsim`: equal to them, across ranks, batches in parts."""

import importlib
import random
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_cmli.cmli.colpali import MaxSimLoss
from ds_cmli.cmli.parts import in_parts
from tests.conftest import spawn

LOSSES = [f"Colbert{kind}Loss" for kind in ("", "NegativeCE", "PairwiseCE", "PairwiseNegativeCE", "Sigmoid")]


def library(name="loss.late_interaction_losses"):
    """A module of colpali-engine; its trainer asks for a GPU's memory when it is imported, if pynvml is there."""
    pytest.importorskip("colpali_engine", reason="colpali-engine is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", None)
        return importlib.import_module(f"colpali_engine.{name}")


def embeddings(g, *shape):
    """Unit rows in fp64, and where tokens are valid, [..., L, 1]: padding at the end, as zeros."""
    x = F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).requires_grad_()
    lengths = torch.randint(1, shape[-2] + 1, shape[:-2], generator=g)
    return x, (torch.arange(shape[-2]) < lengths[..., None])[..., None]


def batch(seed, negatives, documents=4):
    g = torch.Generator().manual_seed(seed)
    sides = [embeddings(g, 4, 6, 8), embeddings(g, documents, 9, 8)]
    return sides + [embeddings(g, 4, 3, 7, 8)] * negatives


def loss_and_gradients(loss, sides, **named):
    value = loss(*(x * valid for x, valid in sides), **named)
    return value.detach(), *torch.autograd.grad(value, [x for x, _ in sides])


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_library(name):
    losses, negatives = library(), "Negative" in name
    for seed in range(8):
        rng = random.Random(seed)
        flags = ("normalize_scores", "pos_aware_negative_filtering")
        options = {flag: rng.random() < 0.5 for flag in flags} | {"temperature": rng.choice((0.02, 1.0))}
        if negatives:
            options["in_batch_term_weight"] = rng.choice((0.0, 0.5, 1.0))
        offset = 0 if name == "ColbertSigmoidLoss" else rng.choice((0, 4))  # of documents gathered before
        loss, sides = getattr(losses, name)(**options), batch(seed, negatives, 4 + offset)
        expected = loss_and_gradients(loss, sides, offset=offset)
        for ours in (MaxSimLoss(loss), MaxSimLoss(loss, recompute=True, scratch_bytes=1000)):
            for got, want in zip(loss_and_gradients(ours, sides, offset=offset), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_document_of_which_all_is_worse_than_padding():
    """The library takes the maximum over padding too, whose similarity is 0."""
    loss = library().ColbertLoss(normalize_scores=False)
    queries, documents = torch.ones(2, 3, 4), -torch.ones(2, 5, 4)
    documents[0, 2:] = documents[1, :1] = 0
    documents[1, 1] = 1
    sides = [(x.requires_grad_(), torch.ones(())) for x in (queries, documents)]
    expected, got = (loss_and_gradients(each, sides) for each in (loss, MaxSimLoss(loss)))
    assert got[0] == expected[0]
    torch.testing.assert_close(got[1], expected[1])
    valid = documents.any(-1)
    torch.testing.assert_close(got[2][valid], expected[2][valid])


@pytest.mark.slow
def test_what_does_not_fit():
    losses = library()
    with pytest.raises(ValueError, match="use_smooth_max=True sums over all similarities"):
        MaxSimLoss(losses.ColbertNegativeCELoss(use_smooth_max=True))
    with pytest.raises(ValueError, match="exchange='post' is unknown"):
        MaxSimLoss(losses.ColbertLoss(), exchange="post")
    before = losses.maxsim_inbatch
    with pytest.raises(ValueError, match="project both to one space"):
        MaxSimLoss(losses.ColbertLoss())(torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    assert losses.maxsim_inbatch is before


@pytest.mark.parametrize("thing", [nn.Linear(1, 1), nn.Linear, None])
def test_what_is_no_loss_of_the_library(thing):
    with pytest.raises(TypeError, match="takes a late-interaction loss of colpali-engine"):
        MaxSimLoss(thing)


def shortened(rank, negatives):
    """A rank's batch, whose documents have another length on each rank."""
    queries, (documents, valid), *others = batch(rank, negatives)
    cut = slice(9 - rank)
    return [queries, (documents.detach()[:, cut].requires_grad_(), valid[:, cut]), *others]


def in_trainer(rank, ranks, name, options):
    """Loss and gradients by the method of the trainer that gathers for other losses."""
    loss, trainer = getattr(library(), name)(), library("trainer.contrastive_trainer")
    itself = SimpleNamespace(loss_func=MaxSimLoss(loss, **options))
    itself.accelerator = SimpleNamespace(num_processes=ranks, sync_gradients=True)
    sides = shortened(rank, "Negative" in name)

    def compute(*arguments):
        return trainer.ContrastiveTrainer._compute_loss_from_outputs(itself, *arguments)

    try:
        result = loss_and_gradients(compute, sides)
    except ValueError as error:
        result = str(error)
    itself.accelerator.sync_gradients = False  # of a micro-batch that is accumulated: no other rank
    torch.testing.assert_close(compute(*(x * v for x, v in sides)), loss(*(x * v for x, v in sides)))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES[:4])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_two_ranks_in_the_trainer_equal_one(name, exchange):
    """Its own gather is no reference: over gloo the gradient of documents is wrong (torch 2.13), as it is strided."""
    loss, negatives = getattr(library(), name)(), "Negative" in name
    batches = [shortened(rank, negatives) for rank in range(2)]
    documents = torch.cat([F.pad(x * v, (0, 0, rank, 0)) for rank, (_, (x, v), *_) in enumerate(batches)])
    values = []
    for rank, ((queries, valid), _, *others) in enumerate(batches):
        arguments = queries * valid, documents, *(x * v for x, v in others)
        values.append(loss(*arguments, offset=4 * rank))
    results = spawn(in_trainer, 2, name, {"exchange": exchange})
    for value, sides, (got, *gradients) in zip(values, batches, results, strict=True):
        torch.testing.assert_close(got, value.detach(), rtol=1e-9, atol=1e-9)
        expected = torch.autograd.grad(sum(values), [x for x, _ in sides], retain_graph=True)
        for x, y in zip(gradients, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_sigmoid_loss_takes_one_rank():
    for line in spawn(in_trainer, 2, "ColbertSigmoidLoss", {}):
        assert line.startswith("ColbertSigmoidLoss labels as many documents as queries")


class Encoder(nn.Module):
    """Token embeddings of identifiers, zeros for padding, as the library's models return them."""

    def __init__(self):
        super().__init__()
        self.table, self.out, self.drop = nn.Embedding(50, 16), nn.Linear(16, 8), nn.Dropout(0.3)
        self.rows, self.reentrant = [], None

    def forward(self, input_ids, attention_mask, scale=1.0):
        self.rows.append(len(input_ids))
        x = self.table(input_ids) * scale
        if self.reentrant is not None:
            x = checkpoint(lambda x: self.drop(x).tanh(), x, use_reentrant=self.reentrant)
        return F.normalize(self.out(self.drop(x)), dim=-1) * attention_mask[..., None]


def ids(seed, rows=7):
    g = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(50, (rows, 5), generator=g), "attention_mask": torch.ones(rows, 5)}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_parts_give_the_gradients_of_the_whole_batch(reentrant):
    """Dropout included, whose random numbers are those of the parts one after the other."""
    torch.manual_seed(0)
    model, (names, values) = Encoder(), zip(*ids(0).items(), strict=True)
    model.reentrant = reentrant
    torch.manual_seed(1)
    parts = [dict(zip(names, part, strict=True)) for part in zip(*(x.split(3) for x in values), strict=True)]
    whole = torch.cat([model(**part, scale=2.0) for part in parts])
    whole.square().cumsum(0).sin().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    out = in_parts(model, 3)(*values, scale=2.0)
    assert torch.equal(out, whole) and set(model.rows) == {3, 1}
    out.square().cumsum(0).sin().sum().backward()
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want)


def test_parts_keep_the_embeddings_alone():
    torch.manual_seed(0)
    model, saved = nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 2)), []
    rows = torch.randn(64, 4)
    in_parts(model, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = model(rows)
    assert sum(x.nbytes for x in saved) < 64 * 512 * 4 / 4
    with torch.no_grad():
        torch.testing.assert_close(model(rows), out)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: in_parts(Encoder(), 0), "size=0 must be a positive int"),
        (lambda: in_parts(Encoder(), 2)(torch.ones(3, 5).long(), torch.ones(4, 5)), r"one batch, found \[3, 4\] rows"),
        (lambda: in_parts(nn.LSTM(2, 2), 2)(torch.ones(3, 5, 2)), "embeddings as one tensor, not tuple"),
    ],
)
def test_what_cannot_be_taken_in_parts(call, line):
    with pytest.raises((TypeError, ValueError), match=line):
        call()


@pytest.mark.slow
def test_the_trainer_of_the_library_as_it_is(tmp_path):
    """Weights after three steps: by itself, with `maxsim`, and with queries and documents in parts."""
    losses, trainer = library(), library("trainer.contrastive_trainer").ContrastiveTrainer
    from transformers import TrainingArguments

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return {"query": ids(i, 1), "doc": ids(100 + i, 1)}

    def collate(rows):
        sides = [(f"{side}_", key) for side in ("query", "doc") for key in ids(0)]
        return {side + key: torch.cat([row[side[:-1]][key] for row in rows]) for side, key in sides}

    results = []
    for loss, size in (
        (losses.ColbertLoss(), 0),
        (MaxSimLoss(losses.ColbertLoss()), 0),
        (MaxSimLoss(losses.ColbertLoss()), 3),
    ):
        torch.manual_seed(0)
        model = Encoder()
        model.drop.p = 0.0
        if size:
            in_parts(model, size)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to="none", seed=1,
            save_strategy="no", learning_rate=0.05, logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        given = {"train_dataset": Pairs(), "eval_dataset": None, "data_collator": collate}
        trainer(loss, True, model=model, args=arguments, **given).train()
        results.append([p.detach() for p in model.parameters()])
        assert max(model.rows) == (size or 4)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
