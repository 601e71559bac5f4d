"""The towers of a CLIP or SigLIP of transformers, which start a student with their joint space.

The class features of both towers are the source's embeddings. Patches and tokens begin in the same
space: through the map that the source applies to the class features, as parameters of their own.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H width of a tower, E
width of the joint space.
"""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from ds_cmli.config.schema import StudentConfig
from ds_cmli.config.source import ModelSource, library_settings
from ds_cmli.errors import UserError
from ds_cmli.files import JsonObject
from ds_cmli.models.encoders import TextEncoder, layers_of
from ds_cmli.pretrained import loading

KEPT_POSITIONS = 20  # of texts, which are not stretched


class PairLossStart(NamedTuple):
    """The initial temperature of the losses over pairs, and what was done to the positions."""

    log_scale: float  # ln(1/temperature)
    bias: float | None  # of a sigmoid loss; None: the source was not trained with one
    resampled: str = ""  # the position embeddings that have another number than the source's

    @classmethod
    def of(cls, model: Any, resampled: str = "") -> "PairLossStart":
        bias = getattr(model, "logit_bias", None)
        bias = None if bias is None else bias.item()
        return cls(model.logit_scale.item(), bias, resampled)


class DualImage(nn.Module):
    """The image tower, up to its last norm; SigLIP's pooled features are the class token."""

    model: Any

    def __init__(self, dual: PreTrainedModel, source_config: JsonObject, image_size: int):
        super().__init__()
        self.model = dual.get_submodule("vision_model")
        self.blocks = list(self.model.encoder.layers)
        self.width = self.model.config.hidden_size
        side = image_size // self.model.config.patch_size
        self.grid = (side, side)
        self.mean = source_config["mean"]
        self.std = source_config["std"]
        self.pools = hasattr(self.model, "head")
        if self.pools:
            pooling = self.model.head
            attention = pooling.attention
            # The last third is the values'.
            *_, weight = attention.in_proj_weight.chunk(3)
            *_, bias = attention.in_proj_bias.chunk(3)
            out = linear(attention.out_proj.weight, attention.out_proj.bias)
            self.class_head: nn.Module = nn.Identity()
            self.token_head: nn.Module = ValuePath(
                linear(weight, bias), out, pooling.layernorm, pooling.mlp
            )
        else:
            self.class_head = dual.get_submodule("visual_projection")
            self.token_head = copied(self.class_head)

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.model(pixel_values=pixels)
        if self.pools:
            return torch.cat([out.pooler_output[:, None], out.last_hidden_state], 1)
        return self.model.post_layernorm(out.last_hidden_state)  # of patches too

    def joint(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_head(cls), self.token_head(patches)


class DualText(TextEncoder):
    """The text tower, up to its last norm, pooled at the last position that is attended to."""

    pooling = "last"

    def __init__(self, dual: PreTrainedModel):
        nn.Module.__init__(self)
        self.model = dual.get_submodule("text_model")
        self.blocks = layers_of(self.model)
        self.width = self.model.config.hidden_size
        self.vocab_size = self.model.config.vocab_size
        if hasattr(dual, "text_projection"):
            self.class_head = dual.get_submodule("text_projection")
        else:
            self.class_head = self.model.head
            self.model.head = nn.Identity()
        self.token_head = copied(self.class_head)

    def joint(self, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_head(cls), self.token_head(tokens)


class ValuePath(nn.Module):
    """Maps a patch as an attention pooling does where it attends to this patch alone."""

    def __init__(self, value: nn.Module, out: nn.Module, norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.value = copied(value)
        self.out = copied(out)
        self.norm = copied(norm)
        self.mlp = copied(mlp)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, H] -> [B, N, H]."""
        x = self.out(self.value(patches))
        return x + self.mlp(self.norm(x))


def copied(part: nn.Module | Tensor | None) -> nn.Module:
    """Return a module with parameters of its own for vectors; `part`: or a projection [H, E]."""
    if part is None:
        return nn.Identity()
    if isinstance(part, Tensor):
        return linear(part.mT, None)
    if isinstance(part, LayerNorm2d):
        norm = nn.LayerNorm(part.normalized_shape, part.eps)
        norm.load_state_dict(part.state_dict())
        return norm
    # `deepcopy` alone gives copies of fake tensors storages on another device.
    memo: dict[int, Any] = {id(buffer): buffer.clone() for buffer in part.buffers()}
    for parameter in part.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone())
    return deepcopy(part, memo)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def build_towers(
    config: StudentConfig, image_size: int, pretrained: bool
) -> tuple[DualImage, DualText, PairLossStart | None]:
    """Build both towers of the source, and return what the losses over pairs start with.

    `image_size`: S; `pretrained`: load the source's weights; False: random ones, and no start.
    """
    source_config = config.source_config
    with loading(hub=False):
        fields = deepcopy(source_config)  # which transformers changes
        library_config: Any = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    start = None
    if pretrained and config.source:
        source = ModelSource(config.source)
        dual = load_transformers(source)
        length = library_config.text_config.max_position_embeddings
        patch = library_config.vision_config.patch_size
        method = f"the first {KEPT_POSITIONS} are kept"
        resampled = resampled_positions(source, image_size, length, patch, method)
        if resampled:
            dual = with_positions_of(library_config, dual)
        dual.train()
        start = PairLossStart.of(dual, resampled)
    else:
        dual = AutoModel.from_config(library_config, dtype=torch.float32)
    return DualImage(dual, source_config, image_size), DualText(dual), start


def load_transformers(source: ModelSource) -> Any:
    with loading(not source.is_local, source.name), source.blame("its weights cannot be loaded"):
        dual, keys = AutoModel.from_pretrained(
            str(source.local_folder) if source.is_local else source.name,
            local_files_only=source.is_local,
            dtype=torch.float32,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if missing := sorted(keys["missing_keys"]):
            raise ValueError(f"{len(missing)} are missing, such as {missing[0]}")
    return dual


def resampled_positions(
    source: ModelSource, side: int, length: int, patch: int, text_method: str
) -> str:
    """Return the part of a line that says which positions are resampled, "" if none is.

    `side` of pictures and `length` of texts: the student's. Raises `UserError` if the pictures have
    no whole number of patches.
    """
    source_data: JsonObject = library_settings(source, {})["data"]
    changes = []
    if side != source_data["image_size"]:
        if side % patch:
            multiple = f"no multiple of the {patch} pixels of a patch"
            raise UserError(f"data.image_size is {side}: {multiple}")
        rows = side // patch
        source_rows = source_data["image_size"] // patch
        grids = f"{source_rows} x {source_rows} -> {rows} x {rows}"
        changes.append(f"pictures {grids} patches (bicubic)")
    if length != source_data["context_length"]:
        changes.append(f"texts {source_data['context_length']} -> {length} ({text_method})")
    return ", ".join(changes)


def with_positions_of(library_config: PreTrainedConfig, dual: Any) -> Any:
    """Return a model of this configuration with the weights of `dual`, its positions resampled."""
    resized: Any = AutoModel.from_config(library_config, dtype=torch.float32)
    weights = dual.state_dict()
    side = resized.config.vision_config.image_size
    wanted = resized.vision_model.embeddings.position_embedding.weight
    # The library takes the number of patches from the shape of what they are added to.
    table = dual.vision_model.embeddings.interpolate_pos_encoding(wanted[None], side, side)
    weights["vision_model.embeddings.position_embedding.weight"] = table[0]
    name = "text_model.embeddings.position_embedding.weight"
    length = resized.config.text_config.max_position_embeddings
    if length > len(weights[name]):
        weights[name] = stretched(weights[name], length)
    resized.load_state_dict(weights)
    return resized


def stretched(table: Tensor, length: int) -> Tensor:
    """Stretch the position embeddings of a text tower, [M, H] -> [length, H], length > M.

    As Long-CLIP (Zhang et al., 2024, arXiv 2403.15378): the first 20 positions, in which most
    captions of CLIP's training lie, are kept; the others are stretched linearly, and the end is
    extrapolated. So a text of up to 20 tokens has the features that it had.
    """
    kept = min(KEPT_POSITIONS, len(table) - 2)
    rate = (len(table) - kept) / (length - kept)
    places = kept + rate * torch.arange(length - kept, dtype=torch.float64)
    left = places.long().clamp(max=len(table) - 2)
    weight = (places - left).to(table.dtype)[:, None]
    return torch.cat([table[:kept], table[left].lerp(table[left + 1], weight)])
