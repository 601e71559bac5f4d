"""The conversions of packaged image models to timm's state dicts.

A ViT with DINOv2's architecture comes from ONNX. The exporter kept the names of biases, norms and
LayerScale but dropped those of the linear weights. A weight is found as the input of the MatMul to
whose product a named bias is added.
"""

import io
import re
from pathlib import Path

import numpy as np

# Regular expressions from tensor names of Hugging Face's Dinov2Model to timm's VisionTransformer.
VIT_NAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)


def convert_vit(model: bytes, target: Path) -> None:
    """Write `target`, a file of fp32 tensors for timm's `vit_small_patch14_dinov2`.

    The output of its final norm equals the ONNX model's if the position embedding is resized
    bicubic, not antialiased.
    """
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    graph = onnx.load_model_from_string(model).graph
    arrays = {}
    for one in graph.initializer:
        arrays[one.name] = numpy_helper.to_array(one)
    prefix = "backbone."
    tensors = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    positions: dict[int, np.ndarray] = {}  # by number: of the class token, of the 37 x 37 patches
    for node in graph.node:
        constants = [name for name in node.input if name in arrays]
        if node.op_type == "Add" and len(constants) == 1 and constants[0].startswith(prefix):
            product = products.get(next(name for name in node.input if name not in arrays))
            if product is not None:
                # ONNX stores the right factor of the product, [in, out]; torch stores [out, in].
                weight = constants[0].removesuffix("bias") + "weight"
                tensors[weight] = arrays[product.input[1]].T
        elif node.output[0].startswith("/backbone/embeddings/"):
            for name in constants:
                if node.op_type in ("Concat", "Reshape") and arrays[name].ndim == 3:
                    positions[arrays[name].shape[1]] = arrays[name]

    state = {"pos_embed": np.concatenate([positions[n] for n in sorted(positions)], axis=1)}
    for name, value in tensors.items():
        name = name.removeprefix(prefix)
        for pattern, replacement in VIT_NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace(".query.", ".qkv.")] = np.concatenate(parts)
    for name, value in state.items():
        state[name] = np.ascontiguousarray(value, dtype=np.float32)
    save_file(state, target)


def convert_efficientnet(checkpoint: bytes, target: Path) -> None:
    """Write `target`, a file of tensors for timm's `tf_efficientnet_lite0`.

    The checkpoint has the same tensors in the same order, by other names.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    given = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    whole = [tensor.contiguous() for tensor in given.values()]
    save_file(dict(zip(names, whole, strict=True)), target)
