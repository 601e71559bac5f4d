"""The op under what traces programs: the program computes what the op does, and its gradients."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from ds_cmli.cmli import CMLILoss, cmli_scores

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(3, 20, 8, generator=GENERATOR)
TEXT = torch.randn(3, 6, 8, generator=GENERATOR)
MASK = torch.arange(6) < torch.tensor([[2], [6], [0]])


class Scores(nn.Module):
    """Both score matrices of projected features, as one tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(8, 8)

    def forward(self, image, text, mask):
        s_i2t, s_t2i = cmli_scores(self.projection(image), self.projection(text), mask)
        return torch.stack([s_i2t, s_t2i])


class Loss(Scores):
    def __init__(self):
        super().__init__()
        self.loss = CMLILoss()

    def forward(self, image, text, mask):
        return self.loss(self.projection(image), self.projection(text), mask)


def with_gradient(module, weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the module's output, and the gradient of the sum of its squares."""
    out = module(IMAGE, TEXT, MASK)
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    return out, gradient


@pytest.mark.parametrize("kind", [Scores, Loss])
def test_an_exported_program_computes_and_trains_as_the_module(kind):
    module = kind()
    exported = torch.export.export(module, (IMAGE, TEXT, MASK), strict=False).module()
    weight = dict(exported.named_parameters())["projection.weight"]
    expected = with_gradient(module, module.projection.weight)
    assert_close(with_gradient(exported, weight), expected, rtol=1e-5, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("kind", [Scores, Loss])
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_records_scores_losses_and_their_gradients(kind, mode):
    module = kind()

    def gradient(image, text, mask):
        image = image.detach().requires_grad_()
        out = module(image, text, mask)
        return out, *torch.autograd.grad(out.square().sum(), (image, module.projection.weight))

    traced = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(IMAGE, TEXT, MASK)
    other_inputs = 2 * IMAGE, -TEXT, ~MASK  # values that the trace has not seen
    assert_close(traced(*other_inputs), gradient(*other_inputs))


@pytest.mark.slow
@pytest.mark.parametrize("kind, without_a_break", [(Scores, True), (Loss, False)])
def test_a_compiled_module_computes_and_trains(kind, without_a_break):
    module = kind()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=without_a_break)
    weight = module.projection.weight
    assert_close(with_gradient(compiled, weight), with_gradient(module, weight))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_computes_each_batch():
    images = torch.stack([IMAGE, 2 * IMAGE])
    s_i2t, _ = torch.vmap(lambda image: cmli_scores(image, TEXT, MASK))(images)
    assert_close(s_i2t, torch.stack([cmli_scores(image, TEXT, MASK)[0] for image in images]))
