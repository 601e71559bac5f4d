"""Held-out retrieval and pointing: `python -m ds_cmli.evaluate --checkpoint RUN_FOLDER --data demo`.

Recall at 1, 5 and 10, from image to text and back, by three scores: the cosine of the class tokens (global), CMLI,
and the sum of both logits (combined). Pointing, on scenes: the share of caption tokens whose best patch lies in
their own picture.
Shapes: n pairs, c texts held at a time, B pairs a step, N patches, M text positions, D matching space.
"""

import sys

# Run by its path, this file's folder comes first on sys.path and would hide packages named like our modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402

CHUNK = 2048  # texts whose token features are held at a time
RECALLS = (1, 5, 10)


def recall(rows: Any, own: Any, positions: Any) -> dict[str, float]:
    """Recall of the matching text among a rank's images' rows, and of the matching image among all images.

    Args:
        rows: fp32 [r, n], scores of this rank's r images against all n texts (i2t), and the same for t2i, stacked:
            [2, r, n].
        own: int64 [r], each row's image index, which is its text's column.
        positions: bool [r], False for rows that only fill up a rank's share.

    Returns:
        `i2t_r1` ... `t2i_r10`, fractions of all n pairs, the same on every rank. A pair counts as lost to every
        competitor that does not score strictly less: constant or NaN scores retrieve nothing. Collective.
    """
    import torch

    from ds_cmli.distributed.process_group import sum_over_ranks

    i2t, t2i = rows
    n = i2t.shape[1]
    r = torch.arange(len(own))
    hits = torch.zeros(2, len(RECALLS), dtype=torch.float64)
    # i2t: the competitors stand in the row itself.
    beaten = (i2t < i2t[r, own][:, None]).sum(1)  # [r]
    hits[0] = torch.stack([((n - 1 - beaten) < k)[positions].sum() for k in RECALLS])
    # t2i: the competitors stand in a column, spread over ranks.
    diagonal = torch.zeros(n).index_put_((own[positions],), t2i[r, own][positions])
    diagonal = sum_over_ranks(diagonal)  # collective
    lower = (t2i[positions] < diagonal).sum(0)  # [n]
    lower = sum_over_ranks(lower)  # collective
    hits[1] = torch.stack([((n - 1 - lower) < k).sum() for k in RECALLS])
    hits[0] = sum_over_ranks(hits[0].clone())  # collective
    hits /= n
    return {f"{way}_r{k}": hits[w, i].item() for w, way in enumerate(("i2t", "t2i")) for i, k in enumerate(RECALLS)}


