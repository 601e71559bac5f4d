"""The settings of a run: one pydantic dataclass per component, checked when it is built.

The comment above or behind a field says what it means; docs/settings.md is made of these. This
module has no heavy imports: `--help` and the checks of the user's settings do not need torch.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from ds_cmli.common import JsonObject, Section, UserError, nearest, read_json
from ds_cmli.config.registry import IMAGE, LOSSES, TEXT

Sections = dict[str, dict[str, Any]]  # section -> setting -> value
AugmentationName = Literal["random_resized_crop", "horizontal_flip", "color_jitter"]
Resize = Literal["crop", "shortest", "squash", "shortest_pillow", "squash_pillow"]
Interpolation = Literal["bicubic", "bilinear"]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
MOST = 10**9  # of counts and factors: products of two of them are finite in fp32
SHOWN = 200  # the maximum number of characters of a value in a message
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
Name = Annotated[Text, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
Number = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
NotNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Strength = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0.01, le=10)]
Pairs = Annotated[int, Field(ge=1, le=10**6)]
Betas = Annotated[tuple[BelowOne, BelowOne], Field(strict=False)]
Settings = TypeVar("Settings")  # a section of them


def empty() -> Any:
    return Field(default_factory=dict)


@dataclass(config=STRICT)
class StudentConfig:
    # A dual encoder as a whole, with its joint space: a folder or a name of the hub of a CLIP or
    # SigLIP model of transformers or of a model of open_clip, open_clip:ARCHITECTURE@WEIGHTS, or a
    # run or an export of this package. It decides the settings of both encoders and how pictures
    # and texts are prepared. "": two encoders, as below.
    source: Text = ""
    # The sizes of the source's model; filled from `source`.
    source_config: dict[str, Any] = empty()
    image_backbone: Name = "timm"  # a name of the table in `registry.py`
    image_model: Name = "vit_small_patch14_dinov2"  # timm name
    image_weights: Name = "demo"  # "demo" (packaged), "hub" (by model name), "random", or a path
    image_overrides: dict[str, Any] = empty()  # keyword arguments of timm.create_model
    text_backbone: Name = "transformers"  # as for images
    text_model: Name = "bert"  # transformers name, or architecture
    text_weights: Name = "demo"  # as for images
    text_overrides: dict[str, Any] = empty()  # fields of transformers' config
    # How many first layers of each encoder are kept; null: 6, or all if it has fewer or they are no
    # plain stack.
    layers: Count | None = None
    # Transformer blocks over both modalities; with `source`, 0 unless given.
    shared_blocks: Annotated[int, Field(ge=0, le=1000)] = 1
    embed_dim: Annotated[int, Field(ge=1, le=2048)] = 256  # D, the embedding dimension
    dropout: BelowOne = 0.1  # after the text encoder's layers, as in BERT's training
    # How many first layers are frozen, together with the embeddings below them; with all layers,
    # the whole encoder is.
    freeze_image: Number = 0
    freeze_text: Number = 0  # the same of the text encoder
    # LoRA (`models/blocks.py`): the ends of the names of an encoder's layers that get adapters, as
    # {"image": ["qkv", "mlp.fc1"], "text": ["query", "value"]}; the rest of it is frozen.
    lora: dict[Literal["image", "text"], Names] = empty()
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 8  # of the adapters
    lora_alpha: Count = 16  # divided by the rank: the factor of the adapters

    def __post_init__(self) -> None:
        choice("student.image_backbone", self.image_backbone, IMAGE)
        choice("student.text_backbone", self.text_backbone, TEXT)


@dataclass(config=STRICT)
class TeacherConfig:
    backbone: Name = "timm"  # as the student's
    model: Name = "vit_small_patch14_dinov2"  # timm name
    weights: Name = "demo"  # as the student's
    overrides: dict[str, Any] = empty()  # as the student's
    # The features are the output of this block (or stage, for a model in stages), 0-based;
    # negative: from the last.
    block: Annotated[int, Field(ge=-1000, le=1000)] = 9

    def __post_init__(self) -> None:
        choice("teacher.backbone", self.backbone, IMAGE)


@dataclass(config=STRICT)
class DataConfig:
    # "demo" (scenes), or what `registry.py` lists, also by hf://; several are mixed:
    # ["a::0.7", "b::0.3"].
    source: Name | Names = "demo"
    # The demo's captions: "names" of one to four pictures, or "sentences" of three or four, which
    # have words without a place in the picture too.
    scenes: Literal["names", "sentences"] = "names"
    val_source: Text = ""  # "": the validation part of `source`, or else a held-out share of it
    # The part of a source that evaluation uses.
    val_split: Literal["validation", "test"] = "validation"
    # Of a source without a validation part: below 1 a share of its pictures, else how many; null:
    # 5%, at most 1,000.
    held_out: Annotated[float, Field(gt=0)] | None = None
    image_root: Text = ""  # folder of the image files that a list names; "": the list's
    image_key: Text = ""  # column of the image; "": detected
    caption_key: Text = ""  # column, or key in JSON, of the caption; "": detected
    separator: Text = ""  # between columns; "": detected
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
    augmentation: dict[AugmentationName, Strength] = empty()
    # The run stops if the share of broken images and empty captions exceeds this.
    max_bad_share: Share = 0.01

    def __post_init__(self) -> None:
        count = self.held_out or 0.0
        need = "give a share below 1, or a whole number of pictures"
        check(count < 1 or count.is_integer(), "data.held_out", self.held_out, need)


@dataclass(config=STRICT)
class LossConfig:
    # The losses that are trained, with their weights, of the table in `registry.py`: "global",
    # "global_sigmoid", "cmli", "cmli_sigmoid", "target_cmli", "cls_kd".
    weights: dict[str, Positive] = Field(
        default_factory=lambda: {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}, min_length=1
    )
    # The optimizer step, from 1, at which a loss begins to count; before, it is computed all the
    # same, with weight 0.
    start: dict[str, Annotated[int, Field(ge=2, le=MOST)]] = empty()
    # Over H: "mean", or "sum" as (7) and (9) are written.
    mse_reduction: Literal["mean", "sum"] = "mean"
    # Of Target-CMLI's two parts, patches (7) and tokens (9), whose mean is (10); 0: not computed.
    target_image_weight: NotNegative = 1.0
    target_text_weight: NotNegative = 1.0  # as for patches
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
        for name in self.weights:
            choice("loss.weights", name, LOSSES)
        for name in self.start:
            choice("loss.start", name, self.weights)
        some = self.target_image_weight or self.target_text_weight
        need = "loss.target_image_weight is 0 too: give one of them, or leave out target_cmli"
        fits = bool(some) or "target_cmli" not in self.weights
        check(fits, "loss.target_text_weight", self.target_text_weight, need)
        need = "no loss counts in the first step: leave out one"
        check(any(self.weights_at(1).values()), "loss.start", self.start, need)

    def weights_at(self, step: int) -> dict[str, float]:
        """The weights in an optimizer step, counted from 1."""
        return self.weights | {name: 0.0 for name, first in self.start.items() if step < first}


@dataclass(config=STRICT)
class OptimConfig:
    """Fills the "auto" values of the DeepSpeed JSON, whose explicit values take precedence."""

    lr: Positive = 1e-4  # the learning rate after warmup
    betas: Betas = (0.9, 0.98)  # of Adam
    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-6  # of Adam
    weight_decay: NotNegative = 0.05  # not on norms, biases and embeddings
    # Factors of the learning rate for parts of the model; "rest" is shared blocks, heads and
    # temperatures.
    lr_factors: dict[
        Literal["image", "text", "rest"], Annotated[float, Field(ge=1e-9, le=MOST)]
    ] = empty()
    # The factor of the learning rate per encoder layer downwards.
    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    warmup_share: BelowOne = 0.05  # the share of all steps with linear warmup
    grad_clip: NotNegative = 1.0  # largest gradient norm; 0: off
    # The decay of an exponential moving average of the weights, which is evaluated and saved too;
    # 0.999 looks back about 1,000 steps; 0: off.
    ema_decay: BelowOne = 0.0
    micro_batch: Pairs = 64  # B, pairs per rank
    # With gradient accumulation: whether an image is compared with the texts of its micro-batch, or
    # of the whole step (gradient caching, which needs a second forward pass and gives the loss of
    # one large batch).
    negatives: Literal["micro_batch", "global_batch"] = "global_batch"
    steps: Count | None = 300  # optimizer steps; or else `epochs`
    epochs: Positive | None = None  # or else `steps`

    def __post_init__(self) -> None:
        need = f"optim.epochs is {self.epochs}: give one of the two"
        check((self.steps is None) != (self.epochs is None), "optim.steps", self.steps, need)

    def warmup_steps(self, total_steps: int) -> int:
        return max(1, round(self.warmup_share * total_steps))


@dataclass(config=STRICT)
class RunConfig:
    preset: Name = "quick"  # its name, for the record
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of weights, data order and scenes
    output_dir: Text = ""  # "": `runs/<preset>-<date and time>`
    log_every: Count = 10  # steps from one logged step to the next
    eval_every: Number = 0  # steps; 0: only at the end
    eval_batch: Pairs = 50  # pairs per batch of an evaluation
    # The number of held-out pairs of each split, always the same ones, whose match maps evaluations
    # send to TensorBoard; 0: none.
    match_maps: Annotated[int, Field(ge=0, le=1000)] = 4
    # TensorBoard gets numbers and pictures beside metrics.jsonl; "wandb": Weights & Biases too.
    report_to: Literal["tensorboard", "wandb"] = "tensorboard"
    save_every: Number = 0  # steps between checkpoints; 0: by time alone, and at the end
    # Minutes since the last checkpoint after which the next is due; 0: by steps alone, and at the
    # end.
    save_minutes: NotNegative = 15.0
    keep: Count = 2  # how many of the newest checkpoints are kept
    # Keep the best evaluation's checkpoint too, and its weights in model.best.safetensors.
    keep_best: bool = False
    # The run ends after this many evaluations in a row without a better result; 0: never.
    patience: Number = 0
    # How many steps in a row may be skipped for values that are not finite.
    most_skipped: Number = 5
    # "blocks": torch.compile of each block of the encoders, of the shared blocks and of the
    # teacher, separately.
    compile: Literal["off", "blocks"] = "off"
    # Whether results are bitwise reproducible on the same kind of device.
    deterministic: bool = False
    # The time without progress, in seconds, after which a rank counts as hung or dead; at least 1,
    # or 0: off.
    watchdog: Annotated[float, Field(ge=0, le=10**6)] = 120.0

    def __post_init__(self) -> None:
        need = "nothing is evaluated before the end: give --eval-every too"
        check(not self.patience or bool(self.eval_every), "run.patience", self.patience, need)
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
    def from_dict(cls, values: Mapping[str, Section]) -> "Config":
        """Build a configuration from sections of settings; what is not given has its default.

        Raises `UserError` for the first wrong name or value.
        """
        check_sections(values)
        built = {name: build(kind, name, values.get(name, {})) for name, kind in SECTIONS.items()}
        return cls(**built)


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}


def check_sections(values: Mapping[str, object]) -> None:
    """Raise `UserError` for what is no section of settings."""
    for name, settings in values.items():
        places = [
            f"{of}.{name}" for of, kind in SECTIONS.items() if name in kind.__dataclass_fields__
        ]
        hint = f"did you mean {places[0]}?" if places else nearest(str(name), SECTIONS)
        check(name in SECTIONS, "section of settings", name, hint)
        check(isinstance(settings, Mapping), name, settings, "give a mapping of settings")


def build(kind: type[Settings], section: str, values: Section) -> Settings:
    """The section of these values. Raises `UserError` for the first wrong name or value."""
    for name in values:
        choice(f"setting of {section}", name, kind.__dataclass_fields__)  # type: ignore[attr-defined]
    try:
        return kind(**values)
    except ValidationError as error:
        raise refusal(error, section, values) from None


# --- messages


def check(ok: bool, setting: str, value: object, need: str) -> None:
    """Raise a one-line `UserError` for the setting unless `ok`; `need` says what to give."""
    if not ok:
        raise UserError(f"{setting} is {shown(value)}: {need}")


def choice(setting: str, value: object, known: Collection[object]) -> None:
    """Raise a one-line `UserError` for a value that is not known, with the nearest that is."""
    check(value in known, setting, value, nearest(str(value), known))


def shown(value: object) -> str:
    """The value as a message shows it; a long one is shortened."""
    text = repr(value)
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]} ... {text[-20:]} ({len(text)} characters)"


def refusal(error: ValidationError, section: str, values: Section) -> UserError:
    """The first mistake that pydantic finds, in one line: the setting, its value, what it takes."""
    problems = error.errors(include_url=False)
    first, path = problems[0]["loc"], list[int | str]()
    value: Any = values
    for key in first:
        if not isinstance(value, Mapping) or key not in value:
            break
        path.append(key)
        value = value[key]
    setting = ".".join([*filter(None, [section]), *map(str, path)])
    if problems[0]["type"] == "missing" and isinstance(value, Mapping):
        return UserError(f"{setting}.{first[-1]} is missing: give it")
    # A setting of several types has a message for each of them.
    needs = dict.fromkeys(p["msg"] for p in problems if p["loc"][: len(path)] == tuple(path))
    return UserError(f"{setting} is {shown(value)}: {' or: '.join(needs)}")


def words(text: str) -> set[str]:
    return set(text.split())


# --- the settings of a run, of --set and of --losses


def load_config(path: Path, setting: str) -> Config:
    """Read the configuration from a run's `run.json`.

    Raises `UserError`, which names `setting`, if it cannot be read.
    """
    place = f"{setting} is {str(path.parent)!r}"
    if not path.is_file():
        raise UserError(f"{place}: no {path.name} there; give a run's output folder")
    try:
        content = read_json(path)
        check(isinstance(content.get("config"), dict), path.name, content, "no run's")
        return Config.from_dict(content["config"])
    except OSError as error:
        raise UserError(f"{place}: cannot read its {path.name}: {error.strerror}") from None
    except (UserError, ValueError) as error:
        raise UserError(
            f"{place}: its {path.name} is damaged, of another version, or needs a --plugin: {error}"
        ) from None


def parse_losses(text: str) -> dict[str, float]:
    """Parse `--losses`: `"global,cmli=0.5"` -> `{"global": 1.0, "cmli": 0.5}`."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            name = ""
        check(
            bool(name), "--losses", text, "write NAME or NAME=WEIGHT by comma, as global,cmli=0.5"
        )
    return weights


