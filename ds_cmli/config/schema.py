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


# `use_attribute_docstrings`: the text below a field is its description.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
MAX_NUMBER = 10**9  # of counts and factors: products of two of them are finite in fp32
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
Name = Annotated[Text, Field(min_length=1)]
Folder = Annotated[Text, AfterValidator(expand_home)]
Names = Annotated[list[Name], Field(min_length=1)]
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Count = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Positive = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
NotNegative = Annotated[float, Field(ge=0, le=MAX_NUMBER)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]
InitTemperature = Annotated[float, Field(ge=0.01, le=10)]


@dataclass(config=STRICT)
class StudentConfig:
    source: Text = ""
    """A CLIP, SigLIP or model of open_clip (a folder, or a name of the hub), a run or an export to
    start from, which decides other settings (docs/finetune.md); "": two encoders."""
    source_config: dict[str, Any] = Field(default_factory=dict)
    """The sizes of the source's model; filled from `source`."""
    image_backbone: Name = "timm"
    """ "timm", or a plugin's (docs/plugins.md)."""
    image_model: Name = "vit_small_patch14_dinov2"
    """The image encoder's name in timm."""
    image_weights: Name = "demo"
    """ "demo" (packaged), "hub" (by model name), "random", or a path."""
    image_overrides: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of timm.create_model."""
    text_backbone: Name = "transformers"
    """ "transformers", or a plugin's."""
    text_model: Name = "bert"
    """Transformers name, or architecture."""
    text_weights: Name = "demo"
    """As `image_weights`."""
    text_overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of transformers' config."""
    layers: Count | None = None
    """The number of first layers kept of each encoder; null: 6, or all if fewer or not a stack."""
    shared_blocks: Annotated[int, Field(ge=0, le=1000)] = 1
    """Transformer blocks over both modalities; with `source`, 0 unless given."""
    embed_dim: Annotated[int, Field(ge=1, le=2048)] = 256
    """D, the embedding dimension."""
    dropout: BelowOne = 0.1
    """The dropout after the text encoder's layers, as in BERT's training."""
    freeze_image: Number = 0
    """The number of first layers that are frozen, with the embeddings below."""
    freeze_text: Number = 0
    """As `freeze_image`, for the text encoder."""
    lora: dict[Literal["image", "text"], Names] = Field(default_factory=dict)
    """LoRA: layers whose names end so get adapters, as {"text": ["query"]}; the rest is frozen."""
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """The rank of the adapters."""
    lora_alpha: Count = 16
    """The adapters' factor, before it is divided by the rank."""

    def __post_init__(self) -> None:
        choice("student.image_backbone", self.image_backbone, IMAGE)
        choice("student.text_backbone", self.text_backbone, TEXT)


@dataclass(config=STRICT)
class TeacherConfig:
    model: Name = "vit_small_patch14_dinov2"
    """timm name."""
    weights: Name = "demo"
    """As `student.image_weights`."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """As `student.image_overrides`."""
    block: Annotated[int, Field(ge=-1000, le=1000)] = 9
    """The features are the output of this block, or stage, 0-based; negative: from the last."""


@dataclass(config=STRICT)
class DataConfig:
    source: Name | Names = "demo"
    """ "demo" (scenes); a folder, tars, parquet, CSV or JSON of pairs, also by
    hf://datasets/OWNER/NAME (docs/data.md); or several, each with a share as WHAT::0.7."""
    scenes: Literal["names", "sentences"] = "names"
    """Captions of the demo: "names" of one to four pictures, or "sentences" with other words."""
    val_source: Text = ""
    """Pairs to evaluate on; "": the validation part of `source`, or a share."""
    held_out: Positive | None = None
    """Held-out pictures if there is no validation part; below 1: a share; null: 5%, up to 1,000."""
    image_root: Text = ""
    """Folder of the images that a table or JSON names; "": the list's."""
    image_key: Text = ""
    """Column of the image; "": detected."""
    caption_key: Text = ""
    """Column, or key in JSON, of the caption; "": detected."""
    caption_weights: Annotated[dict[str, Positive], Field(min_length=1)] | None = None
    """Weights of caption columns, or of keys in JSON. Training draws a column by its weight;
    evaluations use all of them, or `caption_key`."""
    image_size: Annotated[int, Field(ge=1, le=4096)] = 84
    """The side of the square pictures, in pixels."""
    resize: Resize = "crop"
    """ "crop": resize the central square. "shortest", as CLIP: resize the shorter side, cut out
    the square. "squash", as SigLIP: resize all. "_pillow": by Pillow, as open_clip."""
    interpolation: Interpolation = "bicubic"
    """The filter with which pictures are resized."""
    context_length: Annotated[int, Field(ge=3, le=65536)] = 64
    """The longest caption in tokens, with [CLS] and [SEP]."""
    padding: Literal["longest", "full"] = "longest"
    """Texts are padded to the batch's "longest", or "full" and padding attended to, as SigLIP."""
    tokenizer: Name = "demo"
    """ "demo" (MiniLM's), "builtin" (no download), "open_clip", transformers name or path."""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Data loading processes per rank."""
    shuffle_window: Number | None = None
    """The number of shards that are shuffled together; 0: all; null: 64 for remote tars or more
    than 10 million pictures in tars, otherwise all."""
    cache: bool = False
    """Copy local tars to this node too, for a slow shared disk."""
    cache_gb: Positive = 100.0
    """The most GB of copied tars on a node, in DS_CMLI_CACHE."""
    augmentation: dict[AugmentationName, ShareAboveZero] = Field(default_factory=dict)
    """Transforms of training pictures: the smallest share of the area that a crop keeps, the
    probability of a flip (captions may name left and right), the change of colours."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The run stops if the share of broken images and empty captions exceeds this."""

    def __post_init__(self) -> None:
        if self.caption_weights:
            # Draws depend on the order of the columns, so the order of the user must not matter.
            self.caption_weights = dict(sorted(self.caption_weights.items()))
            choice("data.caption_key", self.caption_key, ["", *self.caption_weights])