def evaluate(
    objective: Any, dataset: Any, data: Any, batch_size: int, device: Any, beat: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """All metrics of one split, named `<score>/<way>_r<k>` and `pointing`, the same on every rank. Collective.

    `beat` is called with every batch: a sign of life for whoever watches over the ranks.

    Each rank scores its share of the images against all texts; no token tensor of the whole split is ever held.
    """
    import torch

    from ds_cmli.cmli import cmli_scores
    from ds_cmli.cmli.loss import unit
    from ds_cmli.data import eval_loader
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.losses.functions import widen

    student, n = objective.student, len(dataset)
    was_training = objective.training
    objective.eval()
    # A rank's share is filled up with repeated images so that all ranks take as many steps: count each once.
    rank, world_size = distributed.rank(), distributed.world_size()
    share = len(range(rank, n, world_size))
    images = torch.utils.data.Subset(dataset, [(rank + k * world_size) % n for k in range(-(-n // world_size))])
    blocks: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    hits = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, n, CHUNK):
            texts = torch.utils.data.Subset(dataset, range(start, min(n, start + CHUNK)))
            cls, tokens, masks = [], [], []
            for batch in eval_loader(texts, data, batch_size, 0, 0, 1):
                beat()
                batch = batch.to(device)
                text_cls, token = student.encode_text(batch.input_ids, batch.attention_mask)
                cls.append(widen(unit(text_cls)))  # [B, H]
                tokens.append(unit(student.g(token)))  # [B, M, D]
                masks.append(batch.token_mask)
            rows = []
            for batch in eval_loader(images, data, batch_size, 0, 0, 1):
                beat()
                batch = batch.to(device)
                image_cls, patches = student.encode_image(batch.image)
                patches = unit(student.g(patches))  # [B, N, D]
                image_cls = widen(unit(image_cls))
                by_global = torch.cat([image_cls @ c.t() for c in cls], 1)  # [B, c]
                pairs = [cmli_scores(patches, t, m) for t, m in zip(tokens, masks, strict=True)]
                i2t, t2i = (torch.cat(side, 1) for side in zip(*pairs, strict=True))  # [B, c] each
                rows.append(torch.stack([by_global, i2t, t2i]).float().cpu())  # CPU-GPU sync
                if start == 0:
                    if data.has_places:
                        batch.token_picture[max(0, share - sum(len(o) for o in own)) :] = -1
                        hits += pointing_hits(student, batch, patches)
                    own.append(batch.index.cpu())
            blocks.append(torch.cat(rows, 1))  # [3, r, c]
    objective.train(was_training)
    scores = torch.cat(blocks, 2)  # [3, r, n]
    indices = torch.cat(own)
    first = torch.arange(len(indices)) < share

    by_global, i2t, t2i = scores
    out = {f"global/{k}": v for k, v in recall((by_global, by_global), indices, first).items()}
    scales = objective.score_scales()  # collective under ZeRO-3
    if "cmli" in scales:
        out |= {f"cmli/{k}": v for k, v in recall((i2t, t2i), indices, first).items()}
        # Logits add where both losses set a temperature; otherwise CMLI alone stands for "combined".
        base, scale = by_global * scales["global"] if "global" in scales else 0, scales["cmli"]
        combined = recall((base + scale * i2t, base + scale * t2i), indices, first)
        out |= {f"combined/{k}": v for k, v in combined.items()}
    if data.has_places:
        hits = distributed.sum_over_ranks(hits)  # collective
        out["pointing"] = (hits[0] / hits[1].clamp(min=1)).item()
    return out


def pointing_hits(student: Any, batch: Any, patches: Any) -> Any:
    """[tokens whose best patch lies in their own picture, tokens that belong to a picture], of a batch's own pairs."""
    import torch
    import torch.nn.functional as F

    from ds_cmli.losses.functions import match_patches

    _, tokens = student.encode_text(batch.input_ids, batch.attention_mask)
    match = match_patches(student.g(tokens), patches)  # [B, M]
    cells = F.interpolate(batch.cell_picture[:, None].float(), size=student.grid, mode="nearest")
    found = cells.flatten(1).long().gather(1, match)  # [B, M], the picture in which the best patch lies
    counted = batch.token_picture >= 0
    hit = (found == batch.token_picture) & counted
    return torch.stack([hit.sum(), counted.sum()]).double().cpu()  # CPU-GPU sync


@click.command()
@click.option("--checkpoint", required=True, help="A run's output folder.")
@click.option("--data", "source", default=None, help="'demo' or a folder of pairs.  [default: the run's own]")
@click.option("--batch-size", default=50, show_default=True, help="Pairs a step.")
@click.option("--json", "json_file", default=None, help="Write the metrics to this file too.")
def command(checkpoint: str, source: str | None, batch_size: int, json_file: str | None) -> None:
    """Evaluate a trained student: retrieval on held-out pairs, and pointing on scenes."""
    import dataclasses

    from ds_cmli.common.cli import check_writable
    from ds_cmli.common.errors import UserError
    from ds_cmli.config.schema import Loss, load_config
    from ds_cmli.losses import LOSSES

    if json_file:
        check_writable(json_file)
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: give at least 1")
    config = load_config(Path(checkpoint) / "config.json", "--checkpoint")
    if source:
        config.data = dataclasses.replace(config.data, source=source)
    # Only the student is needed: without distillation losses no teacher is built.
    weights: dict[Loss, float] = {k: v for k, v in config.loss.weights.items() if not LOSSES[k].teacher}
    weights = weights or {"global": 1.0}
    config.loss = dataclasses.replace(config.loss, weights=weights)
    import torch

    from ds_cmli.data import build_data

    data = build_data(config.data, config.run.seed)
    if not data.evals:
        raise UserError(f"--data is {config.data.source!r}: it has no held-out split")

    from ds_cmli.checkpoint.save import load_weights
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.engine import build_models

    objective, _ = build_models(config, data.vocab_size)
    load_weights(Path(checkpoint), objective)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective.to(device)
    metrics: dict[str, float] = {}
    for split, dataset in data.evals.items():
        found = evaluate(objective, dataset, data, batch_size, device)
        metrics |= {f"eval/{split}/{name}": value for name, value in found.items()}
        click.echo(summary(split, found))
    if json_file:
        Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")
    distributed.shutdown()


def summary(split: str, found: dict[str, float]) -> str:
    """`seen: R@1 i2t 0.84 t2i 0.82 (combined), ... pointing 0.74`"""
    parts = []
    for score in ("combined", "cmli", "global"):
        if f"{score}/i2t_r1" in found:
            values = "  ".join(
                f"R@{k} {found[f'{score}/i2t_r{k}']:.3f}/{found[f'{score}/t2i_r{k}']:.3f}" for k in RECALLS
            )
            parts.append(f"  {split:>6} {score:<8} i2t/t2i  {values}")
    if "pointing" in found:
        parts.append(f"  {split:>6} pointing {found['pointing']:.3f}")
    return "\n".join(parts)


def main() -> None:
    from ds_cmli.common.cli import run_command

    run_command(command)


if __name__ == "__main__":
    main()
