"""The settings of a run: one pydantic dataclass per component, checked when it is built.

`--help` and docs/settings.md show the descriptions of the fields. This module has no heavy imports:
`--help` and the checks of the user's settings do not need torch.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from ds_cmli.config.messages import check, choice, setting_of_error
from ds_cmli.config.registry import IMAGE, LOSSES, TEXT
from ds_cmli.errors import UserError, one_line
from ds_cmli.files import Section, read_json

Sections = dict[str, dict[str, Any]]  # section -> setting -> value
AugmentationName = Literal["random_resized_crop", "horizontal_flip", "color_jitter"]
Resize = Literal["crop", "shortest", "squash", "shortest_pillow", "squash_pillow"]
Interpolation = Literal["bicubic", "bilinear"]


def expand_home(path: str) -> str:
    """Return the path with its ~ or ~USER replaced by that home. Raises ValueError."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("there is no such user")
    return expanded


STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
MOST = 10**9  # of counts and factors: products of two of them are finite in fp32
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
Name = Annotated[Text, Field(min_length=1)]
Folder = Annotated[Text, AfterValidator(expand_home)]
Names = Annotated[list[Name], Field(min_length=1)]
Number = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
NotNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0.01, le=10)]


@dataclass(config=STRICT)
class StudentConfig:
    source: Text = Field(
        "",
        description=(
            "A CLIP, SigLIP or model of open_clip (a folder, or a name of the hub), a run "
            "or an export to start from, which decides other settings (docs/finetune.md); "
            '"": two encoders.'
        ),
    )
    source_config: dict[str, Any] = Field(
        default_factory=dict,
        description="the sizes of its model; filled from `source`",
    )
    image_backbone: Name = Field("timm", description='"timm", or a plugin\'s (docs/plugins.md)')
    image_model: Name = Field("vit_small_patch14_dinov2", description="timm name")
    image_weights: Name = Field(
        "demo",
        description='"demo" (packaged), "hub" (by model name), "random", or a path',
    )
    image_overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of timm.create_model",
    )
    text_backbone: Name = Field("transformers", description='"transformers", or a plugin\'s')
    text_model: Name = Field("bert", description="transformers name, or architecture")
    text_weights: Name = Field("demo", description="as for images")
    text_overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of transformers' config",
    )
    layers: Count | None = Field(
        None,
        description=(
            "First layers of each encoder that are kept; null: 6, or all if they are fewer "
            "or no stack."
        ),
    )
    shared_blocks: Annotated[int, Field(ge=0, le=1000)] = Field(
        1,
        description="Transformer blocks over both modalities; with `source`, 0 unless given.",
    )
    embed_dim: Annotated[int, Field(ge=1, le=2048)] = Field(
        256,
        description="D, the embedding dimension",
    )
    dropout: BelowOne = Field(
        0.1,
        description="after the text encoder's layers, as in BERT's training",
    )
    freeze_image: Number = Field(
        0,
        description="first layers that are frozen, with the embeddings below",
    )
    freeze_text: Number = Field(0, description="the same of the text encoder")
    lora: dict[Literal["image", "text"], Names] = Field(
        default_factory=dict,
        description=(
            'LoRA: ends of names of layers that get adapters, as {"text": ["query"]}; the '
            "rest is frozen."
        ),
    )
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="of the adapters")
    lora_alpha: Count = Field(16, description="divided by the rank: the factor of the adapters")

    def __post_init__(self) -> None:
        choice("student.image_backbone", self.image_backbone, IMAGE)
        choice("student.text_backbone", self.text_backbone, TEXT)


@dataclass(config=STRICT)
class TeacherConfig:
    model: Name = Field("vit_small_patch14_dinov2", description="timm name")
    weights: Name = Field("demo", description="as the student's")
    overrides: dict[str, Any] = Field(default_factory=dict, description="as the student's")
    block: Annotated[int, Field(ge=-1000, le=1000)] = Field(
        9,
        description=(
            "The features are the output of this block, or stage, 0-based; negative: from the last."
        ),
    )


