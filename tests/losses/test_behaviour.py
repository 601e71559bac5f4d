"""The losses of a training step against the equations in loops, from what student and teacher give."""

import json
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import make

CAPTIONS = ("two words", "two words", "a red square beside a blue circle", "one", "the sky is green here")
LOSSES = ("global", "cmli", "target_cmli", "cls_kd", "global_sigmoid", "cmli_sigmoid")
JSON = {"zero_optimization": {"stage": 1}}


def trained(device, folder, losses=LOSSES, **of_loss):
    """An engine whose next batch has two equal captions, and the batch."""
    source = make.pairs(folder, len(CAPTIONS))
    rows = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "loss": {"weights": dict.fromkeys(losses, 1.0), **of_loss},
        "data": {"source": source, "val_source": source},
        "optim": {"micro_batch": len(CAPTIONS)},
    }
    engine = make.train_engine(device, JSON, **sections)
    return engine, make.batches(make.data_of(make.config(**sections)), len(CAPTIONS), 1)[0]


class Pairs:
    """The features of a batch in fp64, each text with its valid tokens alone."""

    @torch.no_grad()
    def __init__(self, engine, batch):
        student = engine.objective.student
        x, patches, y, tokens = student(batch.image, batch.input_ids, batch.attention_mask)
        targets = engine.teacher(batch.image)
        self.cls, self.text_cls, self.patches = x.double(), y.double(), list(patches.double())
        self.tokens = [t[mask].double() for t, mask in zip(tokens, batch.token_mask, strict=True)]
        self.teacher_cls, self.teacher = targets.cls.double(), list(targets.patches.double())
        self.project = lambda f: F.normalize(student.projection(f.float()).double(), dim=-1)
        self.count = len(self.tokens)

    def cosines(self) -> Tensor:
        return F.normalize(self.cls, dim=-1) @ F.normalize(self.text_cls, dim=-1).t()

    def cmli(self) -> list[Tensor]:
        s = torch.zeros(2, self.count, self.count, dtype=torch.float64)
        for i, j in product(range(self.count), repeat=2):
            S = self.project(self.patches[i]) @ self.project(self.tokens[j]).t()
            s[0, i, j], s[1, i, j] = S.amax(1).mean(), S.amax(0).mean()
        return list(s)

    def contrast(self, rows: Tensor, columns: Tensor, temperature: float) -> float:
        """Other pairs with the same caption are no negatives."""
        total = 0.0
        for n, text in enumerate(CAPTIONS):
            others = [m for m, other in enumerate(CAPTIONS) if m == n or other != text]
            for s in (rows[n], columns[:, n]):
                logits = s[others] / temperature
                total += (logits.logsumexp(0) - s[n] / temperature).item()
        return total / 2 / self.count

    def sigmoid(self, s: Tensor, temperature: float, bias: float) -> float:
        """Pairs with the same caption are positives."""
        total = 0.0
        for n, m in product(range(self.count), repeat=2):
            z = 1 if CAPTIONS[n] == CAPTIONS[m] else -1
            total += math.log1p(math.exp(-z * (s[n, m].item() / temperature + bias)))
        return total / self.count

    def target_cmli(self, reduction=Tensor.mean) -> float:
        """(5) to (10)."""
        image = text = 0.0
        for patches, tokens, teacher in zip(self.patches, self.tokens, self.teacher, strict=True):
            image += reduction((patches - teacher).square(), -1).mean().item()
            match = (self.project(tokens) @ self.project(teacher).t()).argmax(1)
            text += reduction((tokens - teacher[match]).square(), -1).mean().item()
        return (image + text) / self.count / 2

    def expected(self) -> dict[str, float]:
        s_i2t, s_t2i = self.cmli()
        of_cls = sum((x - self.teacher_cls).square().mean().item() for x in (self.cls, self.text_cls)) / 2
        sigmoids = self.sigmoid(s_i2t, 0.02, -14.0) + self.sigmoid(s_t2i, 0.02, -14.0)
        return {
            "global": self.contrast(self.cosines(), self.cosines(), 0.07),
            "cmli": self.contrast(s_i2t, s_t2i, 0.02),
            "target_cmli": self.target_cmli(),
            "cls_kd": of_cls,
            "global_sigmoid": self.sigmoid(self.cosines(), 0.1, -10.0),
            "cmli_sigmoid": sigmoids / 2,
        }


@pytest.fixture(scope="module")
def first_step(device, tmp_path_factory):
    engine, batch = trained(device, tmp_path_factory.mktemp("data") / "pairs")
    expected = Pairs(engine, batch).expected()
    before = {name: p.detach().clone() for name, p in engine.objective.named_parameters()}
    return engine, expected, before, make.step(engine, [batch])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_has_the_losses_of_the_equations(first_step, loss):
    _, expected, _, losses = first_step
    assert losses[loss] == pytest.approx(expected[loss], rel=1e-4)


def test_the_losses_add_up_and_a_step_updates_temperatures_and_projection(first_step):
    engine, _, before, losses = first_step
    assert losses["total"] == pytest.approx(sum(losses[name] for name in LOSSES), rel=1e-6)
    moved = {name for name, p in engine.objective.named_parameters() if not torch.equal(before[name], p)}
    scales = {name for name in before if name.endswith("logit_scale")}
    assert len(scales) == 4 and scales <= moved and "student.projection.weight" in moved


def test_a_mean_over_features_may_be_their_sum(device, tmp_path):
    engine, batch = trained(device, tmp_path / "pairs", ("target_cmli",), mse_reduction="sum")
    expected = Pairs(engine, batch).target_cmli(Tensor.sum)
    assert make.step(engine, [batch])["target_cmli"] == pytest.approx(expected, rel=1e-4)


def test_target_cmli_alone_never_trains_the_projection(device, tmp_path):
    engine, batch = trained(device, tmp_path / "pairs", ("target_cmli",))
    _, gradients = make.gradients(engine, [batch])
    assert not gradients["student.projection.weight"].any()
    assert gradients["student.image_out.weight"].any() and gradients["student.text_out.weight"].any()
