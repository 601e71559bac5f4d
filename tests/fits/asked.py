"""A program that asks a GPU much, with what it has to answer. Weights and activations are [1024, 1024] fp32, 4 MiB."""

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention.flex_attention import flex_attention

MIB, DEVICE = 1 << 20, torch.device("cuda")


@triton.jit
def kernel(x):
    pass


def memory() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    assert generator.device.type == torch.cuda.default_generators[0].device.type == "cuda"
    assert len(torch.empty(10, pin_memory=True)) == 10 and torch.empty(300, 300, pin_memory=True).numel() == 90_000
    before = torch.cuda.memory_allocated()
    x = torch.randn(1024, 1024, device=DEVICE, generator=generator, requires_grad=True)
    y = x * 2
    assert torch.cuda.memory_allocated() == before + 8 * MIB and torch.cuda.memory_reserved() == 20 * MIB
    F.dropout(y, 0.5, inplace=True)  # keeps what it multiplies by, of the type of `y`
    kernel[(1,)](y)
    assert torch.cuda.memory_allocated() == before + 12 * MIB
    del x, y
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() >= before + 12 * MIB
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before and torch.cuda.mem_get_info()[0] > 40 * MIB
    torch.cuda.memory._record_memory_history()
    assert "num_ooms" in torch.cuda.memory_summary() or "OOM" in torch.cuda.memory_summary()


def streams() -> None:
    """What another stream may still read is not given out again before somebody has waited for it."""
    side, before = torch.cuda.Stream(), torch.cuda.memory_reserved()
    x = torch.empty(40 * MIB, dtype=torch.uint8, device=DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
        done = torch.cuda.Event()
        done.record()
    x.record_stream(side)
    del x
    y = torch.empty(40 * MIB, dtype=torch.uint8, device=DEVICE)
    assert torch.cuda.memory_reserved() == before + 80 * MIB and not done.query()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.current_stream().synchronize()  # which waits for the other
    assert done.query()
    z = torch.empty(40 * MIB, dtype=torch.uint8, device=DEVICE)
    assert torch.cuda.memory_reserved() == before + 80 * MIB
    del y, z


def data() -> None:
    assert torch.rand(300, 300).numpy().shape == (300, 300) and len(torch.rand(300, 300).tolist()) == 300
    numbers, scores = torch.randint(9, (5,), device=DEVICE), torch.randn(32, 6, device=DEVICE)
    assert [len(item) for item in numbers.unique(return_inverse=True, return_counts=True)] == [5, 5, 5]
    assert len(scores.masked_select(scores > 0)) == 32 * 6 and len(scores.unique(dim=0)) == 32
    choice = torch.distributions.Categorical(logits=scores)  # looks for a NaN
    assert choice.log_prob(choice.sample()).shape == (32,)  # which is checked
    assert torch.distributions.Categorical(probs=scores.softmax(-1)).entropy().shape == (32,)  # whose sums it checks
    assert not (scores <= scores + 1).any() and (scores < 0).all()  # programs raise on the other answer
    unfinished, length = torch.ones(8, dtype=torch.long, device=DEVICE), 0  # texts grow to their greatest length
    while unfinished.max() != 0:
        length += 1
        ends = torch.isin(torch.randint(9, (8,), device=DEVICE), torch.tensor([5], device=DEVICE))
        unfinished = unfinished & ~(torch.full((8,), length == 12, device=DEVICE) | ends)
    assert length == 12 and torch.ones(3, dtype=torch.bool, device=DEVICE).any()
    left = torch.ones(3, dtype=torch.bool, device=DEVICE)
    left[0] = False
    assert not left.any()  # so that a loop ends
    ends, experts = torch.tensor([10, 32], dtype=torch.int32, device=DEVICE), torch.randn(2, 8, 16, device=DEVICE)
    assert torch.equal(scores, scores * 2) and not torch.equal(ends, ends + 1)  # of the second, the values are known
    rows = torch.randn(32, 8, device=DEVICE)
    product = F.grouped_mm(rows, experts, offs=ends)
    assert product.shape == (32, 16) and product.dtype == torch.float32


def operators() -> None:
    x = torch.randn(5, 2, 4, device=DEVICE)
    torch.nn.GRU(4, 8, bidirectional=True).cuda()(x)[0].sum().backward()
    scores, lengths = torch.randn(20, 2, 5, device=DEVICE, requires_grad=True), torch.tensor([6, 4]).cuda()
    F.ctc_loss(scores.log_softmax(-1), torch.randint(1, 5, (2, 6), device=DEVICE), lengths + 10, lengths).backward()
    F.ctc_loss(
        scores.log_softmax(-1), torch.ones(2, 6, device=DEVICE).long(), lengths.cpu() + 10, lengths.cpu()
    ).backward()
    torch.nn.DataParallel(torch.nn.Linear(4, 4).cuda())(x[0]).sum().backward()
    heads = torch.randn(1, 2, 16, 16, device=DEVICE, requires_grad=True)
    flex_attention(heads, heads, heads).sum().backward()
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(4, 2, batch_first=True), 1).cuda().eval()
    with torch.no_grad():  # where it would make nested tensors of texts without their padding
        assert encoder(x, src_key_padding_mask=torch.tensor([[False, True]] * 5).cuda()).shape == x.shape
    with torch.inference_mode():
        assert F.linear(x[0], torch.randn(3, 4, device=DEVICE)).sum().item() == 2
    with torch.random.fork_rng():
        assert torch.accelerator.memory_allocated() == torch.cuda.memory_allocated()
    torch.rand(300, 300).share_memory_()
    assert torch._sample_dirichlet(torch.ones(2, 3, device=DEVICE)).shape == (2, 3)  # as on a CPU


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.tensor(2.0, device=DEVICE)  # in backward


memory()
streams()
data()
operators()
layer = torch.nn.Linear(8, 8, device=DEVICE)
optimizer = torch.optim.SGD(layer.parameters(), fused=True)
for _ in range(2):
    Twice.apply(layer(torch.ones(8, 8, device=DEVICE))).sum().backward()
    optimizer.step()
