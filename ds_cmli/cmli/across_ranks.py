"""`maxsim` of this rank's queries with the documents of all ranks.

Documents travel packed, so that ranks may differ in their numbers of queries and documents and in
lengths, and no padding is computed. They are gathered, or pass round a ring as texts do in
`ring.py`.

Shape legend: Q queries of L_q tokens and C documents of L_d on this rank, G documents on all; R
valid tokens of the documents of a rank, D features.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import Unpack

from ds_cmli.cmli import collectives
from ds_cmli.cmli.inputs import DTYPES, Sides, Wanted
from ds_cmli.cmli.loss import ScorerOptions
from ds_cmli.cmli.op import cmli_gradients, maxsim
from ds_cmli.cmli.ring import ReturnedGradient, Scorer, add_wide, chunks
from ds_cmli.cmli.sequences import accepted_maxsim


def maxsim_across_ranks(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    reduction: str = "sum",
    group: dist.ProcessGroup | None = None,
    **options: Unpack[ScorerOptions],
) -> Tensor:
    """`maxsim` of this rank's queries with the documents of all ranks. Collective.

    This rank's own documents are the first C columns: a loss that knows of one process alone, whose
    query q has its document in column q, is right as it stands. The loss of a rank is the mean over
    its own queries, with no factor for the ranks; the mean of gradients over ranks, which
    DistributedDataParallel takes, is then the gradient of the whole batch's mean loss where ranks
    have equally many queries.

        scores = maxsim_across_ranks(queries, documents, query_mask, document_mask)  # [Q, G]
        F.cross_entropy(scores / temperature, torch.arange(len(scores))).backward()

    Args:
        queries, documents, query_mask, document_mask, reduction: as in `maxsim`, but for
            documents of each query. Q, C, L_q and L_d may differ between ranks; D and the dtype may
            not, and every rank has a query and a document.
        group: the process group; None: the default one. Without one it is `maxsim`.
        options: of `ring.Scorer`: `exchange` "gather", "ring" or "auto", `gather_bytes`, and those
            of `maxsim`. A ring keeps neither documents nor argmax indices of other ranks.

    Returns:
        [Q, G], as `maxsim`: columns of this rank, then those of the ranks before it, the nearest
        first. The gradient of a document is the sum over the ranks that scored it, added up in
        fp32 (fp64).

    Raises:
        TypeError, ValueError, RuntimeError: as `maxsim`, on every rank where one rank has a
            mistake; and where D or the dtype differ, or all ranks have the same documents: they
            have been gathered before.
    """
    scorer, ranks = Scorer(**options), collectives.world_size(group)
    if ranks < 1:
        raise ValueError("this process is not in the process group given as `group`")
    arguments = queries, documents, query_mask, document_mask
    of_op = {name: getattr(scorer, name) for name in ("backend", "scratch_bytes", "recompute")}
    if ranks == 1:
        return maxsim(*arguments, reduction, **of_op)
    sides, counts, facts = _checked_together(arguments, reduction, scorer, group)  # collective
    rows, lengths = _packed(sides)
    sizes: list[int] = facts[:, 0].tolist()  # rows of each rank
    most, rank = facts[:, :2].amax(0).tolist(), collectives.rank(group)
    lengths = F.pad(lengths, (0, most[1] - len(lengths)))
    by_rank = collectives.gather(lengths[None], group)  # collective, [P, the most documents]
    of_ranks = [by_rank[owner, :number] for owner, number in enumerate(facts[:, 1].tolist())]
    rows = F.pad(rows, (0, 0, 0, max(1, most[0]) - len(rows)))  # of equal shape on all ranks
    if scorer.goes_round(rows, group):
        each = [_starts(x) for x in of_ranks]
        scores = _Ring.apply(  # type: ignore[no-untyped-call]
            sides.text, rows, sides.token_mask, each, sizes, group, scorer
        )  # collective
        return scores if reduction == "mean" else scores * counts[:, None]
    order = [(rank - step) % ranks for step in range(ranks)]
    parts = collectives.gather_with_gradient(rows, group).split(len(rows))  # collective
    gathered = torch.cat([parts[owner][: sizes[owner]] for owner in order])
    starts = _starts(torch.cat([of_ranks[owner] for owner in order]))
    return maxsim(sides.text, gathered, sides.token_mask, starts, reduction, **of_op)


def _checked_together(
    arguments: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    reduction: str,
    scorer: Scorer,
    group: dist.ProcessGroup | None,
) -> tuple[Sides, Tensor, Tensor]:
    """The sides, the tokens of each query, and of every rank its rows, documents and three facts
    that are compared: int64 [P, 5]. Collective, CPU-GPU sync."""
    mistake, checked = None, None
    own = [0] * 5
    try:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is unknown; it must be sum or mean")
        checked = accepted_maxsim(*arguments, scorer.backend, scorer.scratch_bytes)
        image, mask = checked[0].image, checked[0].image_mask
        rows = image[..., 0].numel() if mask is None or image.ndim == 2 else int(mask.sum())
        kind = image.shape[-1], DTYPES.index(image.dtype)
        own = [rows, checked[0].sizes()[0], *kind, _bits(image)]
    except (TypeError, ValueError, RuntimeError) as error:
        mistake = error
    # NCCL sends from GPUs alone, and what is wrong may be where the inputs are.
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    facts = collectives.agreed(torch.tensor(own, device=device), mistake, group).cpu()  # collective
    assert checked is not None, "a mistake has been raised"
    for name, values in (("D", facts[:, 2].tolist()), ("dtype", facts[:, 3].tolist())):
        if len(set(values)) > 1:
            named = [str(DTYPES[x]) if name == "dtype" else str(x) for x in values]
            raise ValueError(f"the ranks must agree in {name}, found {', '.join(named)}")
    if facts[0, 4] and (facts == facts[0]).all():
        raise ValueError(
            f"the documents of all {len(facts)} ranks are the same: give each rank its own, not "
            "yet gathered (gather_across_devices=False)"
        )
    return *checked, facts


def _bits(x: Tensor) -> int:
    """The sum's, by which equal features are recognised; 0 if it is not finite."""
    total = x.detach().sum(dtype=torch.float32)
    return int(total.view(torch.int32)) if total.isfinite() else 0  # CPU-GPU sync


