"""The run's configuration: one pydantic dataclass per component, checked when it is built.

This module has no heavy imports: `--help` and the checks of the user's settings do not need torch.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ds_cmli.common import json_text
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse
from ds_cmli.config.registry import (
    DUAL,
    IMAGE,
    LOSSES,
    TEXT,
    of_dual,
)
from ds_cmli.config.validation import (
    MOST,
    NameOf,
    NotRegistered,
    build,
    check,
    check_sizes,
    choice,
    shown,
)

Sections = dict[str, dict[str, Any]]  # section -> setting -> value
LossName = Annotated[str, NameOf(LOSSES)]
ImageBackboneName = Annotated[str, NameOf(IMAGE)]
TextBackboneName = Annotated[str, NameOf(TEXT)]
AugmentationName = Literal["random_resized_crop", "horizontal_flip", "color_jitter"]
Resize = Literal["crop", "shortest", "squash", "shortest_pillow", "squash_pillow"]
Interpolation = Literal["bicubic", "bilinear"]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
Name = Annotated[Text, Field(min_length=1)]
Number = Annotated[int, Field(ge=0, le=MOST)]
PositiveCount = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]  # products of two of them are finite in fp32
NotNegative = Annotated[float, Field(ge=0, le=MOST)]
Factor = Annotated[float, Field(ge=1e-9, le=MOST)]
PairCount = Annotated[int, Field(ge=1, le=10**6)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=0.01, le=10, description="1/temperature is at most 100")]


@dataclass(config=STRICT)
class StudentConfig:
    """`models/student.py`.

    Weights are "demo" (the packaged ones), "hub" (by model name), "random", or a local path.
    """

    # A dual encoder as a whole, with its joint space: a folder or a name of the hub of a CLIP or
    # SigLIP model of transformers or of a model of open_clip, open_clip:ARCHITECTURE@WEIGHTS, or a
    # run or an export of this package. It decides the settings of both encoders and how pictures
    # and texts are prepared. "": two encoders, as below.
    source: Text = ""
    # The sizes of the source's model; filled from `source`.
    source_config: dict[str, Any] = Field(default_factory=dict)
    image_backbone: ImageBackboneName = "timm"  # a name of the table in `registry.py`
    image_model: Name = "vit_small_patch14_dinov2"  # timm name
    image_weights: Name = "demo"  # "demo" (packaged), "hub" (by model name), "random", or a path
    # Keyword arguments of timm.create_model.
    image_overrides: dict[str, Any] = Field(default_factory=dict)
    text_backbone: TextBackboneName = "transformers"  # as for images
    text_model: Name = "bert"  # transformers name, or architecture
    text_weights: Name = "demo"  # as for images
    text_overrides: dict[str, Any] = Field(default_factory=dict)  # fields of transformers' config
    # How many first layers of each encoder are kept; null: 6, or all if it has fewer or they are no
    # plain stack.
    layers: PositiveCount | None = None
    # Transformer blocks over both modalities; with `source`, 0 unless given.
    shared_blocks: Annotated[int, Field(ge=0, le=1000)] = 1
    embed_dim: Annotated[int, Field(ge=1, le=2048)] = 256  # D, the embedding dimension
    dropout: BelowOne = 0.1  # after the text encoder's layers, as in BERT's training
    # How many first layers are frozen, together with the embeddings below them; with all layers,
    # the whole encoder is.
    freeze_image: Number = 0
    freeze_text: Number = 0  # the same of the text encoder
    # LoRA (`models/lora.py`): the ends of the names of an encoder's layers that get adapters, such
    # as {"image": ["qkv", "mlp.fc1"], "text": ["query", "value"]}; the rest of it is frozen.
    lora: dict[Literal["image", "text"], Annotated[list[Name], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 8  # of the adapters
    lora_alpha: PositiveCount = 16  # divided by the rank: the factor of the adapters

    def __post_init__(self) -> None:
        check_sizes("student.image_overrides", self.image_overrides)
        check_sizes("student.text_overrides", self.text_overrides)
        own = self.source_config
        known = own.get("model_type") in list(DUAL) and own.keys() >= of_dual("config", own).PARTS
        check(known or not own, "student.source_config", own, "it is filled from student.source")


@dataclass(config=STRICT)
class TeacherConfig:
    """`models/teacher.py`. Weights as for the student."""

    backbone: ImageBackboneName = "timm"  # as the student's
    model: Name = "vit_small_patch14_dinov2"  # timm name
    weights: Name = "demo"  # as the student's
    overrides: dict[str, Any] = Field(default_factory=dict)  # as the student's
    # The features are the output of this block (or stage, for a model in stages), 0-based;
    # negative: from the last.
    block: Annotated[int, Field(ge=-1000, le=1000)] = 9

    def __post_init__(self) -> None:
        check_sizes("teacher.overrides", self.overrides)


@dataclass(config=STRICT)
class DataConfig:
    """`data/`."""

    # "demo" (scenes), or what `registry.py` lists, also by hf://; several are mixed:
    # ["a::0.7", "b::0.3"].
    source: Name | Annotated[list[Name], Field(min_length=1)] = "demo"
    # The demo's captions: "names" of one to four pictures, or "sentences" of three or four, which
    # have words without a place in the picture too.
    scenes: Literal["names", "sentences"] = "names"
    val_source: Text = ""  # "": the validation part of `source`, or else a held-out share of it
    # The part of a source that evaluation uses.
    val_split: Literal["validation", "test"] = "validation"
    # Of a source without a validation part: below 1 a share of its pictures, else how many.
    held_out: Annotated[float, Field(gt=0, description="null: 5%, at most 1,000")] | None = None
    # For sources that have these; "": found automatically:
    image_root: Text = ""  # folder of the image files that a list names
    image_key: Text = ""  # column of the image
    caption_key: Text = ""  # column, or key in JSON, of the caption
    separator: Text = ""  # between columns
    image_size: Annotated[int, Field(ge=1, le=4096)] = 84  # pixels, square
    # "crop": the central square is cut out and resized. "shortest", as CLIP: the shorter side is
    # resized, then the central square is cut out. "squash", as SigLIP: the whole picture is resized
    # to the square. With "_pillow", as open_clip: resized by Pillow, which is slower.
    resize: Resize = "crop"
    interpolation: Interpolation = "bicubic"  # of resizing
    # The longest caption in tokens, with [CLS] and [SEP].
    context_length: Annotated[int, Field(ge=3, le=65536)] = 64
    # How far texts are padded: to the "longest" of the batch, or all "full", to `context_length`,
    # and then the text encoder attends to the padding and is pooled at its end, as SigLIP's.
    padding: Literal["longest", "full"] = "longest"
    # "demo" (MiniLM's), "builtin" (no download), "open_clip" (its BPE), transformers name or local
    # path.
    tokenizer: Name = "demo"
    workers: Annotated[int, Field(ge=0, le=256)] = 0  # data loading processes per rank
    prefetch: Annotated[int, Field(ge=1, le=1024)] = 2  # batches that each process prepares ahead
    # Transforms of training pictures with their strengths: for random_resized_crop the smallest
    # share of the picture's area, for horizontal_flip its probability (note that captions name left
    # and right), for color_jitter the change of brightness, contrast and saturation.
    augmentation: dict[AugmentationName, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict
    )
    # The run stops if the share of broken images and empty captions exceeds this.
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01

    def __post_init__(self) -> None:
        count = self.held_out or 0.0
        need = "give a share below 1, or a whole number of pictures"
        check(count < 1 or count.is_integer(), "data.held_out", self.held_out, need)


@dataclass(config=STRICT)
class LossConfig:
    """`losses/`, `cmli/`."""

    # The losses that are trained, with their weights.
    weights: dict[LossName, Positive] = Field(
        default_factory=lambda: {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}, min_length=1
    )
    # The optimizer step, from 1, at which a loss begins to count; before, it is computed all the
    # same, with weight 0.
    start: dict[LossName, Annotated[int, Field(ge=2, le=MOST)]] = Field(default_factory=dict)
    # Over H: "mean", or "sum" as (7) and (9) are written.
    mse_reduction: Literal["mean", "sum"] = "mean"
    # Of Target-CMLI's two parts, patches (7) and tokens (9), whose mean is (10).
    target_image_weight: Annotated[NotNegative, Field(description="0: not computed")] = 1.0
    target_text_weight: Annotated[NotNegative, Field(description="0: not computed")] = 1.0
    # Pairs of a batch with the same picture or the same caption: with "mask" they are no negatives
    # of each other, and positives in the sigmoid losses; with "keep" they are negatives.
    duplicates: Literal["mask", "keep"] = "mask"
    init_temperature: Temperature = 0.07  # of the global loss
    # Of the CMLI loss, whose means of maxima vary less than cosines.
    cmli_init_temperature: Temperature = 0.02
    # Of the sigmoid losses: which share of pairs they take for positives at first. null: the
    # authors' -10, and -14 of `cmli_sigmoid`, with which batches of some hundred pairs or less
    # learn little at first; ln(1/negatives) suits them, as -3.5 does 32 pairs.
    init_bias: Annotated[float, Field(ge=-100, le=100)] | None = None
    # What computes the all-pairs scores: C++ ("cpu"), kernels for GPUs ("triton"), or PyTorch alone
    # ("torch"). "auto": the device's, where they run.
    cmli_backend: Literal["auto", "cpu", "triton", "torch"] = "auto"
    # Of the losses over pairs: memory for scores and argmax indices, (N + M + 8) bytes a pair;
    # backward computes again those that do not fit. On a GPU also for the pairs of a block.
    cmli_scratch_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 2**27

    def __post_init__(self) -> None:
        for name in self.start:
            need = f"the losses are {', '.join(self.weights)}, without {name}: leave it out"
            check(name in self.weights, "loss.start", self.start, need)
        none = not (self.target_image_weight or self.target_text_weight)
        need = "loss.target_image_weight is 0 too: give one of them, or leave out target_cmli"
        absent = none and "target_cmli" in self.weights
        check(not absent, "loss.target_text_weight", self.target_text_weight, need)
        some = any(self.weights_at(1).values())
        check(some, "loss.start", self.start, "no loss counts in the first step: leave out one")

    def weights_at(self, step: int) -> dict[str, float]:
        """The weights in an optimizer step, counted from 1."""
        before = {name: 0.0 for name, first in self.start.items() if step < first}
        return self.weights | before


@dataclass(config=STRICT)
class OptimConfig:
    """Fills the "auto" values of the DeepSpeed JSON, whose explicit values take precedence."""

    lr: Positive = 1e-4  # the learning rate after warmup
    # Of Adam.
    betas: Annotated[
        tuple[BelowOne, BelowOne], Field(strict=False, description="a list of two")
    ] = (0.9, 0.98)
    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-6  # of Adam
    weight_decay: NotNegative = 0.05  # not on norms, biases and embeddings
    # Factors of the learning rate for parts of the model; "rest" is shared blocks, heads and
    # temperatures.
    lr_factors: dict[Literal["image", "text", "rest"], Factor] = Field(default_factory=dict)
    # The factor of the learning rate per encoder layer downwards.
    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    warmup_share: BelowOne = 0.05  # the share of all steps with linear warmup
    grad_clip: Annotated[NotNegative, Field(description="0: off")] = 1.0  # largest gradient norm
    # The decay of an exponential moving average of the weights, which is evaluated and saved too;
    # 0.999 looks back about 1,000 steps.
    ema_decay: Annotated[BelowOne, Field(description="0: off")] = 0.0
    micro_batch: PairCount = 64  # B, pairs per rank
    # With gradient accumulation: whether an image is compared with the texts of its micro-batch, or
    # of the whole step (gradient caching, which needs a second forward pass and gives the loss of
    # one large batch).
    negatives: Literal["micro_batch", "global_batch"] = "global_batch"
    steps: PositiveCount | None = 300  # optimizer steps; or else `epochs`
    epochs: Annotated[float, Field(gt=0, le=MOST)] | None = None  # or else `steps`

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(
                f"optim.steps is {self.steps} and optim.epochs is {self.epochs}: "
                "give one of the two"
            )

    def warmup_steps(self, total_steps: int) -> int:
        return max(1, round(self.warmup_share * total_steps))


@dataclass(config=STRICT)
class RunConfig:
    """`train.py`."""

    preset: Name = "quick"  # its name, for the record
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of weights, data order and scenes
    output_dir: Text = ""  # "": `runs/<preset>-<date and time>`
    log_every: PositiveCount = 10  # steps from one logged step to the next
    eval_every: Annotated[Number, Field(description="0: only at the end")] = 0  # steps
    eval_batch: PairCount = 50  # pairs per batch of an evaluation
    # The number of held-out pairs of each split, always the same ones, whose match maps evaluations
    # send to TensorBoard.
    match_maps: Annotated[int, Field(ge=0, le=1000, description="0: none")] = 4
    # TensorBoard gets numbers and pictures beside metrics.jsonl; "wandb": Weights & Biases too.
    report_to: Literal["tensorboard", "wandb"] = "tensorboard"
    # Steps between checkpoints.
    save_every: Annotated[Number, Field(description="0: by time alone, and at the end")] = 0
    # Minutes since the last checkpoint after which the next is due.
    save_minutes: Annotated[NotNegative, Field(description="0: by steps alone, and at the end")] = (
        15.0
    )
    keep: PositiveCount = 2  # how many of the newest checkpoints are kept
    # Keep the best evaluation's checkpoint too, and its weights in model.best.safetensors.
    keep_best: bool = False
    # The run ends after this many evaluations in a row without a better result.
    patience: Annotated[Number, Field(description="0: never")] = 0
    # How many steps in a row may be skipped for values that are not finite.
    most_skipped: Number = 5
    # "blocks": torch.compile of each block of the encoders, of the shared blocks and of the
    # teacher, separately.
    compile: Literal["off", "blocks"] = "off"
    # Whether results are bitwise reproducible on the same kind of device.
    deterministic: bool = False
    # The time without progress, in seconds, after which a rank counts as hung or dead.
    watchdog: Annotated[float, Field(ge=0, le=10**6, description="0: off")] = 120.0

    def __post_init__(self) -> None:
        if self.patience and not self.eval_every:
            raise UserError(
                f"run.patience is {self.patience} and nothing is evaluated before the end: give "
                "--eval-every too"
            )
        # Ranks tell each other of their progress several times a second, not more often.
        fits = self.watchdog == 0 or self.watchdog >= 1
        check(fits, "run.watchdog", self.watchdog, "give 1 to 1000000 seconds (0: off)")


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
    def from_dict(cls, values: Sections, written: Mapping[str, str] | None = None) -> "Config":
        """Rebuild a configuration from the values of `to_dict`, as in a run's `run.json`.

        Args:
            written: the names by which the user gave settings, if they differ, as
                `{"optim.lr": "--lr"}`.

        Raises:
            UserError: for the first wrong name or value.
        """
        sections = {field.name: field.default_factory for field in dataclasses.fields(cls)}
        for name in values:
            choice("configuration section", name, sections)
        built: dict[str, object] = {}
        for name, section in sections.items():
            kind: Any = section  # the section's class
            built[name] = build(kind, name, values.get(name, {}), written or {})
        return cls(**built)  # type: ignore[arg-type]


def load_config(path: Path, setting: str) -> Config:
    """Read the configuration from a run's `run.json`.

    Raises `UserError`, which names `setting`, if it cannot be read.
    """
    place = f"{setting} is {str(path.parent)!r}"
    if not path.is_file():
        raise UserError(f"{place}: no {path.name} there; give a run's output folder")
    try:
        content = json_text.read(path, dict, finite=True)
        check(isinstance(content.get("config"), dict), path.name, content, "no run's")
        return Config.from_dict(content["config"])
    except OSError as error:
        raise UserError(f"{place}: cannot read its {path.name}: {error.strerror}") from None
    except NotRegistered as error:
        raise UserError(f"{place}: {error}") from None
    except (UserError, ValueError) as error:
        raise UserError(
            f"{place}: its {path.name} is damaged, or of another version: {error}"
        ) from None


def parse_losses(text: str) -> dict[str, float]:
    """Parse `--losses`: `"global,cmli=0.5"` -> `{"global": 1.0, "cmli": 0.5}`.

    Raises `UserError`.
    """
    weights: dict[str, float] = {}
    for part in text.split(",") if text.strip() else ():
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if name in weights:
            raise UserError(f"--losses has {name!r} twice: keep one")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            name = ""
        if not name:
            raise UserError(
                f"--losses has {part!r}: write NAME or NAME=WEIGHT, for instance cmli=0.5"
            )
    return weights


def parse_settings(settings: tuple[str, ...]) -> Sections:
    """Parse `--set`: `("student.layers=4",)` -> `{"student": {"layers": 4}}`.

    Values are JSON, or else plain text. Raises `UserError`.
    """
    out: Sections = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, key = path.partition(".")
        if not (equals and dot and key):
            raise UserError(
                f"--set is {setting!r}: write SECTION.SETTING=VALUE, for instance student.layers=4"
            )
        try:
            value = parse(text, object, finite=True)
        except ValueError as error:
            if text[:1] in ("{", "["):
                raise UserError(f"--set {path} is {shown(text)}: not valid JSON: {error}") from None
            value = text
        given = out.setdefault(section, {})
        if key in given:
            both = f"{shown(given[key])} and {shown(value)}"
            raise UserError(f"--set {path} is given twice, {both}: keep one")
        given[key] = value
    return out
