"""Held-out retrieval and pointing: `python -m ds_cmli.evaluate --checkpoint RUN_FOLDER --data demo`.

Recall at 1, 5 and 10, from image to text and back, by three scores: the cosine of the class tokens (global), CMLI,
and the sum of both logits (combined). Pointing, on scenes: the share of caption tokens whose best patch lies in
their own picture.
Shapes: n pairs, c texts held at a time, B pairs a step, N patches, M text positions, D embedding dimension.
"""

import sys

# Run by its path, this file's folder comes first on sys.path and would hide packages named like our modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402

CHUNK = 1024  # pictures whose patch features are held at a time
POINTING_CHANCE = 0.25  # a scene's pictures each fill a quarter


def evaluate(
    objective: Any, dataset: Any, data: Any, batch_size: int, device: Any, heartbeat: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """All metrics of one split, the same on every rank. Collective.

    `<score>/<way>_r<k>`, `chance/<way>_r<k>`, `pointing`, and what they were taken over: `pairs`, `pictures`, and
    where pairs could not be used `left_out` and `left_out_first`, names of some.

    Each rank decodes and scores its share of the pictures against all captions; no token tensor of the whole split is
    ever held. `heartbeat` is called with every batch: a sign of life for whoever watches over the ranks.

    Raises:
        UserError: on every rank, where no pair can be used.
    """
    import torch

    from ds_cmli.cmli import cmli_scores
    from ds_cmli.cmli.loss import l2_normalize
    from ds_cmli.common.errors import UserError
    from ds_cmli.data import eval_loader
    from ds_cmli.data.bad import NO_TOKEN, told
    from ds_cmli.data.held_out import HeldOut
    from ds_cmli.data.retrieval import chance, recall
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.losses.functions import upcast

    student, held_out = objective.student, HeldOut(dataset)
    was_training = objective.training
    objective.eval()
    rank, world_size = distributed.rank(), distributed.world_size()
    own = list(range(rank, held_out.images, world_size))
    # Filled up, so that all ranks take as many steps.
    share = [*own, *[None] * (-(-held_out.images // world_size) - len(own))]
    blocks: list[torch.Tensor] = []
    hits = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(share), CHUNK):
            cls, patches = [], []
            pictures = held_out.pictures(share[start : start + CHUNK])
            for batch in eval_loader(pictures, data, batch_size, 0, 0, 1):
                heartbeat()
                batch = batch.to(device)
                image_cls, features = student.encode_image(batch.image)
                cls.append(upcast(l2_normalize(image_cls)))  # [B, H]
                patches.append(l2_normalize(student.projection(features)))  # [B, N, D]
                if data.has_places:
                    hits += pointing_hits(student, batch, patches[-1])
            columns, usable = [], []
            for batch in eval_loader(held_out.captions(), data, batch_size, 0, 0, 1):
                heartbeat()
                usable.append(batch.token_mask.any(1))
                batch = batch.to(device)
                text_cls, tokens = student.encode_text(batch.input_ids, batch.attention_mask)
                text_cls, tokens = (
                    upcast(l2_normalize(text_cls)),
                    l2_normalize(student.projection(tokens)),
                )  # [B, H], [B, M, D]
                by_global = torch.cat([c @ text_cls.t() for c in cls])  # [c, B]
                pairs = [cmli_scores(p, tokens, batch.token_mask) for p in patches]
                i2t, t2i = (torch.cat(side) for side in zip(*pairs, strict=True))  # [c, B] each
                columns.append(torch.stack([by_global, i2t, t2i]).float().cpu())  # CPU-GPU sync
            blocks.append(torch.cat(columns, 2))  # [3, c, n]
    objective.train(was_training)

    broken: dict[int, Any] = {}
    for found in distributed.gather_objects(held_out.broken):  # collective
        broken |= found
    with_token = torch.cat(usable)  # [n]
    whole = torch.tensor([number not in broken for number in range(held_out.images)])  # [m]
    keep = with_token & whole[held_out.image_of]
    image_of = held_out.image_of[keep]
    left_out = [*held_out.at_load, *broken.values()]
    left_out += [(held_out.file(caption), NO_TOKEN) for caption in (~with_token).nonzero().flatten().tolist()]
    if not len(image_of):
        raise UserError(f"no pair of the validation set can be used, for instance {', '.join(told(left_out))}")
    numbers = torch.tensor(own, dtype=torch.int64)  # [r]
    scores = torch.cat(blocks, 1)[:, : len(own)]  # [3, r, n]
    if not keep.all():
        rows = torch.isin(numbers, image_of)
        numbers, scores = numbers[rows], scores[:, rows][:, :, keep]
    by_global, i2t, t2i = scores

    out: dict[str, Any] = {"pairs": len(image_of), "pictures": len(image_of.unique())}
    if left_out:
        out["left_out"] = len(keep) - len(image_of) + len(held_out.at_load)
        out["left_out_first"] = told(left_out)
    out |= chance(image_of)
    out |= {f"global/{k}": v for k, v in recall(by_global, by_global, numbers, image_of).items()}
    scales = objective.score_scales()  # collective under ZeRO-3
    if "cmli" in scales:
        out |= {f"cmli/{k}": v for k, v in recall(i2t, t2i, numbers, image_of).items()}
        # Logits add where both losses set a temperature; otherwise CMLI alone stands for "combined".
        base, scale = by_global * scales["global"] if "global" in scales else 0, scales["cmli"]
        combined = recall(base + scale * i2t, base + scale * t2i, numbers, image_of)
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
    match = match_patches(student.projection(tokens), patches)  # [B, M]
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

    objective, _ = build_models(config, data.vocab_size, pretrained=False)
    load_weights(Path(checkpoint), objective)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective.to(device)
    metrics: dict[str, Any] = {}
    for line in data.notices:
        click.echo(line)
    for split, dataset in data.evals.items():
        found = evaluate(objective, dataset, data, batch_size, device)
        metrics |= {f"eval/{split}/{name}": value for name, value in found.items()}
        click.echo(summary(split, found))
    if json_file:
        Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")
    distributed.shutdown()


def best(before: dict[str, Any], split: str, found: dict[str, Any], step: int) -> dict[str, Any]:
    """The best result of a run so far: `before`, or this one where it is of the same metric and higher."""
    score = next(s for s in ("combined", "cmli", "global") if f"{s}/i2t_r1" in found)
    metric, value = f"{split} {score} R@1", (found[f"{score}/i2t_r1"] + found[f"{score}/t2i_r1"]) / 2
    if before.get("metric", metric) != metric or value <= before.get("value", -1.0):
        return before
    chance = (found["chance/i2t_r1"] + found["chance/t2i_r1"]) / 2
    return {"metric": metric, "value": value, "step": step, "pairs": found["pairs"], "chance": chance}


def summary(split: str, found: dict[str, Any]) -> str:
    """The result of one split as lines of a table: what it was taken over, each score, chance, and pointing."""
    from ds_cmli.data.retrieval import RECALLS

    out = f", {found['left_out']} left out: {', '.join(found['left_out_first'])}" if "left_out" in found else ""
    parts = [f"  {split:>6} {found['pairs']} pairs, {found['pictures']} pictures{out}"]
    for score in ("combined", "cmli", "global", "chance"):
        if f"{score}/i2t_r1" in found:
            values = "  ".join(
                f"R@{k} {found[f'{score}/i2t_r{k}']:.3f}/{found[f'{score}/t2i_r{k}']:.3f}" for k in RECALLS
            )
            parts.append(f"  {split:>6} {score:<8} i2t/t2i  {values}")
    if "pointing" in found:
        parts.append(f"  {split:>6} pointing {found['pointing']:.3f} (chance {POINTING_CHANCE})")
    return "\n".join(parts)


def main() -> None:
    from ds_cmli.common.cli import run_command

    run_command(command)


if __name__ == "__main__":
    main()