def _packed(sides: Sides) -> tuple[Tensor, Tensor]:
    """The rows [R, D] of the documents' valid tokens and how many each has, int64 [C]."""
    image, mask = sides.image, sides.image_mask
    if mask is None:
        return image.flatten(0, 1), image.new_full((len(image),), image.shape[1], dtype=torch.int64)
    if image.ndim == 2:
        return image, mask.diff()
    return image[mask], mask.sum(1)  # CPU-GPU sync


def _starts(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


class _Ring(torch.autograd.Function):
    """Means [Q, G], of rows [R, D] padded to the most of all ranks; `starts` and `sizes`, the
    valid rows, are those of every rank."""

    @staticmethod
    def forward(ctx, queries, rows, query_mask, starts, sizes, group, scorer):
        ctx.save_for_backward(queries, rows, query_mask)
        ctx.others = starts, sizes, group, scorer
        scores = []
        for owner, chunk, _ in _documents(rows, group):  # collective
            documents = chunk[: sizes[owner], 0]
            arguments = queries, documents, query_mask, starts[owner], "mean"
            options = {"backend": scorer.backend, "scratch_bytes": scorer.scratch_bytes}
            scores.append(maxsim(*arguments, **options))
        return torch.cat(scores, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        queries, rows, query_mask = ctx.saved_tensors
        starts, sizes, group, scorer = ctx.others
        wanted, wide = Wanted(*ctx.needs_input_grad[1::-1]), collectives.accumulated(rows.dtype)
        of_queries, of_rows, column = None, ReturnedGradient(group), 0
        for owner, chunk, _ in _documents(rows, group):  # collective
            columns = slice(column, column := column + len(starts[owner]) - 1)
            sides = Sides(chunk[: sizes[owner], 0], queries, query_mask, starts[owner], True)
            d_documents, d_queries = cmli_gradients(
                (grad.new_empty(0), grad[:, columns].t().contiguous()),
                sides,
                wanted,
                backend=scorer.backend,
                scratch_bytes=scorer.scratch_bytes,
            )
            if wanted.text:
                of_queries = add_wide(of_queries, d_queries, wide)
            if wanted.image:
                of_rows.add(owner, F.pad(d_documents, (0, 0, 0, len(rows) - sizes[owner])))
        query_gradient = None if of_queries is None else of_queries.to(queries.dtype)
        row_gradient = of_rows.sum().to(rows.dtype) if wanted.image else None  # collective
        return query_gradient, row_gradient, *(None,) * 5


def _documents(rows, group):
    return chunks(rows[:, None], torch.ones_like(rows[:, :1], dtype=torch.bool), group)
