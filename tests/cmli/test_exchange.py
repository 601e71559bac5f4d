"""The exchange between ranks: the bytes of valid tokens alone, and one line on every rank for unequal batches."""

import importlib.util
import warnings

import pytest
import torch
import torch.distributed as dist

from ds_cmli.cmli import CMLILoss, PairLoss, exchange
from tests import ranks

B = 6
N = 9
M = 64
D = 32
LENGTHS = [6, 18, 12, 3, 21, 12]  # 12 valid tokens on average
OLD_NAMES = ("all_gather_into_tensor", "reduce_scatter_tensor")
NEW_NAMES = ("all_gather_single", "reduce_scatter_single")


def features(rank: int):
    torch.manual_seed(rank)
    image = torch.randn(B, N, D, requires_grad=True)
    text = torch.randn(B, M, D, requires_grad=True)
    return image, text, torch.arange(M) < torch.tensor(LENGTHS)[:, None]


def bytes_sent(rank: int, world: int) -> dict[str, int]:
    """Return the bytes of texts and of their gradients that a rank's collectives move in a loss and its backward."""
    sizes = {}

    def counted(name, collective):
        def call(output, rows, *arguments):
            if rows.shape[-1] >= D:  # rows of features, and not numbers
                sizes[name] = max(output.nbytes, rows.nbytes)
            return collective(output, rows, *arguments)

        return call

    image, text, token_mask = features(rank)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="error"):
        PairLoss()(image[:, 0], text[:, 0]).backward()
        text.grad = None
        for name in ("_all_gather", "_reduce_scatter"):
            patch.setattr(exchange, name, counted(name, getattr(exchange, name)))
        CMLILoss()(image, text, token_mask).backward()
    one_token = token_mask & (torch.arange(M) == 0)
    assert exchange.gather_sizes(B, one_token, text.device) == (1, B)
    assert text.grad[token_mask].any(1).all()
    assert not text.grad[~token_mask].any()
    return sizes


def test_valid_tokens_alone_travel_and_collectives_warn_of_nothing():
    rows = 2 * sum(LENGTHS) * D * 4  # of two ranks, fp32
    assert ranks.run(bytes_sent, 2) == [{"_all_gather": rows, "_reduce_scatter": rows}] * 2


def error_of_unequal_batches(rank: int, world: int, vectors: bool, num_pairs: list[int]) -> str:
    image, text, token_mask = (x[: num_pairs[rank]] for x in features(rank))
    with pytest.raises(ValueError) as raised:
        if vectors:
            PairLoss()(image[:, 0], text[:, 0])
        else:
            CMLILoss()(image, text, token_mask)
    return str(raised.value)


@pytest.mark.parametrize("vectors", [False, True], ids=["sequences", "vectors"])
@pytest.mark.parametrize("num_pairs", [[6, 5], [0, 6]])
def test_ranks_with_unequal_batches_get_the_same_line(vectors, num_pairs):
    line = f"ranks have {min(num_pairs)} to {max(num_pairs)} pairs: drop the last unequal batch"
    assert ranks.run(error_of_unequal_batches, 2, vectors, num_pairs) == [line] * 2


@pytest.mark.parametrize("names", [NEW_NAMES, OLD_NAMES])
def test_collectives_are_found_by_their_old_or_their_new_names_alone(monkeypatch, names):
    collectives = [getattr(dist, name) for name in OLD_NAMES]
    for name in (*OLD_NAMES, *NEW_NAMES):
        monkeypatch.delattr(dist, name, raising=False)
    for name, collective in zip(names, collectives, strict=True):
        monkeypatch.setattr(dist, name, collective, raising=False)
    spec = importlib.util.find_spec(exchange.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [module._all_gather, module._reduce_scatter] == collectives
