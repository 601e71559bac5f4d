"""Small models with random weights as their libraries save them: CLIP and SigLIP of transformers, and of open_clip."""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
import transformers
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import load_file, save_file

from ds_cmli.config.presets import load_preset
from ds_cmli.config.source import ModelSource, temperature_loss
from ds_cmli.data.tokens import CaptionTokenizer, builtin_tokenizer, pretrained_tokenizer
from ds_cmli.engine import build_models
from ds_cmli.export import command
from tests import make

SIZES = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "hidden_size": 32, "image_size": 56, "patch_size": 14}
SQUARE = {"height": 56, "width": 56}
LARGER = {"image_size": 84, "context_length": 154}  # settings of data


def text(**more):
    ids = {"vocab_size": len(builtin_tokenizer()), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return {**SIZES, "hidden_size": 32, **ids, **more}


def clip(folder: Path, act: str = "quick_gelu", text_width: int = 48, **processor) -> Path:
    torch.manual_seed(0)
    words = text(hidden_size=text_width, max_position_embeddings=77, hidden_act=act)
    configs = {"vision_config": {**VISION, "hidden_act": act}, "text_config": words}
    model = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=24, **configs))
    torch.nn.init.constant_(model.logit_scale, 4.2)
    sizes = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}
    return saved(folder, model, transformers.CLIPImageProcessor(**(sizes | processor)))


def siglip(folder: Path, **processor) -> Path:
    torch.manual_seed(0)
    words = text(max_position_embeddings=64, projection_size=32)
    model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=words))
    torch.nn.init.constant_(model.logit_scale, 4.76)
    torch.nn.init.constant_(model.logit_bias, -12.9)
    for parameter in model.vision_model.head.parameters():  # whose biases are zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return saved(folder, model, transformers.SiglipImageProcessor(size=SQUARE, **processor))


def saved(folder: Path, model, processor) -> Path:
    for part in (model, processor, builtin_tokenizer()):
        part.save_pretrained(folder)
    return folder


# Towers of open_clip.
VIT = {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2}
CAPTIONS = {"context_length": 76, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 1}


def timm_tower(name: str, size: int, pool: str, proj: str | None) -> dict:
    return {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": proj}


def towers(vision: dict, text: dict = TEXT, **more) -> dict:
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **more}


# Small ones like ViT-B-32, ViT-H-14-CLIPA, RN50, convnext_base, coca_ViT-B-32, ViT-B-16-SigLIP, EVA02, MobileCLIP.
MODELS = {
    "vit": towers({**VIT, "patch_dropout": 0.5}),
    "clipa": towers(
        {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "pos_embed_type": "sin_cos_2d"},
        {**TEXT, "context_length": 32, "no_causal_mask": True, "pool_type": "last"},
        quick_gelu=True,
    ),
    "resnet": towers({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}),
    "convnext": towers({**timm_tower("test_convnext", 64, "", "linear"), "timm_drop_path": 0.1}),
    "coca": towers(
        {**VIT, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 8, "output_tokens": True},
        {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**CAPTIONS, "attn_pooler_heads": 4},
        custom_text=True,
    ),
    "siglip": towers(
        timm_tower("test_vit3", 160, "map", "none"),
        {**TEXT, "context_length": 64, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        custom_text=True,
        init_logit_bias=-10,
    )
    | {"embed_dim": 96},
    "token": towers(timm_tower("test_vit", 160, "token", None), {**TEXT, "no_causal_mask": True}, custom_text=True),
}
OPEN_CLIP_KINDS = (*MODELS, "roberta")  # the last with a text encoder of transformers
PREPROCESS = {"siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"}}


def write_open_clip(folder: Path, kind: str, file: str = "open_clip_model.safetensors") -> Path:
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    path = folder / "open_clip_config.json"
    if kind == "roberta":
        words = folder / "text"
        transformers.RobertaConfig(**text(max_position_embeddings=90)).save_pretrained(words)
        for place in (folder, words):
            builtin_tokenizer().save_pretrained(place)
        names = {"hf_model_name": str(words), "hf_tokenizer_name": str(words)}
        model_cfg = towers(VIT, {**names, "hf_pooler_type": "mean_pooler"})
    else:
        model_cfg = deepcopy(MODELS[kind])
    path.write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS.get(kind, {})}))
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