def parse_settings(settings: tuple[str, ...]) -> Sections:
    """Parse `--set`: `("student.layers=4",)` -> `{"student": {"layers": 4}}`.

    Values are JSON, or else plain text. Of a setting that is given twice the last one counts.
    """
    out: Sections = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, key = path.partition(".")
        need = "write SECTION.SETTING=VALUE, for instance student.layers=4"
        check(bool(equals and dot and key), "--set", setting, need)
        try:
            value: object = json.loads(text)
        except ValueError as error:
            valid = not text.startswith(("{", "["))
            check(valid, f"--set {path}", text, f"not valid JSON: {error}")
            value = text
        out.setdefault(section, {})[key] = value
    return out


# --- the settings that a resumed run must have kept

# No step depends on the rest of `run`, and on these: output, evaluation, checkpoints, loading.
OF_STEPS = {"run.seed", "run.compile", "run.deterministic"}
FREE = {"loss.cmli_scratch_bytes", "data.workers", "data.prefetch", "data.max_bad_share"}
# Likewise keys of the DeepSpeed JSON.
FREE_KEYS = words("""
    checkpoint comms_logger csv_monitor dump_state flops_profiler log_level memory_breakdown
    steps_per_print tensorboard timers wall_clock_breakdown wandb
""")
# How the global batch is split over ranks. If the number of ranks changes, these change and the
# global batch does not.
BATCH_SPLIT = {"optim.micro_batch", "deepspeed.train_micro_batch_size_per_gpu"}
MOST_DIFFERENCES = 20  # in a message, as hundreds of data files may differ


