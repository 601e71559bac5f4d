"""The towers of a CLIP or SigLIP of transformers, which start a student with their joint space.

The class features of both towers are the source's embeddings. Patches and tokens begin in the same
space: through the map that the source applies to the class features, as parameters of their own.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H width of a tower, E
width of the joint space.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

from ds_cmli.config.schema import StudentConfig
from ds_cmli.errors import blame
from ds_cmli.files import JsonObject
from ds_cmli.models.encoders import TextEncoder
from ds_cmli.pretrained import loading


class Start(NamedTuple):
    """What the losses over pairs start with."""

    log_scale: float  # ln(1/temperature)
    bias: float | None  # of a sigmoid loss; None: the source was not trained with one

    @classmethod
    def of(cls, model: Any) -> "Start":
        bias = getattr(model, "logit_bias", None)
        return cls(model.logit_scale.item(), None if bias is None else bias.item())


class ValuePath(nn.Module):
    """What an attention pooling gives where it attends to one patch alone."""

    def __init__(self, value: nn.Module, out: nn.Module, norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.value, self.out, self.norm, self.mlp = map(copied, (value, out, norm, mlp))

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, H] -> [B, N, H]."""
        x = self.out(self.value(patches))
        return x + self.mlp(self.norm(x))


def copied(part: nn.Module | Tensor | None) -> nn.Module:
    """A module, or a projection [H, E], as one with parameters of its own and for vectors."""
    if part is None:
        return nn.Identity()
    if isinstance(part, Tensor):
        return layer(part.mT, None)
    if isinstance(part, LayerNorm2d):
        norm = nn.LayerNorm(part.normalized_shape, part.eps)
        norm.load_state_dict(part.state_dict())
        return norm
    # `deepcopy` alone gives copies of fake tensors storages on another device.
    memo: dict[int, Any] = {id(x): nn.Parameter(x.detach().clone()) for x in part.parameters()}
    return deepcopy(part, memo | {id(x): x.clone() for x in part.buffers()})


def layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    out.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return out


class DualImage(nn.Module):
    """The image tower, up to its last norm; SigLIP's pooled features are the class token."""

    model: Any

    def __init__(self, dual: PreTrainedModel, own: JsonObject, image_size: int):
        """`dual`: the model of transformers, `own`: `StudentConfig.source_config`."""
        super().__init__()
        self.model = dual.get_submodule("vision_model")
        config: Any = self.model.config
        self.width, side = config.hidden_size, image_size // config.patch_size
        self.grid, self.mean, self.std = (side, side), own["mean"], own["std"]
        self.pools = hasattr(self.model, "head")
        if self.pools:
            self.class_head: nn.Module = nn.Identity()
            pooling = self.model.head
            pool = pooling.attention
            value = layer(pool.in_proj_weight.chunk(3)[2], pool.in_proj_bias.chunk(3)[2])
            out = layer(pool.out_proj.weight, pool.out_proj.bias)
            self.token_head: nn.Module = ValuePath(value, out, pooling.layernorm, pooling.mlp)
        else:
            self.class_head = dual.get_submodule("visual_projection")
            self.token_head = copied(self.class_head)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.encoder.layers)

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
        self.width, self.vocab_size = self.model.config.hidden_size, self.model.config.vocab_size
        if hasattr(dual, "text_projection"):
            self.class_head = dual.get_submodule("text_projection")
        else:
            self.class_head, self.model.head = self.model.head, nn.Identity()
        self.token_head = copied(self.class_head)

    def joint(self, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_head(cls), self.token_head(tokens)


def build(
    config: StudentConfig, image_size: int, pretrained: bool
) -> tuple[DualImage, DualText, Start | None]:
    """Both towers of the source, and what the losses start with; None for random weights.

    `image_size`: S; `pretrained`: whether to load the source's weights.
    """
    fields, start = deepcopy(config.source_config), None  # which transformers changes
    with loading(hub=False):
        sizes = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    if pretrained and config.source:
        folder = Path(config.source).expanduser()
        source = str(folder) if folder.exists() else config.source
        what = f"student.source is {config.source!r}: its weights cannot be loaded"
        with loading(hub=not folder.exists()), blame(what):
            dual, keys = AutoModel.from_pretrained(
                source,
                config=sizes,
                local_files_only=folder.exists(),
                dtype=torch.float32,
                weights_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            if missing := sorted(keys["missing_keys"]):
                raise ValueError(f"{len(missing)} are missing, such as {missing[0]}")
        dual.train()
        start = Start.of(dual)
    else:
        dual = AutoModel.from_config(sizes, dtype=torch.float32)
    return DualImage(dual, config.source_config, image_size), DualText(dual), start
