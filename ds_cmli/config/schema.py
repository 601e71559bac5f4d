"""The run's configuration: one pydantic dataclass per component, checked when it is built.

No heavy imports here: `--help` and the checks of what a user wrote need no torch.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ds_cmli.common.errors import UserError
from ds_cmli.common.trackers import TRACKERS
from ds_cmli.config.validation import MOST, build, check, choice, parse_json, shown
from ds_cmli.losses import LOSSES
from ds_cmli.models import AUTO, IMAGE, TEXT

if TYPE_CHECKING:
    Loss = str
    ImageBackbone = str
    TextBackbone = str
    TrackerName = str
else:
    Loss = Literal[tuple(LOSSES)]
    ImageBackbone = Literal[tuple([AUTO, *IMAGE])]
    TextBackbone = Literal[tuple([AUTO, *TEXT])]
    TrackerName = Literal[tuple(TRACKERS)]

Augmentation = Literal["random_resized_crop", "horizontal_flip", "color_jitter"]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
Name = Annotated[Text, Field(min_length=1)]
Number = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=0.01, le=10, description="1/temperature is at most 100")]


@dataclass(config=STRICT)
class StudentConfig:
    """`models/student.py`. Weights: "demo" (the packaged ones), "hub" (by model name), "random", or a local path."""

    image_backbone: ImageBackbone = "auto"  # of the table in `models`; auto: the one that takes the model
    image_model: Name = "vit_small_patch14_dinov2"  # timm name
    image_weights: Name = "demo"
    image_overrides: dict[str, Any] = Field(default_factory=dict)  # keyword arguments of timm.create_model
    text_backbone: TextBackbone = "auto"
    text_model: Name = "bert"  # transformers name, or architecture
    text_weights: Name = "demo"
    text_overrides: dict[str, Any] = Field(default_factory=dict)  # fields of the transformers config
    # First layers kept of each encoder; null: 6, and all of an encoder that has fewer or no plain stack of them.
    layers: Count | None = None
    shared_blocks: Count = 1  # Transformer blocks over both modalities
    embed_dim: Annotated[int, Field(ge=1, le=1024)] = 256  # D, the embedding dimension
    dropout: BelowOne = 0.1  # behind the text encoder's layers, as BERT was trained
    weights_partial: bool = False  # weights may lack blocks, which start random then
    # Layers from the first on that are not trained, with the embeddings below them; all of them: the whole encoder.
    freeze_image: Number = 0
    freeze_text: Number = 0


@dataclass(config=STRICT)
class TeacherConfig:
    """`models/teacher.py`. Weights as for the student."""

    backbone: ImageBackbone = "auto"  # as the student's
    model: Name = "vit_small_patch14_dinov2"  # timm name
    weights: Name = "demo"
    overrides: dict[str, Any] = Field(default_factory=dict)
    # Features after this block (or stage of a model in stages), 0-based; negative: from the last.
    block: Annotated[int, Field(ge=-1000, le=1000)] = 9
    weights_partial: bool = False  # as the student's


@dataclass(config=STRICT)
class DataConfig:
    """`data/`."""

    # "demo" (scenes), or what `data/sources/__init__.py` lists; several are mixed: ["a::0.7", "b::0.3"].
    source: Name | Annotated[list[Name], Field(min_length=1)] = "demo"
    val_source: Text = ""  # "": the validation part of `source`, or else some of it that is held out
    val_split: Literal["validation", "test"] = "validation"  # which part of a source that has both is evaluated on
    # Of sources that have such; "": found.
    image_root: Text = ""  # folder of the image files that a list names
    image_key: Text = ""  # column of the image
    caption_key: Text = ""  # column, or key in JSON, of the caption
    separator: Text = ""  # of columns
    image_size: Annotated[int, Field(ge=1, le=4096)] = 84  # pixels, square
    context_length: Annotated[int, Field(ge=3, le=65536)] = 64  # longest caption in tokens, with [CLS] and [SEP]
    tokenizer: Name = "demo"  # "demo" (MiniLM's), "builtin" (no download), transformers name or local path
    workers: Annotated[int, Field(ge=0, le=256)] = 0  # data loading processes per rank
    prefetch: Annotated[int, Field(ge=1, le=1024)] = 2  # batches that each of them prepares ahead
    # Of training pictures, each with its strength: random_resized_crop the smallest share of the picture's area,
    # horizontal_flip its probability (captions name left and right), color_jitter the change of brightness, contrast
    # and saturation.
    augmentation: dict[Augmentation, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    # Broken images and empty captions above this share stop the run.
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_pixels: Annotated[int, Field(ge=1, le=2**32)] = 64_000_000  # of an image file; a larger one counts as broken
    follow_symlinks: bool = False  # also to files outside the folder


@dataclass(config=STRICT)
class LossConfig:
    """`losses/`, `cmli/`."""

    weights: dict[Loss, Positive] = Field(
        default_factory=lambda: dict[Loss, float]({"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}), min_length=1
    )
    mse_reduction: Literal["mean", "sum"] = "mean"  # over H: "mean", or "sum" as (7) and (9) are written
    # Whose patches Target-CMLI matches the tokens with: "teacher" (the document) or "student".
    match: Literal["teacher", "student"] = "teacher"
    # Pairs of a batch with the same picture or the same caption: "mask": no negatives of each other, and positives in
    # the sigmoid losses; "keep": negatives.
    duplicates: Literal["mask", "keep"] = "mask"
    init_temperature: Temperature = 0.07  # of the global loss
    cmli_init_temperature: Temperature = 0.02  # of the CMLI loss: a mean of maxima spreads less than a cosine
    cmli_backend: Literal["auto", "chunked", "triton"] = "auto"
    cmli_recompute: bool = False
    # Share of the patches and tokens that the all-pairs scores of training compare, those that match best in their
    # micro-batch: FILIP's approximation, which keeps 0.25. Below 1 the scores are no longer exact.
    cmli_token_keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    cmli_scratch_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 64 * 2**20
    # Texts of other ranks: "gather" all of them, "ring": one rank's at a time goes round, "auto": a ring where the
    # gathered texts and their gradient would take more than `cmli_gather_bytes`.
    cmli_exchange: Literal["auto", "gather", "ring"] = "auto"
    cmli_gather_bytes: Annotated[int, Field(ge=0, le=2**50)] = 2**30


@dataclass(config=STRICT)
class OptimConfig:
    """Fills the "auto" values of the DeepSpeed JSON, whose own numbers always win."""

    lr: Positive = 1e-4
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.98)  # JSON gives a list
    eps: Positive = 1e-6
    weight_decay: NotNegative = 0.05  # not on norms, biases and embeddings
    # What multiplies the learning rate of a part; "rest": shared blocks, heads and temperatures.
    lr_factors: dict[Literal["image", "text", "rest"], Positive] = Field(default_factory=dict)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the learning rate, a layer of an encoder downwards
    warmup_share: BelowOne = 0.05  # of all steps, linear
    grad_clip: Annotated[float, Field(ge=0, description="0: off")] = 1.0
    # Of an exponential moving average of the weights, evaluated and saved beside them; 0.999 looks back 1,000 steps.
    ema_decay: Annotated[BelowOne, Field(description="0: off")] = 0.0
    micro_batch: Count = 64  # B, pairs per rank
    # Where accumulation makes a step of several micro-batches: which texts an image is compared with, those of its own
    # micro-batch or of the whole step (gradient caching: a second forward pass, and the loss of one large batch).
    negatives: Literal["micro_batch", "global_batch"] = "global_batch"
    cache_on_host: bool = False  # the features of the step's micro-batches wait in the host's memory
    # Over ranks once a step, at ZeRO stages 2 and 3 too: each rank then holds all gradients, in the model's precision.
    reduce_once: bool = False
    steps: Count | None = 300
    epochs: Annotated[float, Field(gt=0, le=MOST)] | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"optim.steps is {self.steps} and optim.epochs is {self.epochs}: give one of the two")

    def warmup_steps(self, total_steps: int) -> int:
        return max(1, round(self.warmup_share * total_steps))


@dataclass(config=STRICT)
class RunConfig:
    """`train.py`."""

    preset: Name = "demo"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output_dir: Text = ""  # "": runs/<preset>-<date and time>
    log_every: Count = 10  # steps
    eval_every: Annotated[Number, Field(description="0: only at the end")] = 0  # steps
    eval_batch: Count = 50  # pairs a step of the evaluation
    # Held-out pairs of each split whose match maps every evaluation shows in the trackers, always the same ones.
    match_maps: Annotated[int, Field(ge=0, le=1000, description="0: none")] = 4
    # Where numbers and pictures go beside metrics.jsonl.
    report_to: list[TrackerName] = Field(default_factory=lambda: list[TrackerName](["tensorboard"]))
    save_every: Annotated[Number, Field(description="0: by time alone, and at the end")] = 0  # steps
    # Since the last checkpoint.
    save_minutes: Annotated[NotNegative, Field(description="0: by steps alone, and at the end")] = 15.0
    keep: Count = 2  # checkpoints
    keep_best: bool = False  # that of the best evaluation stays too, and its student in student-best.safetensors
    # Evaluations in a row without a better result that end the run.
    patience: Annotated[Number, Field(description="0: never")] = 0
    most_skipped: Number = 5  # steps in a row skipped for values that are not finite
    # torch.compile of the encoders' and the shared blocks and of the teacher's, each block for itself.
    compile: Literal["off", "blocks"] = "off"
    deterministic: bool = False  # the same bits again on the same kind of device
    # Seconds without progress after which a rank counts as hung or dead.
    watchdog: Annotated[NotNegative, Field(description="0: off")] = 120.0

    def __post_init__(self):
        if self.patience and not self.eval_every:
            raise UserError(
                f"run.patience is {self.patience} and nothing is evaluated before the end: give --eval-every too"
            )


@dataclasses.dataclass
class Config:
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], written: Mapping[str, str] | None = None) -> "Config":
        """Rebuild a configuration from `to_dict`, for instance out of a run's `config.json`.

        Args:
            written: what the user calls a setting where that is not its own name: `{"optim.lr": "--lr"}`.

        Raises:
            UserError: the first name or value that cannot be.
        """
        sections = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        values = with_new_names(values)
        for name in values:
            choice("configuration section", name, sections)
        built = {n: build(s, n, values.get(n, {}), written or {}) for n, s in sections.items()}  # type: ignore[arg-type]
        return cls(**built)


# Settings by their former names, which stay valid: (section, former name) -> name.
FORMER = {("data", "text_positions"): "context_length"}


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of the sections with former names replaced. Raises `UserError` where both names are given."""
    out = {section: dict(settings) if isinstance(settings, dict) else settings for section, settings in values.items()}
    for (section, former), name in FORMER.items():
        settings = out.get(section)
        if isinstance(settings, dict) and former in settings:
            check(name not in settings, f"{section}.{former}", settings[former], f"{section}.{name} is given too")
            settings[name] = settings.pop(former)
    return out


