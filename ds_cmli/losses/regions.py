"""FG-CLIP's regional loss: boxes of pictures against their phrases (Xie et al., 2025).

After arXiv 2505.05071, with all boxes of a micro-batch: a box's mean patch and its phrase's class
token, both projected, in a contrast both ways.

Shapes: B images of this rank with R regions each, F = B * R, P ranks, N patches, D embedding
dimension.
"""

import torch
from torch import Tensor

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import contrastive_loss, unit_rows, upcast
from ds_cmli.cmli.inputs import full_precision
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.config.schema import LossConfig
from ds_cmli.data.aspect import overlaps
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.base import Loss, log_scale
from ds_cmli.losses.inputs import LossInputs


class Regions(Loss):
    init_temperature = 0.07

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(self.init_temperature)

    def forward(self, inputs: LossInputs) -> Tensor:
        regions, features, student = inputs.batch.regions, inputs.features, inputs.student
        assert regions is not None and features.phrase_cls is not None, "the schema requires boxes"
        grid = inputs.batch.grid
        if grid is None:
            # Not from a list, which would be a CPU-GPU sync.
            sides = map(regions.phrase_id.new_full, [(1, 1)] * 2, student.grid)
            grid = torch.cat([*sides], 1)
        weights = overlaps(regions.boxes, grid, student.grid[0] * student.grid[1])
        if features.places is not None:  # of the patches that were kept
            places = features.places[:, None].expand(-1, weights.shape[1], -1)
            weights = weights.gather(2, places)
        present = regions.present & (weights.sum(2) > 0).flatten()  # [F]
        patches = upcast(l2_normalize(inputs.projected_patches))
        phrases = unit_rows(student.projection(features.phrase_cls))
        phrases = collectives.gather_with_gradient(phrases)  # [P * F, D], collective
        all_present = collectives.gather(present[:, None])[:, 0]  # collective
        all_ids = collectives.gather(regions.phrase_id[:, None])[:, 0]  # collective
        with full_precision(patches.device):
            pooled = unit_rows(weights.to(patches.dtype) @ patches).flatten(0, 1)  # [F, D]
            cosines = pooled @ phrases.t()  # [F, P * F]
        first = distributed.rank() * len(pooled)
        ignored = regions.phrase_id[:, None] == all_ids
        ignored |= ~(present[:, None] & all_present)
        ignored.diagonal(first).fill_(False)
        # A region that is absent is compared with itself alone, which gives 0.
        loss = contrastive_loss(
            cosines,
            cosines,
            self.logit_scale,
            first,
            column_logsumexp=collectives.column_logsumexp,
            ignore=ignored,
        )  # collective
        return loss * len(all_present) / all_present.sum().clamp(min=1)
