"""timm's models that return a feature map, whose positions are patches: Swin, ConvNeXt, ResNet.

Shapes: B images, S image side in pixels, N = rows * columns of the map, H channels of the map.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_cmli.models import timm_model
from ds_cmli.models.backbone import ImageBackbone, ImageRequest, with_mean

# Blocks after those of the patches, in which only a class token attends (CaiT, XCiT): no feature
# map comes from them.
CLASS_BLOCKS = ("cls_attn_blocks", "blocks_token_only")


class TimmGrid(ImageBackbone):
    model: Any  # timm's

    @classmethod
    def takes(cls, request: ImageRequest) -> bool:
        return hasattr(timm_model.sketch(request), "forward_intermediates")

    def __init__(self, request: ImageRequest):
        super().__init__()
        created = timm_model.create(request)
        model = self.model = created.model
        if not hasattr(model, "forward_intermediates"):
            raise request.unfit("it gives no feature map: choose another model of timm")
        if request.average > 1:
            raise request.unfit("it is no plain stack of blocks: leave out teacher.average_blocks")
        stages = list(map(dict, model.feature_info))
        plain = len({(stage["num_chs"], stage["reduction"]) for stage in stages}) == 1
        if request.layers is not None and not plain:
            raise request.unfit(
                f"its {len(stages)} stages are no plain stack, of which the first student.layers = "
                f"{request.layers} could be kept: give student.layers=null, and it is kept whole"
            )
        if request.block is None and not plain:
            last = len(stages) - 1
        else:
            last = timm_model.last_block(request, len(stages), "block" if plain else "stage")
        stage = stages[last]
        timm_model.check_image_size(request, (stage["reduction"],) * 2)
        timm_model.cut(model, last)
        if any(hasattr(model, name) for name in CLASS_BLOCKS):
            for name in ("cls_token", *CLASS_BLOCKS):
                setattr(model, name, None)
        model.forward = partial(
            model.forward_intermediates,
            indices=[last],
            norm=False,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        created.account()
        timm_model.tell(request, model, "the mean of its feature map")
        self.stages = [stage["module"] for stage in stages[: last + 1]]
        self.width, side = stage["num_chs"], request.image_size // stage["reduction"]
        self.grid, self.prefix = (side, side), 1
        self.mean, self.std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]

    @property
    def blocks(self) -> list[nn.Module]:
        return blocks_of_stages(self.model, self.stages)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.is_cuda:
            # cuDNN's convolutions on tensor cores take channels last, and then give that. The
            # weights, parts of ZeRO's flat buffers, stay as they are: each is copied when used.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        [x] = self.model(pixels)  # [B, H, rows, columns]
        return with_mean(x.flatten(2).transpose(1, 2))


def blocks_of_stages(model: nn.Module, stages: list[str]) -> list[nn.Module]:
    """The blocks of a timm model's stages, by their names in its `feature_info`."""
    blocks: list[nn.Module] = []
    for number, name in enumerate(stages):
        stage = model.get_submodule(name)
        inside = getattr(stage, "blocks", stage)
        if isinstance(inside, nn.Sequential | nn.ModuleList):
            blocks += list(inside)
        elif next(stage.parameters(), None) is not None:
            above = model.get_submodule(name.rpartition(".")[0])
            of_a_stack = isinstance(above, nn.Sequential | nn.ModuleList)
            # Otherwise it is the stem, whose input, the pixels, needs no gradient.
            if of_a_stack or number > 0:
                blocks.append(stage)
    return blocks
