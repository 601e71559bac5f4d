"""Builds timm's models from a configuration and loads their weights; mistakes are `UserError`.

Shapes: B images, S image side in pixels.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    unset_fake_temporarily,
)
from torch.nn.modules.batchnorm import _BatchNorm

from ds_cmli.common.errors import UserError
from ds_cmli.common.patches import patched
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.models.backbone import DEFAULT_LAYERS, ImageRequest
from ds_cmli.models.weights import (
    Shape,
    WeightsSource,
    account,
    check_finite,
    check_room,
    count,
    say,
    weights_file,
)

OF_HUB = ("hf-hub:", "hf_hub:")  # the prefixes of models whose description is on the hub
WEIGHTS_SAY = "the setting of the weights says it"
NOT_USED = "head, pooling and final norm are not used"
FIXED = "class token, colours and the grid of patches are fixed"
# The arguments of timm that `overrides` cannot change, and the reason in the error message.
DECIDED = {
    "img_size": "data.image_size says it",
    "checkpoint_path": WEIGHTS_SAY,
    "pretrained": WEIGHTS_SAY,
    "pretrained_strict": WEIGHTS_SAY,
    "num_classes": NOT_USED,
    "global_pool": NOT_USED,
    "pool_include_prefix": NOT_USED,
    "fc_norm": NOT_USED,
    "final_norm": NOT_USED,
    "drop_rate": NOT_USED,
    "head_drop_rate": NOT_USED,
    "class_token": FIXED,
    "in_chans": FIXED,
    "dynamic_img_pad": FIXED,
    "dynamic_img_size": FIXED,
    "strict_img_size": FIXED,
    "patch_drop_rate": "every patch is needed",
}
# These have no effect on a frozen teacher.
FROZEN = ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


@dataclass
class Given:
    """The shapes of the loaded weights by key."""

    shapes: dict[str, Shape]  # after timm's filter: keys and shapes as the model has them
    before: dict[str, Shape]  # before timm's filter: keys and shapes as the file has them


@dataclass
class Created:
    model: Any  # timm's
    source: WeightsSource
    given: Given | None  # None: random weights

    def account(self) -> None:
        """Report missing and unused keys; called after the unused layers are cut off.

        Raises:
            UserError: as `weights.account` does.
        """
        if self.given is not None:
            account(self.source, self.model, self.given.shapes, self.given.before)


@lru_cache
def _sketch(model: str, overrides: str) -> Any:
    with torch.device("meta"), loading(hub=model.startswith(OF_HUB)):
        return timm.create_model(model, **json.loads(overrides))


def sketch(request: ImageRequest) -> Any:
    """The model on the meta device; None if it cannot be built, in which case `create` says why."""
    try:
        return _sketch(request.model, json.dumps(request.overrides, sort_keys=True))
    except Exception:
        return None


def create(request: ImageRequest, sized: bool = True) -> Created:
    """Create a timm model with its weights and without classifier.

    A weights file must have the model's own layout; timm resamples position embeddings of another
    image size, unless the model keeps its own, not `sized`.

    Raises:
        UserError: the model or its weights cannot be used.
    """
    source, weights = request.source, request.weights
    _check_overrides(request.prefix, request.overrides)
    check_room(f"{request.prefix}model", request.model, count(sketch(request)))
    file = None
    if weights not in ("random", "hub"):
        file = weights_file(source, f"a weights file of {request.model}")
    given = None if weights == "random" else Given({}, {})
    options = {"pretrained": given is not None, "num_classes": 0, **request.overrides}
    build = partial(timm.create_model, request.model, **options)
    try:
        with (
            loading(hub=weights == "hub" or request.model.startswith(OF_HUB)),
            _watched(file, given),
        ):
            try:
                model = _built(partial(build, img_size=request.image_size) if sized else build)
            except TypeError as error:
                if "'img_size'" not in str(error):
                    raise
                model = _built(build)  # a model without `img_size` takes images of any size
    except Exception as error:
        place = f"{source.setting} is {weights!r}, the model {request.model!r}"
        if request.overrides:
            place += f" with {request.prefix}overrides {dict(request.overrides)}"
        raise UserError(f"{place}: cannot build it: {reason(error)}") from None
    if given is not None:
        check_finite(source, model)
    return Created(model, source, given)


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    """Build the model; on meta if it computes its sizes with tensors (RegNet), which are fake."""
    try:
        return build()
    except (DynamicOutputShapeException, UnsupportedFakeTensorException):
        with unset_fake_temporarily(), torch.device("meta"):
            model = build()
        return model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def _watched(file: str | None, given: Given | None) -> AbstractContextManager[None]:
    """A context in which timm's function that loads weights records in `given` what it loads.

    Which filter rewrites a file's keys is known to the function that builds a variant alone. `file`
    is read here with `weights_only`, because earlier versions of timm run the code in a pickle.
    """

    def load(
        load_pretrained: Callable,
        model: nn.Module,
        pretrained_cfg: dict[str, object] | None = None,
        filter_fn: Callable | None = None,
        **arguments: object,
    ) -> None:
        assert given is not None
        if file is not None:
            pretrained_cfg = {**(pretrained_cfg or {}), "source": "", "state_dict": _read(file)}

        def note(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
            given.before.update(_shapes(state))
            if filter_fn is not None:
                try:
                    state = filter_fn(state, model)
                except TypeError:  # some filters take the state alone; timm falls back so too
                    state = filter_fn(state)
            given.shapes.update(_shapes(state))
            return state

        load_pretrained(model, pretrained_cfg=pretrained_cfg, filter_fn=note, **arguments)

    return patched("timm: loaded keys", lambda load_pretrained: partial(load, load_pretrained))


def _read(file: str) -> dict[str, Tensor]:
    try:
        state = timm.models.load_state_dict(file, weights_only=True)
    except (AttributeError, EOFError, LookupError):  # of other pickles, and of lists
        state = {}
    if not _shapes(state):
        raise ValueError(
            "no tensors by name are in it: give a .safetensors file, or a state dict that "
            "torch.save wrote"
        )
    return state


def _shapes(state: Mapping[str, object]) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _check_overrides(prefix: str, overrides: Mapping[str, object]) -> None:
    wiring = {"features_only", "out_indices", "pruned"}
    for function in (timm.create_model, timm.models.build_model_with_cfg):
        wiring |= inspect.signature(function).parameters.keys()
    for name, value in overrides.items():
        why = DECIDED.get(name)
        if why is None and name in wiring:
            why = "it is no size of the model"
        if why is None and prefix == "teacher." and name in FROZEN:
            why = "the teacher is not trained"
        if why is None and value is None:
            why = "timm ignores None: leave it out"
        if why is not None:
            given = f"{prefix}overrides has {name!r} = {value!r}"
            raise UserError(f"{given}, which has no effect or cannot be: {why}")


def last_block(request: ImageRequest, depth: int, unit: str) -> int:
    """Index of the last of `depth` blocks (or stages) that is used.

    Raises:
        UserError: there is no such block.
    """
    if request.block is not None:
        if not -depth <= request.block < depth:
            raise UserError(
                f"teacher.block is {request.block}: {request.model!r} has {unit}s 0 to "
                f"{depth - 1}; -1 is the last"
            )
        return request.block % depth
    if request.layers is None:
        return min(DEFAULT_LAYERS, depth) - 1
    if request.layers > depth:
        raise UserError(f"student.layers is {request.layers}: {request.name} has only {depth}")
    return request.layers - 1


def check_image_size(request: ImageRequest, patch: tuple[int, int]) -> None:
    """Raise `UserError` unless the image side is a multiple of a patch's height and width.

    timm would otherwise crop or pad the image.
    """
    for side in patch:
        if request.image_size % side:
            near = max(1, round(request.image_size / side)) * side
            raise UserError(
                f"data.image_size is {request.image_size}: no multiple of the {side} pixels of a "
                f"patch of {request.name}; give for instance {near}"
            )


def cut(model: Any, last: int) -> None:
    """Remove all blocks (or stages) after `last`, the final norm, the pooling and the head."""
    model.prune_intermediate_layers([last], prune_norm=True, prune_head=True)
    # The pretrained final norm fits only the last block; student and teacher have their own norms.
    for name in ("norm", "fc_norm", "head", "head_dist"):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())


def tell(request: ImageRequest, model: nn.Module, pooling: str | None) -> None:
    """Print what the user may not expect; `pooling` stands for a missing class token."""
    if pooling is not None:
        say(f"{request.name} has no class token: {pooling} stands for it", model)
    if request.block is None and any(isinstance(module, _BatchNorm) for module in model.modules()):
        say(
            f"{request.name}: its BatchNorm layers keep their statistics, those of a batch differ "
            "between ranks",
            model,
        )
