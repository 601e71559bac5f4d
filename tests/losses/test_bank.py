"""The bank of teacher features, and the two losses that have one: alone, and on several ranks."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.registry import LOSSES, load
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.bank import Bank
from ds_cmli.losses.distillation import TokenContrast
from tests.batches import rank_batches
from tests.conftest import spawn

F64 = torch.float64
BOTH = {"token_contrast": 1.0, "cls_contrast": 0.5}


def rows(*numbers):
    return torch.tensor([[float(n)] for n in numbers])


def test_first_in_first_out():
    bank, seen = Bank(5, 1), [[0.0] * 5]
    for numbers in ((1, 2, 3), (4, 5, 6), (7,), (11, 12, 13, 14, 15, 16, 17)):
        bank.offer(rows(*numbers), torch.tensor(numbers) * 10)
        assert bank.features.flatten().tolist() == seen[-1]  # nothing enters before `enter`
        bank.enter()
        bank.enter()  # once
        seen.append(bank.features.flatten().tolist())
        assert bank.picture_id.tolist() == [10 * n for n in seen[-1]]
    # Entries 7 to 13 are 11 to 17, of which the last five lie at their numbers modulo 5.
    assert seen[1:] == [[1, 2, 3, 0, 0], [6, 2, 3, 4, 5], [6, 7, 3, 4, 5], [14, 15, 16, 17, 13]]
    assert bank.entered == 14


def test_a_bank_that_is_not_full():
    bank = Bank(4, 1)
    bank.offer(rows(1, 2), torch.tensor([8, 9]))
    bank.enter()
    by_picture, alone = bank.candidates(True), bank.candidates(False)
    assert by_picture.valid.tolist() == [True, True, False, False] and by_picture.ids.tolist() == [8, 9, 0, 0]
    assert (alone.ids < 0).all()


def test_the_place_of_a_patch_moves():
    bank, places = Bank(6, 1), []
    patches = torch.arange(3.0)[None, :, None].expand(2, 3, 1)  # two images of three patches
    for _ in range(3):
        bank.offer(patches, torch.zeros(2, dtype=torch.int64))
        bank.enter()
    places = bank.features.flatten().tolist()
    assert places == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]  # of the entries 0 to 5


def test_nothing_of_it_is_in_a_state_dict():
    assert not Bank(5, 3).state_dict()


class Inputs:
    """What both losses read of a rank's inputs; teacher and student are as wide as each other."""

    def __init__(self, part: slice, images=6, N=5, M=4, H=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        randn = partial(torch.randn, dtype=F64, generator=generator)
        given = {"image_cls": randn(images, H), "text_cls": randn(images, H), "tokens": randn(images, M, H),
                 "patches": randn(images, N, H)}  # fmt: skip
        self.features = SimpleNamespace(patch_mask=None)
        for name, x in given.items():
            setattr(self.features, name, x[part].requires_grad_())
        self.teacher = type("Targets", (), {"cls": randn(images, H)[part], "patches": randn(images, N, H)[part]})
        lengths = torch.randint(M + 1, (images, 1), generator=generator)
        ids = torch.tensor([3, 7, 3, 9, 7, 5])[torch.randperm(6, generator=generator)][:, None].expand(6, 2)
        mask = (torch.arange(M) < lengths)[part]
        self.batch = type("Batch", (), {"token_mask": mask, "pair_id": ids[part].contiguous()})
        self.student = type("Student", (), {"projection": lambda self, x: x})()
        self.width_head = None

    def to_teacher(self, x):
        return x


def built(name, **settings):
    torch.manual_seed(0)
    loss = load(LOSSES[name])(LossConfig(weights={name: 1.0}, cmli_scratch_bytes=2**20, **settings))
    loss.fit(5, 3)
    return loss.double()


def steps(loss, part, count=4):
    """Losses and gradients of some micro-batches, and what the bank holds after each."""
    results = []
    for seed in range(count):
        inputs = Inputs(part, seed=seed)
        features = [x for x in vars(inputs.features).values() if isinstance(x, torch.Tensor)]
        value = loss(inputs)
        grads = torch.autograd.grad(value, [*features, loss.logit_scale], allow_unused=True)
        loss.bank.enter()
        results.append((value.detach(), grads, {k: v.clone() for k, v in loss.bank.named_buffers()}))
    return results


BUILT = [
    ("token_contrast", {"bank": 8}),
    ("token_contrast", {"bank": 4, "duplicates": "keep", "target": "attention"}),
    ("cls_contrast", {"bank": 16}),
]


def of_rank(rank, world):
    """The steps of each of `BUILT`."""
    part = slice(rank * 6 // world, (rank + 1) * 6 // world)
    return [steps(built(name, **settings), part) for name, settings in BUILT]


@pytest.fixture(scope="module", params=[2, 3])
def ranks_of_a_world(request):
    return request.param, spawn(of_rank, request.param)


@pytest.mark.parametrize("number", range(len(BUILT)))
def test_ranks_equal_one(ranks_of_a_world, number):
    name, settings = BUILT[number]
    world, of_ranks = ranks_of_a_world
    one, several = steps(built(name, **settings), slice(0, 6)), [rank[number] for rank in of_ranks]
    for step, (value, grads, bank) in enumerate(one):
        parts = [rank[step] for rank in several]
        assert_close(torch.stack([x[0] for x in parts]).mean(), value, rtol=1e-12, atol=1e-12)
        for i, grad in enumerate(grads[:-1]):  # of a mean over ranks
            if grad is not None:
                assert_close(torch.cat([x[1][i] for x in parts]) / world, grad, rtol=1e-10, atol=1e-12)
        assert_close(sum(x[1][-1] for x in parts) / world, grads[-1], rtol=1e-10, atol=1e-12)
        for x in parts:
            assert all(torch.equal(x[2][key], bank[key]) for key in bank)


@pytest.mark.parametrize("duplicates", ["mask", "keep"])
def test_token_contrast_against_loops(duplicates):
    loss = built("token_contrast", bank=7, duplicates=duplicates)
    entries: list[tuple[int, torch.Tensor]] = []
    for seed in range(3):
        inputs = Inputs(slice(0, 6), seed=seed)
        ids, teacher = inputs.batch.pair_id[:, 0].tolist(), F.normalize(inputs.teacher.patches, dim=2)
        tokens = F.normalize(inputs.features.tokens, dim=2)
        texts = []
        for b in range(6):
            results = []
            for m in range(4):
                if not inputs.batch.token_mask[b, m]:
                    continue
                similarity = teacher[b] @ tokens[b, m]
                logits = [similarity[similarity.argmax()]]
                for other in range(6):
                    if other != b and not (duplicates == "mask" and ids[other] == ids[b]):
                        logits += [*(teacher[other] @ tokens[b, m])]
                for picture, patch in entries[-7:]:
                    if not (duplicates == "mask" and picture == ids[b]):
                        logits.append(F.normalize(patch, dim=0) @ tokens[b, m])
                logits = torch.stack(logits) / 0.07
                results.append(logits.logsumexp(0) - logits[0])
            texts.append(torch.stack(results).mean() if results else torch.zeros((), dtype=F64))
        assert_close(loss(inputs), torch.stack(texts).mean(), rtol=1e-6, atol=0)  # ln(1/0.07) is in fp32
        loss.bank.enter()
        for b in range(6):
            number = len(entries)
            entries.append((ids[b], inputs.teacher.patches[b, number % 5]))


def test_evaluation_does_not_fill_it():
    loss = built("cls_contrast", bank=4).eval()
    loss(Inputs(slice(0, 6)))
    loss.bank.enter()
    assert loss.bank.entered == 0
    loss.train()(Inputs(slice(0, 6)))
    loss.bank.enter()
    assert loss.bank.entered == 6


def test_a_match_of_its_own_is_taken(monkeypatch):
    """What overrides the match of tokens is seen by this loss too."""
    loss = built("token_contrast", bank=0)
    inputs = Inputs(slice(0, 6))
    before = loss(inputs)
    similarities = TokenContrast.similarities
    monkeypatch.setattr(TokenContrast, "similarities", lambda self, inputs: -similarities(self, inputs))
    assert loss(inputs) > before and loss.bank is None


@pytest.mark.parametrize("stage", [1, 3])
def test_gradient_caching_enters_each_micro_batch_once(device, data, stage):
    """With losses over pairs, whose first pass must not fill the bank: the same as without."""
    loader = iter(rank_batches(data.train, data, 4))
    batches = [next(loader) for _ in range(6)]
    results = []
    for weights in (BOTH, {"cmli": 1.0, **BOTH}):
        config = load_preset("tiny", {"loss": {"weights": weights, "bank": 20}, "optim": {"micro_batch": 4}})
        content = {"gradient_accumulation_steps": 3, "zero_optimization": {"stage": stage}}
        ds_config = engine.filled(config, engine.on_this_device(DeepSpeedConfig.of(content)), 1, 2)
        train_engine = engine.build(config, ds_config, data.vocab_size, 2, device)
        assert train_engine.caching == ("cmli" in weights)
        train_engine.step(batches[:3])
        train_engine.step(batches[3:])
        banks = train_engine.objective.banks()
        assert [bank.entered for bank in banks.values()] == [24, 24]
        results.append({name: bank.features.clone() for name, bank in banks.items()})
        ids = torch.cat([batch.pair_id[:, 0] for batch in batches])
        assert torch.equal(banks["cls_contrast"].picture_id, torch.cat([ids[20:], ids[4:20]]))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_backward_pass_sees_the_bank_of_the_forward_pass(device, data):
    """The micro-batch enters only when its gradients are there: they are those of autograd with the bank before."""
    loader = iter(rank_batches(data.train, data, 4))
    config = load_preset("tiny", {"loss": {"weights": BOTH, "bank": 6}, "optim": {"micro_batch": 4}})
    ds_config = engine.filled(config, DeepSpeedConfig.of({}), 1, 3)
    train_engine = engine.build(config, ds_config, data.vocab_size, 3, device)
    train_engine.step([next(loader)])
    batch, objective = next(loader), train_engine.objective
    total, _ = objective.whole(batch, train_engine.teacher(batch.image))
    parameters = [p for p in objective.student.parameters() if p.requires_grad]
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    results, update = [], train_engine.engine._take_model_step

    def collected(*arguments) -> None:
        results.extend(None if p.grad is None else p.grad.clone() for p in parameters)
        update(*arguments)

    train_engine.engine._take_model_step = collected
    train_engine.step([batch])
    for a, b in zip(results, expected, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert [bank.entered for bank in objective.banks().values()] == [8, 8]