TRANSFORMERS_MODELS: dict[str, Callable[[Path], Path]] = {
    "CLIP": clip,
    "gelu": partial(clip, act="gelu"),
    "squashed": partial(clip, size=SQUARE),
    "SigLIP": siglip,
    "bilinear": partial(siglip, resample=2),
}


def write_source(folder: Path, kind: str) -> Path:
    write = TRANSFORMERS_MODELS.get(kind, partial(write_open_clip, kind=kind))
    return write(folder)


def library_of(kind: str) -> str:
    """The value of `--as` for the export of a run that started from a model of this kind."""
    return {"CLIP": "clip", "SigLIP": "siglip"}.get(kind, "open_clip")


@torch.no_grad()
def library_features(folder: Path, pictures: list, texts: list[str]) -> SimpleNamespace:
    """Compute features of pictures and texts, `images` and `texts`, by the library with the model of a folder."""
    if (folder / "open_clip_config.json").is_file():
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        pixels = torch.stack([*map(transform, pictures)])
        ids = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
        features = {"images": model.eval().encode_image(pixels), "texts": model.encode_text(ids)}
        return SimpleNamespace(model=model, pixels=pixels, std=model.visual.image_std, ids=ids, **features)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    length = model.config.text_config.max_position_embeddings
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids = words["input_ids"]
    mask = {"attention_mask": words["attention_mask"]} if model.config.model_type == "clip" else {}
    features = {
        "images": model.get_image_features(pixels).pooler_output,
        "texts": model.get_text_features(ids, **mask).pooler_output,
    }
    return SimpleNamespace(model=model, pixels=pixels, std=processor.image_std, ids=ids, **features)


def library_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(min(folder.glob("*.safetensors")))


def train_from(
    source: Path, data: list[str], output: Path, steps: int, settings: dict[str, object], ds_config: dict
) -> Path:
    """The folder of a training by the preset `finetune`."""
    words = ["--start-from", str(source), *data, "--output-dir", str(output), "--steps", str(steps), "--workers", "0"]
    words += ["--deepspeed_config", make.json_file(output.with_suffix(".json"), ds_config)]
    for name, value in ({"run.match_maps": 0, "run.log_every": 1, "optim.micro_batch": 8} | settings).items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    assert make.train(*words) == 0
    return output


def export(run: Path, folder: Path, *options: str) -> Path:
    command.main([str(run), str(folder), *options], standalone_mode=False)
    return folder


def settings(source, losses=(), data=None, **student):
    """The configuration of a training: by default, with the loss whose temperature the model has, and CMLI."""
    losses = losses or (temperature_loss(ModelSource(str(source)).config), "cmli")
    chosen = {"student": {"source": str(source), **student}, "loss": {"weights": dict.fromkeys(losses, 1.0)}}
    return load_preset("tiny", chosen | {"data": data or {}})


bpe = cache(partial(pretrained_tokenizer, "open_clip"))  # which takes a second to make


def start(source, **chosen):
    """The objective, the configuration and the tokenizer of a training that starts from the source."""
    config = settings(source, **chosen)
    data = config.data
    tokenizer = bpe() if data.tokenizer == "open_clip" else pretrained_tokenizer(data.tokenizer)
    words = CaptionTokenizer(tokenizer, data.context_length, data.padding == "full")
    objective, _ = build_models(config, words.vocab_size, pad_id=words.pad_id)
    return objective, config, words


def run_of(source, folder: Path, **chosen) -> Path:
    """A run's folder as a training from the source leaves it."""
    objective, config, words = start(source, **chosen)
    for parameter in objective.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return make.save_run(folder, config, objective, words)
