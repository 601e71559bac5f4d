"""The towers of a dual encoder that starts a student with its joint space: `student.source`.

The class features of both towers are the source's embeddings. Patches and tokens begin in the same
space: through the map that the source applies to the class features, as parameters of their own.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H width of a tower, E
width of the joint space.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from ds_cmli.common.json_text import JsonObject
from ds_cmli.common.pretrained import loading
from ds_cmli.config.schema import StudentConfig
from ds_cmli.models.encoders import TextEncoder
from ds_cmli.models.weights import building


class Start(NamedTuple):
    """What the losses over pairs start with."""

    log_scale: float  # ln(1/temperature)
    bias: float | None  # of a sigmoid loss; None: the source was not trained with one


class ValuePath(nn.Module):
    """What SigLIP's attention pooling gives where it attends to one patch alone."""

    def __init__(self, pooling: nn.Module, config: PreTrainedConfig):
        """`config`: of the image tower."""
        super().__init__()
        attention: Any = pooling.attention
        width = attention.embed_dim
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        norm, mlp = pooling.get_submodule("layernorm"), pooling.get_submodule("mlp")
        self.norm.load_state_dict(norm.state_dict())
        self.mlp = type(mlp)(config)
        self.mlp.load_state_dict(mlp.state_dict())
        with torch.no_grad():
            self.value.weight.copy_(attention.in_proj_weight[2 * width :])
            self.value.bias.copy_(attention.in_proj_bias[2 * width :])
            self.out.weight.copy_(attention.out_proj.weight)
            self.out.bias.copy_(attention.out_proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, H] -> [B, N, H]."""
        x = self.out(self.value(patches))
        return x + self.mlp(self.norm(x))


def _copied(map: nn.Module) -> nn.Linear:
    assert isinstance(map, nn.Linear)
    # Not `deepcopy`, whose copies of fake tensors have storages on another device.
    out = nn.Linear(map.in_features, map.out_features, bias=map.bias is not None)
    out.load_state_dict(map.state_dict())
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
        self.class_head: nn.Module = nn.Identity()
        self.pools = hasattr(self.model, "head")
        if self.pools:
            self.token_head: nn.Module = ValuePath(self.model.head, config)
        else:
            self.class_head = dual.get_submodule("visual_projection")
            self.token_head = _copied(self.class_head)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.encoder.layers)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.model.embeddings(pixels)
        if hasattr(self.model, "pre_layrnorm"):
            x = self.model.pre_layrnorm(x)
        x = self.model.post_layernorm(self.model.encoder(inputs_embeds=x).last_hidden_state)
        return torch.cat([self.model.head(x)[:, None], x], 1) if self.pools else x

    def joint(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_head(cls), self.token_head(patches)


class DualText(TextEncoder):
    """The text tower, up to its last norm, pooled at the last position that is attended to."""

    pooling = "last"

    def __init__(self, dual: PreTrainedModel):
        nn.Module.__init__(self)
        self.model = dual.get_submodule("text_model")
        self.width = self.model.config.hidden_size
        if hasattr(dual, "text_projection"):
            self.class_head = dual.get_submodule("text_projection")
        else:
            self.class_head, self.model.head = self.model.head, nn.Identity()
        self.token_head = _copied(self.class_head)

    def joint(self, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_head(cls), self.token_head(tokens)


def build(
    config: StudentConfig, image_size: int, pretrained: bool
) -> tuple[DualImage, DualText, Start | None]:
    """Both towers of the source, on the CPU in fp32.

    Args:
        image_size: S.
        pretrained: whether to load the source's weights; if not, they are random.

    Returns:
        The towers, and what the losses start with; None for random weights.

    Raises:
        UserError: the weights cannot be loaded, or do not fit.
    """
    own, sizes = config.source_config, library(config)
    if not (pretrained and config.source):
        dual: Any = AutoModel.from_config(sizes, dtype=torch.float32)
        return DualImage(dual, own, image_size), DualText(dual), None
    path = Path(config.source).expanduser()
    what = f"student.source is {config.source!r}: its weights cannot be loaded"
    with building(what, str(path) if path.exists() else "hub"):
        dual, keys = AutoModel.from_pretrained(
            str(path) if path.exists() else config.source,
            config=sizes,
            local_files_only=path.exists(),
            dtype=torch.float32,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if missing := sorted(keys["missing_keys"]):
            raise ValueError(f"{len(missing)} are missing, such as {missing[0]}")
    dual.train()
    bias = getattr(dual, "logit_bias", None)
    start = Start(dual.logit_scale.item(), None if bias is None else bias.item())
    return DualImage(dual, own, image_size), DualText(dual), start


def vocab_size(config: StudentConfig) -> int:
    """The number of rows of the source's table of tokens."""
    return library(config).text_config.vocab_size


def width(config: StudentConfig) -> int:
    """The width of the image tower."""
    return library(config).vision_config.hidden_size


def library(config: StudentConfig) -> PreTrainedConfig:
    """The source's configuration, as transformers has it."""
    sizes = deepcopy(config.source_config)  # which transformers changes
    with loading(hub=False):
        return CONFIG_MAPPING[sizes["model_type"]].from_dict(sizes)