def load_config(path: Path, setting: str) -> Config:
    """The configuration out of a run's `config.json`; raises `UserError`, naming `setting`, where there is none."""
    place = f"{setting} is {str(path.parent)!r}"
    if not path.is_file():
        raise UserError(f"{place}: no config.json there; give a run's output folder")
    try:
        content = parse_json(path.read_text())
        check(isinstance(content, dict) and isinstance(content.get("config"), dict), path.name, content, "no run's")
        return Config.from_dict(content["config"])
    except OSError as error:
        raise UserError(f"{place}: cannot read its config.json: {error.strerror}") from None
    except (UserError, ValueError) as error:
        raise UserError(f"{place}: its config.json is damaged, or of another version: {error}") from None


def parse_losses(text: str) -> dict[str, float]:
    """`"global,cmli=0.5"` -> `{"global": 1.0, "cmli": 0.5}`."""
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
            raise UserError(f"--losses has {part!r}: write NAME or NAME=WEIGHT, for instance cmli=0.5")
    return weights


def parse_settings(settings: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """`("student.layers=4",)` -> `{"student": {"layers": 4}}`; values are JSON, or else plain text."""
    out: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        section, dot, key = path.partition(".")
        if not (equals and dot and key):
            raise UserError(f"--set is {setting!r}: write SECTION.SETTING=VALUE, for instance student.layers=4")
        try:
            parsed = parse_json(value)
        except ValueError as error:
            if value[:1] in ("{", "["):
                raise UserError(f"--set {path} is {shown(value)}: not valid JSON: {error}") from None
            parsed = value
        if key in out.setdefault(section, {}):
            raise UserError(f"--set {path} is given twice, {shown(out[section][key])} and {shown(parsed)}: keep one")
        out[section][key] = parsed
    return out
