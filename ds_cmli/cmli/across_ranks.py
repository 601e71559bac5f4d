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
from ds_cmli.cmli.inputs import DTYPES, Sides, Wanted, valid_positions
from ds_cmli.cmli.loss import ScorerOptions
from ds_cmli.cmli.op import cmli_gradients, maxsim
from ds_cmli.cmli.ring import ReturnedGradient, Scorer, add_wide, passed
from ds_cmli.cmli.sequences import accepted_maxsim


def maxsim_across_ranks(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    reduction: str = "sum",
    empty: float = 0.0,
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
            not, and every rank has a query and a document. Without a process group it is `maxsim`.
        empty: the score of a document without valid tokens.
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
    scorer, ranks, rank = Scorer(**options), collectives.world_size(), collectives.rank()
    arguments = queries, documents, query_mask, document_mask
    if ranks == 1:
        scores = maxsim(*arguments, reduction, **scorer.of_op)
        if document_mask is None:
            return scores
        return with_empty(scores, valid_positions(document_mask), empty)
    sides, counts, facts = _checked_together(arguments, reduction, scorer)  # collective
    rows, lengths = _packed(sides)
    sizes: list[int] = facts[:, 0].tolist()  # rows of each rank
    most_rows, most_documents = facts[:, :2].amax(0).tolist()
    lengths = F.pad(lengths, (0, most_documents - len(lengths)))
    by_rank = collectives.gather(lengths[None])  # collective, [P, the most documents]
    of_ranks = [by_rank[owner, :number] for owner, number in enumerate(facts[:, 1].tolist())]
    rows = F.pad(rows, (0, 0, 0, max(1, most_rows) - len(rows)))  # of equal shape on all ranks
    order = [(rank - step) % ranks for step in range(ranks)]
    lengths = torch.cat([of_ranks[owner] for owner in order])  # [G]
    if scorer.goes_round(rows):
        each = [_starts(x) for x in of_ranks]
        scores = _Ring.apply(  # type: ignore[no-untyped-call]
            sides.text, rows, sides.token_mask, each, sizes, scorer
        )  # collective
        if reduction == "sum":
            scores = scores * counts[:, None]
    else:
        parts = collectives.gather_with_gradient(rows).split(len(rows))  # collective
        gathered = torch.cat([parts[owner][: sizes[owner]] for owner in order])
        masks = sides.token_mask, _starts(lengths)
        scores = maxsim(sides.text, gathered, *masks, reduction, **scorer.of_op)
    return with_empty(scores, lengths, empty)


def with_empty(scores: Tensor, lengths: Tensor, empty: float) -> Tensor:
    """The scores [Q, C] with `empty` for documents without valid tokens, by lengths [C] or
    [Q, C]."""
    return scores.masked_fill(lengths == 0, empty) if empty else scores


def _checked_together(
    arguments: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    reduction: str,
    scorer: Scorer,
) -> tuple[Sides, Tensor, Tensor]:
    """The sides, the tokens of each query, and of every rank its rows, documents and three facts
    that are compared: int64 [P, 5]. Collective, CPU-GPU sync."""
    mistake, checked = None, None
    own = [0] * 5
    try:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is unknown; it must be sum or mean")
        checked = accepted_maxsim(*arguments, scorer.backend, scorer.scratch_bytes)
        if checked[0].own:
            raise ValueError("documents of each query are not gathered: give them to maxsim")
        image, mask = checked[0].image, checked[0].image_mask
        rows = image[..., 0].numel()
        if mask is not None and image.ndim == 3:
            rows = int(mask.sum())  # CPU-GPU sync
        kind = image.shape[-1], DTYPES.index(image.dtype)
        # The bits of the sum, by which equal features are recognised; 0 if it is not finite.
        total = image.detach().sum(dtype=torch.float32)
        bits = total.view(torch.int32).where(total.isfinite(), 0)
        own = [rows, checked[0].sizes()[0], *kind, int(bits)]  # CPU-GPU sync
    except (TypeError, ValueError, RuntimeError) as error:
        mistake = error
    # NCCL sends from GPUs alone, and what is wrong may be where the inputs are.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    facts = collectives.agreed(torch.tensor(own, device=device), mistake).cpu()  # collective
    assert checked is not None, "a mistake has been raised"
    dtypes = list(map(DTYPES.__getitem__, facts[:, 3].tolist()))
    for name, values in (("D", facts[:, 2].tolist()), ("dtype", dtypes)):
        if len(set(values)) > 1:
            named = ", ".join(map(str, values))
            raise ValueError(f"the ranks' documents must agree in {name}, found {named}")
    if facts[0, 4] and (facts == facts[0]).all():
        raise ValueError(
            f"the documents of all {len(facts)} ranks are the same: give each rank its own, not "
            "yet gathered (gather_across_devices=False)"
        )
    return *checked, facts


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
    def forward(ctx, queries, rows, query_mask, starts, sizes, scorer):
        ctx.save_for_backward(queries, rows, query_mask)
        ctx.others = starts, sizes, scorer
        scores = []
        for owner, chunk in _passed(rows):  # collective
            arguments = queries, chunk[: sizes[owner]], query_mask, starts[owner], "mean"
            scores.append(maxsim(*arguments, **scorer.of_op))
        return torch.cat(scores, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        queries, rows, query_mask = ctx.saved_tensors
        starts, sizes, scorer = ctx.others
        wanted, wide = Wanted(*ctx.needs_input_grad[1::-1]), collectives.accumulated(rows.dtype)
        of_queries, of_rows, column = None, ReturnedGradient(None), 0
        for owner, chunk in _passed(rows):  # collective
            columns = slice(column, column := column + len(starts[owner]) - 1)
            sides = Sides(chunk[: sizes[owner]], queries, query_mask, starts[owner], True)
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
        row_gradient = None
        if wanted.text:
            of_queries = of_queries.to(queries.dtype)
        if wanted.image:
            row_gradient = of_rows.sum().to(rows.dtype)  # collective
        return of_queries, row_gradient, *(None,) * 4


def _passed(rows):
    return passed(rows.clone(memory_format=torch.contiguous_format), None)  # it is overwritten
