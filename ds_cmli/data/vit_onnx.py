"""The conversion of a ViT with DINOv2's architecture from an ONNX file to timm's state dict.

The exporter kept the names of biases, norms and LayerScale but dropped those of the linear weights. A weight is found
as the input of the MatMul to whose product a named bias is added.
"""

import re
from pathlib import Path

import numpy as np

_PREFIX = "backbone."
_RENAMES = (  # regular expressions from tensor names of Hugging Face's Dinov2Model to timm's VisionTransformer
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)


def convert_vit(model: bytes, target: Path) -> None:
    """Write `target`, a safetensors file of fp32 tensors that timm's `vit_small_patch14_dinov2` loads strictly.

    The output of its final norm equals the ONNX model's if the position embedding is resized bicubic, not antialiased.
    """
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    graph = onnx.load_model_from_string(model).graph
    initializers = {i.name: i for i in graph.initializer}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}

    def array(name: str) -> np.ndarray:
        return np.ascontiguousarray(numpy_helper.to_array(initializers[name]), dtype=np.float32)

    tensors = {
        name.removeprefix(_PREFIX): array(name) for name in initializers if name.startswith(_PREFIX)
    }
    position: dict[str, np.ndarray] = {}
    for node in graph.node:
        constants = [name for name in node.input if name in initializers]
        if node.op_type == "Add" and len(constants) == 1 and constants[0].startswith(_PREFIX):
            product = products.get(next(name for name in node.input if name not in initializers))
            if product is not None:
                bias = constants[0].removeprefix(_PREFIX)
                # ONNX stores the right factor of the product, [in, out]; torch stores [out, in].
                tensors[bias.removesuffix("bias") + "weight"] = np.ascontiguousarray(
                    array(product.input[1]).T
                )
        elif node.op_type in ("Concat", "Reshape") and node.output[0].startswith(
            "/backbone/embeddings/"
        ):
            for name in constants:
                if (
                    len(initializers[name].dims) == 3
                ):  # position embedding of the class token or of the 37 x 37 patches
                    position["class" if initializers[name].dims[1] == 1 else "patches"] = array(
                        name
                    )

    state = {"pos_embed": np.concatenate([position["class"], position["patches"]], axis=1)}
    for name, value in tensors.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    for name in [n for n in state if ".attn.query." in n]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace(".query.", ".qkv.")] = np.concatenate(parts)
    save_file(state, target)
