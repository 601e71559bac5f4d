"""Small models of open_clip with random weights, as the library saves them."""

import json
from pathlib import Path

import open_clip
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file
from transformers import RobertaConfig

from ds_cmli.config.source import Source, loss_of
from ds_cmli.data.tokens import builtin_tokenizer

VIT = {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2}
CAPTIONS = {"context_length": 76, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 1}


def losses(folder: Path) -> dict[str, float]:
    """The loss whose temperature the model of a folder has, and CMLI."""
    return {loss_of(Source(str(folder)).config): 1.0, "cmli": 1.0}


def of_timm(name: str, size: int, pool: str, proj: str | None) -> dict:
    return {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": proj}


def clip(vision: dict, text: dict = TEXT, **more) -> dict:
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **more}


# As ViT-B-32 and its QuickGELU, ViT-H-14-CLIPA, RN50, convnext_base, coca_ViT-B-32, ViT-B-16-SigLIP, EVA02, MobileCLIP.
MODELS = {
    "vit": clip(VIT),
    "quick": clip({**VIT, "patch_dropout": 0.5}, quick_gelu=True),
    "clipa": clip(
        {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "pos_embed_type": "sin_cos_2d"},
        {**TEXT, "context_length": 32, "no_causal_mask": True, "pool_type": "last"},
    ),
    "resnet": clip({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}),
    "convnext": clip({**of_timm("test_convnext", 64, "", "linear"), "timm_drop_path": 0.1}),
    "coca": clip(
        {**VIT, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 8, "output_tokens": True},
        {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**CAPTIONS, "attn_pooler_heads": 4},
        custom_text=True,
    ),
    "siglip": clip(
        of_timm("test_vit3", 160, "map", "none"),
        {**TEXT, "context_length": 64, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        custom_text=True,
        init_logit_bias=-10,
    )
    | {"embed_dim": 96},
    "token": clip(of_timm("test_vit", 160, "token", None), {**TEXT, "no_causal_mask": True}, custom_text=True),
}
PREPROCESS = {"siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"}}


def of_roberta(folder: Path) -> dict:
    """A model with a text encoder of transformers, whose configuration the folder gets."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    words = builtin_tokenizer()
    RobertaConfig(**sizes, vocab_size=len(words), max_position_embeddings=90, pad_token_id=0).save_pretrained(folder)
    words.save_pretrained(folder)
    name = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    return clip(VIT, {**name, "hf_pooler_type": "mean_pooler"})


def saved(folder: Path, name: str, file: str = "open_clip_model.safetensors") -> Path:
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    given = of_roberta(folder / "text") if name == "roberta" else MODELS[name]
    path, model_cfg = folder / "open_clip_config.json", json.loads(json.dumps(given))
    if name == "roberta":
        builtin_tokenizer().save_pretrained(folder)
    path.write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS.get(name, {})}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    for key, parameter in model.named_parameters():
        if key.endswith(("bias", "latent")):  # which begin as zeros, or nearly
            parameter.data += 0.2 * torch.randn_like(parameter)
    torch.nn.init.constant_(model.logit_scale, 4.2)
    if model.logit_bias is not None:
        torch.nn.init.constant_(model.logit_bias, -11.5)
    save_config_for_hf(model, path, model_cfg)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    if file.endswith(".safetensors"):
        save_file(weights, folder / file)
    else:  # as open_clip's own training does
        torch.save({"epoch": 1, "state_dict": {f"module.{key}": x for key, x in weights.items()}}, folder / file)
    return folder
