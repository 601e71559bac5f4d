"""The losses of a training step against the equations in loops; (7), (9) and (10) by hand."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.cmli.reference import cmli_scores_reference, pair_loss_reference
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.target_cmli import Features, TargetCMLI, WidthHead, match_patches
from ds_cmli.models.student import Targets
from tests import make
from tests.conftest import ZERO1

CAPTIONS = ("two words", "two words", "a red square beside a blue circle", "one", "the sky is green here")
LOSSES = ("global", "cmli", "target_cmli", "cls_kd", "global_sigmoid", "cmli_sigmoid")
# B=2, N=3, M=2, H=2. Each patch of the teacher is 1 in one place; of the second text one token is valid.
TEACHER = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], [[0.0, 3.0], [1.0, 1.0], [1.0, 0.0]]])
PATCHES = torch.tensor([[[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [1.0, 1.0], [1.0, 4.0]]])
TOKENS = torch.tensor([[[3.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [9.0, 9.0]]])
MASK = torch.tensor([[True, True], [True, False]])


def trained(device, folder, losses=LOSSES):
    """Return an engine whose next batch has two equal captions, and the batch."""
    source = make.captioned(folder, [[text] for text in CAPTIONS])
    sections = {
        "loss": {"weights": dict.fromkeys(losses, 1.0)},
        "data": {"source": source, "val_source": source},
        "optim": {"micro_batch": len(CAPTIONS)},
    }
    engine = make.train_engine(device, ZERO1, **sections)
    return engine, make.batches(make.data_of(make.config(**sections)), len(CAPTIONS), 1)[0]


@torch.no_grad()
def expected_losses(engine, batch) -> dict[str, float]:
    """Pairs with the same caption are no negatives, and positives of the sigmoid losses."""
    student = engine.objective.student
    features = student(batch.image, batch.input_ids, batch.attention_mask)
    image_cls, patches, text_cls, tokens = (x.double() for x in features)
    targets = engine.teacher(batch.image)
    teacher_cls = targets.cls.double()
    duplicates = torch.tensor([[one == other for other in CAPTIONS] for one in CAPTIONS])
    duplicates.fill_diagonal_(False)

    def project(f: Tensor) -> Tensor:
        return F.normalize(student.projection(f.float()).double(), dim=-1)

    def loss(scores: Sequence[Tensor], temperature: float, *bias: float) -> float:
        return pair_loss_reference(*scores, torch.tensor([1 / temperature, *bias]), duplicates).item()

    distance = 0.0  # (5) to (10), of each text's valid tokens alone
    for image, text, mask, teacher in zip(patches, tokens, batch.token_mask, targets.patches.double(), strict=True):
        match = (project(text[mask]) @ project(teacher).t()).argmax(1)
        distance += (image - teacher).square().mean().item()
        distance += (text[mask] - teacher[match]).square().mean().item()
    cmli = cmli_scores_reference(project(patches), project(tokens), batch.token_mask)
    cosines = [F.normalize(image_cls, dim=-1) @ F.normalize(text_cls, dim=-1).t()] * 2
    return {
        "global": loss(cosines, 0.07),
        "cmli": loss(cmli, 0.02),
        "target_cmli": distance / len(CAPTIONS) / 2,
        "cls_kd": sum((x - teacher_cls).square().mean().item() for x in (image_cls, text_cls)) / 2,
        "global_sigmoid": loss(cosines, 0.1, -10.0),
        "cmli_sigmoid": loss(cmli, 0.02, -14.0),
    }


@pytest.fixture(scope="module")
def first_step(device, tmp_path_factory):
    engine, batch = trained(device, tmp_path_factory.mktemp("data") / "pairs")
    expected = expected_losses(engine, batch)
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


def test_target_cmli_alone_never_trains_the_projection(device, tmp_path):
    engine, batch = trained(device, tmp_path / "pairs", ("target_cmli",))
    _, gradients = make.gradients(engine, [batch])
    assert not gradients["student.projection.weight"].any()
    assert gradients["student.image_out.weight"].any() and gradients["student.text_out.weight"].any()


def target_cmli(head=None, teacher_patches=TEACHER, **settings) -> float:
    """Return the loss with a student whose projection changes nothing."""
    features = Features(PATCHES[:, 0], PATCHES, TOKENS[:, 0], TOKENS, MASK)
    student = SimpleNamespace(projection=nn.Identity())
    targets = Targets(teacher_patches[:, 0], teacher_patches)
    return TargetCMLI(LossConfig(**settings), student)(features, targets, student, head).item()


def test_each_token_matches_its_most_similar_patch_and_a_tie_the_first():
    assert match_patches(TOKENS, TEACHER).tolist() == [[0, 2], [0, 1]]
    assert match_patches(torch.ones(1, 1, 2), torch.ones(1, 3, 2)).tolist() == [[0]]


@pytest.mark.parametrize("reduction, H", [("mean", 2), ("sum", 1)])
@pytest.mark.parametrize("image_weight, text_weight", [(1.0, 1.0), (0.5, 4.0), (0.0, 2.0)])
def test_target_cmli_by_hand(reduction, H, image_weight, text_weight):
    # (7): squared distances of the patches are 4, 0, 4 and 0, 0, 16.
    image = ((4 + 0 + 4) / 3 + (0 + 0 + 16) / 3) / 2 / H
    # (9): of tokens and their matches 4 and 2, a mean over two tokens; and 4, over one.
    text = ((4 + 2) / 2 + 4) / 2 / H
    settings = {"target_image_weight": image_weight, "target_text_weight": text_weight, "mse_reduction": reduction}
    assert target_cmli(**settings) == pytest.approx((image_weight * image + text_weight * text) / 2)


def test_a_wider_teacher_is_reached_by_an_orthonormal_head():
    torch.manual_seed(0)
    head = WidthHead(2, 5)
    assert torch.allclose(head(head(PATCHES), back=True), PATCHES, atol=1e-6)
    expected = target_cmli(mse_reduction="sum")
    assert target_cmli(head, head(TEACHER), mse_reduction="sum") == pytest.approx(expected, rel=1e-5)