@dataclass(config=STRICT)
class LossConfig:
    weights: dict[str, Positive] = Field(
        default_factory=lambda: {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}, min_length=1
    )
    """Weights of global, global_sigmoid, cmli, cmli_sigmoid, target_cmli, cls_kd; or a plugin's."""
    mse_reduction: Literal["mean", "sum"] = "mean"
    """The reduction of squared differences over H; equations (7) and (9) of docs/method.md: sum."""
    target_image_weight: NotNegative = 1.0
    """The weight of patches, (7), in the mean (10) of docs/method.md; 0: off."""
    target_text_weight: NotNegative = 1.0
    """The weight of tokens, (9), in the mean (10) of docs/method.md; 0: off."""
    init_temperature: InitTemperature = 0.07
    """The global loss's temperature at the start."""
    cmli_init_temperature: InitTemperature = 0.02
    """CMLI's temperature at the start; it is lower because means of maxima vary less."""
    init_bias: Annotated[float, Field(ge=-100, le=100)] | None = None
    """The sigmoid losses' bias at the start; null: the authors' -10, and -14 for `cmli_sigmoid`.
    With some hundred pairs or fewer, ln(1/negatives) learns faster: -3.5 for 32."""
    cmli_backend: Literal["auto", "cpu", "triton", "torch"] = "auto"
    """All-pairs scores by C++ ("cpu"), kernels of GPUs ("triton"), or PyTorch ("torch")."""

    def __post_init__(self) -> None:
        for name in self.weights:
            choice("loss.weights", name, LOSSES)
        if "target_cmli" in self.weights:
            largest = max(self.target_image_weight, self.target_text_weight)
            remedy = "and loss.target_text_weight too: leave target_cmli out of loss.weights"
            check(largest > 0, "loss.target_image_weight", self.target_image_weight, remedy)


@dataclass(config=STRICT)
class OptimConfig:
    """Fills the "auto" values of the DeepSpeed JSON, whose explicit values take precedence."""

    lr: Positive = 1e-4
    """The learning rate after warmup, if the JSON says "auto"."""
    weight_decay: NotNegative = 0.05
    """The decay of weights, but not of norms, biases and embeddings."""
    lr_factors: dict[Literal["image", "text", "rest"], Positive] = Field(default_factory=dict)
    """Factors of the learning rate; "rest" is shared blocks, heads and temperatures."""
    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """The factor of the learning rate per encoder layer downwards."""
    warmup_share: BelowOne = 0.05
    """The share of all steps with linear warmup."""
    grad_clip: NotNegative = 1.0
    """Largest gradient norm; 0: off."""
    ema_decay: BelowOne = 0.0
    """Decay of averaged weights, evaluated and saved too (0.999: some 1,000 steps); 0: off."""
    micro_batch: Count = 64
    """B, pairs per rank, if the JSON says "auto"."""
    negatives: Literal["micro_batch", "global_batch"] = "global_batch"
    """Under accumulation an image is compared with the texts of its micro-batch, or with those of
    the whole step, by a second forward pass."""
    steps: Count | None = 300
    """Optimizer steps."""
    epochs: Positive | None = None
    """The number of passes over the data, instead of `steps`."""

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
    preset: Name = "quick"
    """The preset, for settings that are not given: quick, demo, paper, tiny, or finetune (with
    `student.source`)."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The seed of weights, data order and scenes."""
    output_dir: Folder = ""
    """The run's folder; "": runs/<preset>-<date and time>."""
    log_every: Count = 10
    """Steps from one logged step to the next."""
    eval_every: Number = 0
    """Steps between evaluations; 0: only at the end."""
    eval_batch: Count = 50
    """Pairs per batch of an evaluation."""
    match_maps: Number = 4
    """Held-out pairs of each split whose match maps TensorBoard gets."""
    report_to: Literal["tensorboard", "wandb"] = "tensorboard"
    """TensorBoard gets numbers and pictures beside metrics.jsonl; "wandb": Weights & Biases too."""
    save_every: Number = 0
    """Steps between checkpoints; 0: by time alone, and at the end."""
    save_minutes: NotNegative = 15.0
    """Minutes between checkpoints; 0: by steps alone, and at the end."""
    keep: Count = 2
    """The number of newest checkpoints that are kept."""
    zero_shot: Text | Names = ""
    """Folders of class folders, one or several, classified at each evaluation."""
    best_by: Literal["retrieval", "zero_shot"] = "retrieval"
    """The best evaluation: by R@1 of the first split, or accuracy in the first of `zero_shot`."""
    keep_best: bool = False
    """Keep the best evaluation's checkpoint too, and its weights in model.best.safetensors."""
    patience: Number = 0
    """Evaluations without a better one that end the run; 0: never."""
    compile: Literal["off", "blocks"] = "off"
    """torch.compile of each encoder block."""
    deterministic: bool = False
    """Results are bitwise the same on the same kind of device."""
    watchdog: NotNegative = 120.0
    """Seconds until a rank without progress counts as hung; 0: off."""

    def __post_init__(self) -> None:
        has_folders = self.best_by == "retrieval" or bool(self.zero_shot)
        check(has_folders, "run.best_by", self.best_by, "give folders of classes by run.zero_shot")


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
    return " ".join(SECTIONS[section].__pydantic_fields__[setting].description.split())


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
        line = f"{setting} is {str(path.parent)!r}: {problem}: {one_line(error)}"
        raise UserError(line) from None
