"""The presets, as changes of the defaults in `schema.py`."""

from collections.abc import Mapping

from ds_cmli.config.messages import choice
from ds_cmli.config.schema import Config, RunConfig, Sections, check_sections
from ds_cmli.config.source import temperature_loss, with_source_settings
from ds_cmli.errors import UserError
from ds_cmli.files import Section

# The sizes of the packaged weights that student.text_weights "demo" means.
MINILM_SIZES: dict[str, object] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}

# Real pictures and pretrained weights at half the document's width, sized for two CPU cores.
DEMO: Sections = {
    "student": {
        "text_overrides": MINILM_SIZES,  # needed for `--init random`
        "dropout": 0.0,  # dropout is for longer trainings
    },
    # More of Target-CMLI was no better in the experiment of docs/results.md.
    "loss": {"weights": {"global": 1.0, "cmli": 1.0, "target_cmli": 0.1}},
    "optim": {"lr": 2e-4, "warmup_share": 0.15, "micro_batch": 64, "steps": 210},
}
# The default, a smaller demo: a first training in five minutes on two CPU cores without AVX-512.
QUICK: Sections = {
    "student": {"layers": 3, "freeze_image": 1, "freeze_text": 1},
    "teacher": {"block": 5},
    "data": {"image_size": 56},
    "optim": {"lr": 4e-4, "steps": 200},
}


def merged(*layers: Mapping[str, Section]) -> Sections:
    """Return the settings of all layers; the last layer that has a setting decides it."""
    values: Sections = {}
    for layer in layers:
        for section, settings in layer.items():
            values.setdefault(section, {}).update(settings)
    return values


PRESETS: dict[str, Sections] = {
    "quick": merged(DEMO, QUICK),
    "demo": DEMO,
    # The document's setting. It names neither GPU nor models, so the models here are an assumption.
    "paper": {
        "student": {
            "image_model": "vit_base_patch16_224",
            "image_weights": "hub",
            "text_model": "bert-base-uncased",
            "text_weights": "hub",
        },
        "teacher": {"model": "beitv2_base_patch16_224", "weights": "hub", "block": -1},
        "data": {"image_size": 224, "tokenizer": "bert-base-uncased", "workers": 8},
        "optim": {"lr": 5e-4, "micro_batch": 256, "steps": None, "epochs": 7, "weight_decay": 0.01},
        "run": {"log_every": 50, "eval_every": 1000, "save_every": 1000},
    },
    # A CLIP or SigLIP, by --start-from, on one's own pictures. docs/finetune.md has the sources of
    # these numbers.
    "finetune": {
        "data": {"workers": 8, "augmentation": {"random_resized_crop": 0.9}},
        "loss": {"weights": {"global": 1.0, "cmli": 1.0}},
        "optim": {
            "lr": 1e-5,
            "weight_decay": 0.1,
            "warmup_share": 0.03,
            "micro_batch": 128,
            "steps": None,
            "epochs": 6,
        },
        "run": {"log_every": 50, "eval_every": 100, "save_every": 500, "keep_best": True},
    },
    # For tests: only the pictures are downloaded, and a step takes well under a second.
    "tiny": {
        "student": {
            "image_model": "vit_tiny_patch16_224",
            "image_weights": "random",
            "image_overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14},
            "text_model": "bert",
            "text_weights": "random",
            "text_overrides": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            },
            "embed_dim": 16,
            "dropout": 0.0,  # so that the loss does not depend on the number of ranks
        },
        "teacher": {
            "model": "vit_tiny_patch16_224",
            "weights": "random",
            "overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14},
            "block": -1,
        },
        "data": {"image_size": 56, "tokenizer": "builtin", "context_length": 32},
        "optim": {"micro_batch": 8, "steps": 20, "lr": 1e-3},
        "run": {"log_every": 1},
    },
}


def load_preset(name: str | None, overrides: Mapping[str, Section]) -> Config:
    """Return the preset's configuration with `overrides`; without a name, that of `run.preset`.

    Steps or epochs replace whichever of the two the preset sets. Raises `UserError`.
    """
    check_sections(overrides)
    usual = "finetune" if overrides.get("student", {}).get("source") else RunConfig.preset
    name = str(name or overrides.get("run", {}).get("preset", usual))
    choice("run.preset", name, PRESETS)
    values = merged({"run": {"preset": name}}, PRESETS[name], with_source_settings(overrides))
    source_config = values.get("student", {}).get("source_config")
    if name == "finetune" and source_config and "weights" not in overrides.get("loss", {}):
        values["loss"]["weights"] = {temperature_loss(source_config): 1.0, "cmli": 1.0}
    optim = overrides.get("optim", {})
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if optim.get(one) is not None and other not in optim:
            values["optim"][other] = None
    config = Config.from_dict(values)
    if name == "finetune" and not config.student.source:
        raise UserError("preset finetune needs the model to start from: --start-from MODEL")
    return config