@dataclass(config=STRICT)
class DataConfig:
    source: Name | Names = Field(
        "demo",
        description=(
            '"demo" (scenes); a folder, tars, parquet, CSV or JSON of pairs, also by '
            "hf://datasets/OWNER/NAME (docs/data.md); or several, each with a share as "
            "WHAT::0.7."
        ),
    )
    scenes: Literal["names", "sentences"] = Field(
        "names",
        description=(
            'Captions of the demo: "names" of one to four pictures, or "sentences" with '
            "other words too."
        ),
    )
    val_source: Text = Field(
        "",
        description='pairs to evaluate on; "": the validation part of `source`, or a share',
    )
    held_out: Positive | None = Field(
        None,
        description=(
            "Without a validation part: below 1 a share of pictures, else how many; null: "
            "5%, up to 1,000."
        ),
    )
    image_root: Text = Field(
        "",
        description='folder of the images that a table or JSON names; "": the list\'s',
    )
    image_key: Text = Field("", description='column of the image; "": detected')
    caption_key: Text = Field(
        "",
        description='column, or key in JSON, of the caption; "": detected',
    )
    image_size: Annotated[int, Field(ge=1, le=4096)] = Field(84, description="pixels, square")
    resize: Resize = Field(
        "crop",
        description=(
            '"crop": the central square is resized. "shortest", as CLIP: the shorter side '
            'is resized, then the square cut out. "squash", as SigLIP: all is resized. '
            '"_pillow": by Pillow, as open_clip.'
        ),
    )
    interpolation: Interpolation = Field("bicubic", description="of resizing")
    context_length: Annotated[int, Field(ge=3, le=65536)] = Field(
        64,
        description="The longest caption in tokens, with [CLS] and [SEP].",
    )
    padding: Literal["longest", "full"] = Field(
        "longest",
        description=(
            'Texts are padded to the batch\'s "longest", or "full" and the padding attended '
            "to, as SigLIP."
        ),
    )
    tokenizer: Name = Field(
        "demo",
        description=(
            '"demo" (MiniLM\'s), "builtin" (no download), "open_clip" (its BPE), '
            "transformers name or path."
        ),
    )
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="data loading processes per rank",
    )
    shuffle_window: Number | None = Field(
        None,
        description=(
            "Shards whose samples are shuffled together; 0: all; null: 64 of remote tars, "
            "and of tars with more than 10 million pictures, else all."
        ),
    )
    augmentation: dict[AugmentationName, Share] = Field(
        default_factory=dict,
        description=(
            "Transforms of training pictures: the smallest share of the area that a crop "
            "keeps, the probability of a flip (captions may name left and right), the "
            "change of colours."
        ),
    )
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01,
        description="The run stops if the share of broken images and empty captions exceeds this.",
    )


@dataclass(config=STRICT)
class LossConfig:
    weights: dict[str, Positive] = Field(
        default_factory=lambda: {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0},
        min_length=1,
        description=(
            "Weights of global, global_sigmoid, cmli, cmli_sigmoid, target_cmli, cls_kd; or"
            " of a plugin's."
        ),
    )
    mse_reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="over H; (7) and (9) are written as sums",
    )
    target_image_weight: NotNegative = Field(
        1.0,
        description="of patches (7) in the mean (10); 0: off",
    )
    target_text_weight: NotNegative = Field(1.0, description="of tokens (9) in it; 0: off")
    init_temperature: Temperature = Field(0.07, description="of the global loss")
    cmli_init_temperature: Temperature = Field(
        0.02,
        description="of CMLI, whose means of maxima vary less",
    )
    init_bias: Annotated[float, Field(ge=-100, le=100)] | None = Field(
        None,
        description=(
            "Of the sigmoid losses. null: the authors' -10, and -14 of `cmli_sigmoid`; with"
            " some hundred pairs or fewer ln(1/negatives) learns faster, as -3.5 of 32."
        ),
    )
    cmli_backend: Literal["auto", "cpu", "triton", "torch"] = Field(
        "auto",
        description=(
            'What computes all-pairs scores: C++ ("cpu"), kernels of GPUs ("triton"), or '
            'PyTorch ("torch").'
        ),
    )

    def __post_init__(self) -> None:
        for name in self.weights:
            choice("loss.weights", name, LOSSES)
        both_are_off = self.target_image_weight == self.target_text_weight == 0
        remedy = "and loss.target_text_weight too: leave target_cmli out of loss.weights"
        check(
            not ("target_cmli" in self.weights and both_are_off),
            "loss.target_image_weight",
            self.target_image_weight,
            remedy,
        )