def compared(config: Config, ds_config: Section, data: Section | None = None) -> JsonObject:
    """The settings that must not change, as JSON values: `{"student.layers": 6, ...}`.

    Args:
        data: `Data.fingerprint`, which identifies the data.
    """
    deepspeed = {key: value for key, value in ds_config.items() if key not in FREE_KEYS}
    flat = flatten({**config.to_dict(), "deepspeed": deepspeed})
    if data:
        flat |= flatten({"sources": dict(data)})
    kept = {k: v for k, v in flat.items() if not k.startswith("run.") or k in OF_STEPS}
    return json.loads(json.dumps({k: v for k, v in kept.items() if k not in FREE}))


def flatten(value: object, path: str = "") -> JsonObject:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    out: JsonObject = {}
    for key, item in value.items():
        out |= flatten(item, f"{path}.{key}" if path else str(key))
    return out


def differences(before: JsonObject, now: JsonObject, same_ranks: bool) -> list[str]:
    """The differences as text: `["optim.lr: 0.001 -> 0.002", ...]`.

    Without `same_ranks`, `BATCH_SPLIT` is ignored.
    """
    lines = []
    for name in sorted({*before, *now} - (set() if same_ranks else BATCH_SPLIT)):
        old, new = (json.dumps(of[name]) if name in of else "not set" for of in (before, now))
        if before.get(name, name) != now.get(name, name):
            lines.append(f"{name}: {old} -> {new}")
    more = len(lines) - MOST_DIFFERENCES
    return lines if more <= 0 else [*lines[:MOST_DIFFERENCES], f"{more} more"]
