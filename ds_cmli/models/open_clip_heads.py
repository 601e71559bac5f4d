"""Maps of single patches into the joint space of an open_clip model, and its attention's layers.

A patch begins where the model's own pooling would put a picture of that one patch.

Shapes: B pairs, N patches, L tokens, H width of a tower, E width of the joint space.
"""

from copy import deepcopy
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import AttentionPoolLatent, ClassifierHead, LayerNorm2d, NormMlpClassifierHead
from torch import Tensor, nn


class NoHead(Exception):
    """A pooling by which single patches cannot be mapped."""


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The layer that has these parameters, [outputs, inputs] and [outputs]."""
    with torch.device("meta"):
        out = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    out.weight = weight  # type: ignore[assignment] # a parameter, as the library declares no other
    if bias is not None:
        out.bias = bias  # type: ignore[assignment]
    return out


class Attention(nn.Module):
    """`nn.MultiheadAttention` of one input, whose projections are linear layers.

    LoRA can then adapt them, and each layer computes with its own parameters alone.
    """

    def __init__(self, own: nn.MultiheadAttention):
        """`own`: whose parameters it takes over."""
        super().__init__()
        self.heads = own.num_heads
        self.in_proj = linear_of(own.in_proj_weight, own.in_proj_bias)
        self.out_proj = linear_of(own.out_proj.weight, own.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        *_: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """[B, L, H], and a mask to add, [L, L] or [B * heads, L, L] -> [B, L, H].

        Keys and values, which open_clip gives as torch's takes them, are of `x` too.
        """
        B, L, H = x.shape
        query, key, value = self.in_proj(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(B, self.heads, L, L)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask)
        return self.out_proj(out.transpose(1, 2).reshape(B, L, H)), None


class PoolingAttention(nn.Module):
    """`nn.MultiheadAttention` of queries that all pictures share, with its parameters' names.

    torch's transposes its inputs, and then rounds by whether its weights are frozen.
    """

    in_proj_bias: Tensor

    def __init__(self, own: nn.MultiheadAttention):
        """`own`: whose parameters it takes over."""
        super().__init__()
        self.heads = own.num_heads
        for name, parameter in own.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.out_proj = linear_of(own.out_proj.weight, own.out_proj.bias)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The matrices of queries, keys and values, [E, H] each."""
        if hasattr(self, "in_proj_weight"):
            return self.get_parameter("in_proj_weight").chunk(3)
        return tuple(self.get_parameter(f"{name}_proj_weight") for name in "qkv")

    def forward(
        self, queries: Tensor, x: Tensor, *_: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """[B, Q, E], each picture's the same, and [B, L, H] -> [B, Q, E]."""
        inputs, biases = (queries[:1], x, x), self.in_proj_bias.chunk(3)
        parts = []
        for tokens, weight, bias in zip(inputs, self.weights, biases, strict=True):
            part = nn.functional.linear(tokens, weight, bias)
            parts.append(part.unflatten(2, (self.heads, -1)).transpose(1, 2))
        query, key, value = parts
        query = query.expand(len(x), -1, -1, -1)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def with_linear_layers(tower: nn.Module) -> None:
    """Replace torch's attention in a tower's blocks, and in its pooling."""
    for module in tower.modules():
        own = getattr(module, "attn", None)
        if isinstance(own, nn.MultiheadAttention):
            module.attn = PoolingAttention(own) if hasattr(module, "query") else Attention(own)


def linear(projection: nn.Module | nn.Parameter | None) -> nn.Module:
    """A projection of open_clip's, maybe a parameter [H, E], as a module."""
    if projection is None:
        return nn.Identity()
    if isinstance(projection, nn.Module):
        return projection
    return linear_of(nn.Parameter(projection.detach().t().contiguous()), None)


def copied(module: nn.Module) -> nn.Module:
    """A copy with parameters of its own."""
    memo: dict[int, Any] = {}
    # `deepcopy` gives copies of fake tensors storages on another device.
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone())
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.clone()
    return deepcopy(module, memo)


def _layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with copies of these weights."""
    if bias is not None:
        bias = nn.Parameter(bias.detach().clone())
    return linear_of(nn.Parameter(weight.detach().clone()), bias)


class Residual(nn.Module):
    def __init__(self, norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def of_vit(visual: VisionTransformer, projection: nn.Module) -> nn.Module:
    """The map of open_clip's own ViT, from what `_of_vit` of the towers returns to E."""
    parts: list[nn.Module] = []
    pool = visual.attn_pool
    if pool is not None:
        attention = pool.attn
        _, _, bias = attention.in_proj_bias.chunk(3)
        _, _, value = attention.weights
        parts += [copied(pool.ln_k), _layer(value, bias), copied(attention.out_proj)]
    if pool is not None or visual.final_ln_after_pool:
        parts.append(copied(visual.ln_post))
    return nn.Sequential(*parts, copied(projection))


def of_resnet(visual: ModifiedResNet) -> nn.Module:
    """The map of open_clip's ResNet: values and output of its pooling (MaskCLIP, 2112.01071)."""
    return nn.Sequential(copied(visual.attnpool.v_proj), copied(visual.attnpool.c_proj))


def of_timm(visual: TimmModel) -> nn.Module:
    """The map of a model of timm in open_clip. Raises `NoHead`."""
    trunk, parts = visual.trunk, []
    head = getattr(trunk, "head", None)
    pool = getattr(trunk, "attn_pool", None)
    if "pool" in dict(visual.head.named_children()):
        raise NoHead(f"its timm_pool is {type(visual.head.pool).__name__}")
    if pool is not None:
        parts += _of_latent(pool)
    if getattr(trunk, "fc_norm", None) is not None:
        parts.append(copied(trunk.fc_norm))
    if isinstance(head, NormMlpClassifierHead):
        if not isinstance(head.norm, LayerNorm2d | nn.Identity):
            raise NoHead(f"its pooled features pass a {type(head.norm).__name__}")
        parts += [_of_maps(head.norm), copied(head.pre_logits), copied(head.fc)]
    elif isinstance(head, ClassifierHead):
        if head.global_pool.feat_mult() != 1:
            raise NoHead("its pooling gives several features of a channel")
        parts.append(copied(head.fc))
    elif head is None and isinstance(getattr(trunk, "global_pool", None), nn.Module):
        pass  # the pooling of a feature map alone
    elif isinstance(head, nn.Linear | nn.Identity):
        parts.append(copied(head))
    else:
        raise NoHead(f"its pooling is {type(head).__name__}")
    parts.append(copied(visual.head))
    return nn.Sequential(*[part for part in parts if next(part.parameters(), None) is not None])


def _of_latent(pool: nn.Module) -> list[nn.Module]:
    if not isinstance(pool, AttentionPoolLatent) or pool.pos_embed is not None:
        raise NoHead(f"its pooling is {type(pool).__name__}")
    _, value = pool.kv.weight.chunk(2)
    bias = pool.kv.bias
    if bias is not None:
        _, bias = bias.chunk(2)
    out = [_layer(value, bias), copied(pool.proj)]
    if pool.mlp is not None:
        out.append(Residual(copied(pool.norm), copied(pool.mlp)))
    return out


def _of_maps(norm: nn.Module) -> nn.Module:
    """A norm of the channels of maps as one of vectors."""
    if isinstance(norm, nn.Identity):
        return norm
    assert isinstance(norm, LayerNorm2d)
    out = nn.LayerNorm(norm.normalized_shape, norm.eps)
    out.load_state_dict(norm.state_dict())
    return out