@dataclass(config=STRICT)
class OptimConfig:
    """Fills the "auto" values of the DeepSpeed JSON, whose explicit values take precedence."""

    lr: Positive = Field(
        1e-4,
        description='the learning rate after warmup, where the JSON says "auto"',
    )
    weight_decay: NotNegative = Field(0.05, description="not on norms, biases and embeddings")
    lr_factors: dict[Literal["image", "text", "rest"], Positive] = Field(
        default_factory=dict,
        description=(
            'Factors of the learning rate; "rest" is shared blocks, heads and temperatures.'
        ),
    )
    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = Field(
        1.0,
        description="The factor of the learning rate per encoder layer downwards.",
    )
    warmup_share: BelowOne = Field(0.05, description="the share of all steps with linear warmup")
    grad_clip: NotNegative = Field(1.0, description="largest gradient norm; 0: off")
    ema_decay: BelowOne = Field(
        0.0,
        description=(
            "Decay of an average of the weights, evaluated and saved too (0.999: some 1,000"
            " steps); 0: off."
        ),
    )
    micro_batch: Count = Field(64, description='B, pairs per rank, where the JSON says "auto"')
    negatives: Literal["micro_batch", "global_batch"] = Field(
        "global_batch",
        description=(
            "What an image is compared with under accumulation; the whole step takes a "
            "second forward pass."
        ),
    )
    steps: Count | None = Field(300, description="optimizer steps")
    epochs: Positive | None = Field(
        None,
        description="how often the data is seen, instead of `steps`",
    )

    def __post_init__(self) -> None:
        need = f"optim.epochs is {self.epochs}: give one of the two"
        check((self.steps is None) != (self.epochs is None), "optim.steps", self.steps, need)

    def warmup_steps(self, total_steps: int) -> int:
        return max(1, round(self.warmup_share * total_steps))

    def rate(self, update: int, total_steps: int) -> float:
        """The share of `lr` at an update, from 1: linear warmup, then cosine decay; never 0."""
        warmup = self.warmup_steps(total_steps)
        if update <= warmup:
            return update / warmup
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total_steps + 1 - warmup)))


@dataclass(config=STRICT)
class RunConfig:
    preset: Name = Field(
        "quick",
        description=(
            "quick, demo, paper, finetune (usual with `student.source`) or tiny: all that "
            "is not given."
        ),
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0,
        description="that of weights, data order and scenes",
    )
    output_dir: Folder = Field(
        "",
        description='the run\'s folder; "": runs/<preset>-<date and time>',
    )
    log_every: Count = Field(10, description="steps from one logged step to the next")
    eval_every: Number = Field(0, description="steps between evaluations; 0: only at the end")
    eval_batch: Count = Field(50, description="pairs per batch of an evaluation")
    match_maps: Number = Field(
        4,
        description="held-out pairs of each split whose match maps TensorBoard gets",
    )
    report_to: Literal["tensorboard", "wandb"] = Field(
        "tensorboard",
        description=(
            'TensorBoard gets numbers and pictures beside metrics.jsonl; "wandb": Weights &'
            " Biases too."
        ),
    )
    save_every: Number = Field(
        0,
        description="steps between checkpoints; 0: by time alone, and at the end",
    )
    save_minutes: NotNegative = Field(
        15.0,
        description="minutes between them; 0: by steps alone, and at the end",
    )
    keep: Count = Field(2, description="how many of the newest checkpoints are kept")
    keep_best: bool = Field(
        False,
        description=(
            "Keep the best evaluation's checkpoint too, and its weights in model.best.safetensors."
        ),
    )
    patience: Number = Field(
        0,
        description="evaluations without a better one that end the run; 0: never",
    )
    compile: Literal["off", "blocks"] = Field(
        "off",
        description="torch.compile of each encoder block",
    )
    deterministic: bool = Field(
        False,
        description="results are bitwise the same on the same kind of device",
    )
    watchdog: NotNegative = Field(
        120.0,
        description="seconds until a rank without progress counts as hung; 0: off",
    )


@dataclasses.dataclass
class Config:
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def to_dict(self) -> Sections:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Section]) -> "Config":
        """Build it from sections of settings; raises `UserError` for the first wrong one."""
        check_sections(values)
        built = {}
        for section, component in SECTIONS.items():
            settings = values.get(section, {})
            for name in settings:
                choice(f"setting of {section}", name, component.__dataclass_fields__)
            try:
                built[section] = component(**settings)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                setting = setting_of_error(first["loc"], settings)
                line = f"{section}.{setting} is {first['input']!r}: {first['msg']}"
                raise UserError(line) from None
        return cls(**built)


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}


def description(section: str, setting: str) -> str:
    """Return what a setting means, for `--help` and docs/settings.md."""
    return SECTIONS[section].__pydantic_fields__[setting].description


def check_sections(values: Mapping[str, object]) -> None:
    """Raise `UserError` for the first name that is not a section of settings."""
    check(isinstance(values, Mapping), "configuration", values, "give sections of settings")
    for name, settings in values.items():
        for section, component in SECTIONS.items():
            meant = f"did you mean {section}.{name}?"
            is_setting = name in component.__dataclass_fields__
            check(not is_setting, "section of settings", name, meant)
        choice("section of settings", name, SECTIONS)
        check(isinstance(settings, Mapping), name, settings, "give a mapping of settings")


def load_config(path: Path, setting: str) -> Config:
    """Read the configuration of a run from its `run.json`. Raises `UserError`, naming `setting`."""
    try:
        return Config.from_dict(read_json(path)["config"])
    except (OSError, ValueError, KeyError, RecursionError, UserError) as error:
        problem = f"its {path.name} is missing, damaged, of another version, or needs a --plugin"
        raise UserError(
            f"{setting} is {str(path.parent)!r}: {problem}: {one_line(error)}"
        ) from None
