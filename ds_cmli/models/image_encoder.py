"""Image encoders: timm's ViTs, which give all their tokens to student and teacher.

Shapes: B images, S image side in pixels, N patches.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.common.replaced import replaced
from ds_cmli.models.weights import Shape, Source, account, check_finite

# What `overrides` cannot change, and why.
DECIDED = {
    "img_size": "data.image_size says it",
    **dict.fromkeys(("checkpoint_path", "pretrained", "pretrained_strict"), "the setting of the weights says it"),
    **dict.fromkeys(
        ("num_classes", "global_pool", "pool_include_prefix", "fc_norm", "final_norm", "drop_rate", "head_drop_rate"),
        "head, pooling and final norm are not used",
    ),
    **dict.fromkeys(("class_token", "in_chans", "dynamic_img_pad", "dynamic_img_size", "strict_img_size"),
                    "class token, colours and the grid of patches are fixed"),
    "patch_drop_rate": "every patch is needed",
}  # fmt: skip
FROZEN = ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")  # nothing drops out of a teacher


@dataclass
class Given:
    """The weights that a model was loaded with: their shapes by key, as the model names them and as the file does."""

    shapes: dict[str, Shape]
    before: dict[str, Shape]


@dataclass
class ImageEncoder:
    vit: Any  # timm's
    source: Source
    given: Given | None  # None: random weights

    def account(self) -> None:
        """Once what is not used is cut off: print what became of the file's keys, or raise `UserError`."""
        if self.given is not None:
            account(self.source, self.vit, self.given.shapes, self.given.before)


def build_vit(
    prefix: str, model: str, weights: str, overrides: dict[str, Any], image_size: int, partial: bool
) -> ImageEncoder:
    """A timm ViT that returns all its tokens: uint8-normalisation constants in `pretrained_cfg`, no head.

    Args:
        prefix: of the settings' names, "student.image_" or "teacher.".
        weights: "random", "hub", or the path of a file in the model's own layout; position embeddings of another
            image size are resampled by timm.
        partial: keys may be missing in the weights.
    """
    source = Source(f"{prefix}weights", weights, partial)
    _check_overrides(prefix, overrides)
    file = weights if weights not in ("random", "hub") else None
    if file is not None and not Path(file).is_file():
        found = "a folder" if Path(file).is_dir() else "no such file"
        raise source.error(f"{found}; give 'hub', 'random' or a weights file of {model}")
    given = Given({}, {}) if weights != "random" else None
    try:
        with loading(hub=weights == "hub"), _watched(file, given):
            vit = timm.create_model(
                model, pretrained=given is not None, num_classes=0, img_size=image_size, **overrides
            )
    except Exception as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in overrides:
            known = inspect.signature(VisionTransformer).parameters.keys() - DECIDED.keys()
            near = "" if unknown[1] in known else f": {nearest(unknown[1], known)}"
            raise UserError(
                f"setting of {prefix}overrides is {unknown[1]!r}, which {model!r} does not take{near}"
            ) from None
        raise UserError(
            f"{source.setting} is {weights!r}, the model {model!r}: cannot build it: {reason(error)}"
        ) from None
    if not getattr(vit, "num_prefix_tokens", 0) or getattr(vit, "cls_token", None) is None:
        raise UserError(f"{prefix}model is {model!r}, which has no class token: choose a timm ViT that has one")
    if given is not None:
        check_finite(source, vit)
    _check_image_size(prefix, model, vit, image_size)
    return ImageEncoder(vit, source, given)


def _watched(file: str | None, given: Given | None) -> Any:
    """timm tells nobody which keys it loads: the function that does so is given a filter that notes them.

    A file is read here, as earlier versions of timm read pickles with the code in them.
    """
    from timm.models import _builder

    load_pretrained = _builder.load_pretrained

    def load(model: nn.Module, pretrained_cfg: Any = None, filter_fn: Callable | None = None, **arguments: Any) -> None:
        assert given is not None
        if file is not None:
            pretrained_cfg = {**pretrained_cfg, "source": "", "state_dict": _read(file)}

        def note(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
            given.before.update(_shapes(state))
            if filter_fn is not None:
                try:
                    state = filter_fn(state, model)
                except TypeError:  # timm has filters that take the state alone, and calls them so
                    state = filter_fn(state)
            given.shapes.update(_shapes(state))
            return state

        load_pretrained(model, pretrained_cfg=pretrained_cfg, filter_fn=note, **arguments)

    return replaced(_builder, "load_pretrained", load)


def _read(file: str) -> dict[str, Any]:
    try:
        state = timm.models.load_state_dict(file, weights_only=True)
    except (AttributeError, EOFError, LookupError):  # what torch says of other pickles, and timm of lists
        state = {}
    if not _shapes(state):
        raise ValueError(
            "no tensors by name are in it: give a .safetensors file, or a state dict that torch.save wrote"
        )
    return state


def _shapes(state: dict[str, Any]) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _check_overrides(prefix: str, overrides: dict[str, Any]) -> None:
    builders = (timm.create_model, timm.models.build_model_with_cfg)
    wiring = {name for function in builders for name in inspect.signature(function).parameters}
    wiring |= {"features_only", "out_indices", "pruned"}
    for name, value in overrides.items():
        why = DECIDED.get(name)
        if why is None and name in wiring:
            why = "it is no size of the model"
        if why is None and prefix == "teacher." and name in FROZEN:
            why = "the teacher is not trained"
        if why is None and value is None:
            why = "timm ignores None: leave it out"
        if why is not None:
            raise UserError(f"{prefix}overrides has {name!r} = {value!r}, which has no effect or cannot be: {why}")


def _check_image_size(prefix: str, model: str, vit: Any, image_size: int) -> None:
    ratio = getattr(getattr(vit, "patch_embed", None), "feat_ratio", None)
    patch_size = ratio() if ratio is not None else 1
    if image_size % patch_size:  # timm would leave out the rest of the picture
        near = max(1, round(image_size / patch_size)) * patch_size
        raise UserError(
            f"data.image_size is {image_size}: no multiple of the {patch_size} pixels of a patch of {prefix}model "
            f"{model!r}; give for instance {near}"
        )


class PixelNorm(nn.Module):
    """uint8 pixels -> the mean and standard deviation the encoder was trained with, in the encoder's precision."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: Any):
        super().__init__()
        for name in ("mean", "std"):
            # Integers, in 1/10000 of a pixel value: a float buffer would be rounded with the model's cast to 16 bit.
            value = torch.tensor(vit.pretrained_cfg[name])[:, None, None] * 255e4
            self.register_buffer(name, value.round().int(), persistent=False)

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        return ((image.float() * 1e4 - self.mean) / self.std).to(dtype)
