"""The settings of a run: one pydantic dataclass per component, checked when it is built.

The comment above or behind a field says what it means: `--help` and docs/settings.md. This
module has no heavy imports: `--help` and the checks of the user's settings do not need torch.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from ds_cmli.config.messages import check, choice, setting_of_error, words
from ds_cmli.config.registry import IMAGE, LOSSES, TEXT
from ds_cmli.errors import UserError, one_line
from ds_cmli.files import JsonObject, Section, read_json

Sections = dict[str, dict[str, Any]]  # section -> setting -> value
AugmentationName = Literal["random_resized_crop", "horizontal_flip", "color_jitter"]
Resize = Literal["crop", "shortest", "squash", "shortest_pillow", "squash_pillow"]
Interpolation = Literal["bicubic", "bilinear"]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
MOST = 10**9  # of counts and factors: products of two of them are finite in fp32
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
Name = Annotated[Text, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
Number = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
NotNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
EMPTY: Any = Field(default_factory=dict)
Temperature = Annotated[float, Field(ge=0.01, le=10)]


@dataclass(config=STRICT)
class StudentConfig:
    # A CLIP, SigLIP or model of open_clip (a folder, or a name of the hub), a run or an export to
    # start from, which decides other settings (docs/finetune.md); "": two encoders.
    source: Text = ""
    source_config: dict[str, Any] = EMPTY  # the sizes of its model; filled from `source`
    image_backbone: Name = "timm"  # "timm", or a plugin's (docs/plugins.md)
    image_model: Name = "vit_small_patch14_dinov2"  # timm name
    image_weights: Name = "demo"  # "demo" (packaged), "hub" (by model name), "random", or a path
    image_overrides: dict[str, Any] = EMPTY  # keyword arguments of timm.create_model
    text_backbone: Name = "transformers"  # "transformers", or a plugin's
    text_model: Name = "bert"  # transformers name, or architecture
    text_weights: Name = "demo"  # as for images
    text_overrides: dict[str, Any] = EMPTY  # fields of transformers' config
    # First layers of each encoder that are kept; null: 6, or all if they are fewer or no stack.
    layers: Count | None = None
    # Transformer blocks over both modalities; with `source`, 0 unless given.
    shared_blocks: Annotated[int, Field(ge=0, le=1000)] = 1
    embed_dim: Annotated[int, Field(ge=1, le=2048)] = 256  # D, the embedding dimension
    dropout: BelowOne = 0.1  # after the text encoder's layers, as in BERT's training
    freeze_image: Number = 0  # first layers that are frozen, with the embeddings below
    freeze_text: Number = 0  # the same of the text encoder
    # LoRA: ends of names of layers that get adapters, as {"text": ["query"]}; the rest is frozen.
    lora: dict[Literal["image", "text"], Names] = EMPTY
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 8  # of the adapters
    lora_alpha: Count = 16  # divided by the rank: the factor of the adapters

    def __post_init__(self) -> None:
        choice("student.image_backbone", self.image_backbone, IMAGE)
        choice("student.text_backbone", self.text_backbone, TEXT)


@dataclass(config=STRICT)
class TeacherConfig:
    model: Name = "vit_small_patch14_dinov2"  # timm name
    weights: Name = "demo"  # as the student's
    overrides: dict[str, Any] = EMPTY  # as the student's
    # The features are the output of this block, or stage, 0-based; negative: from the last.
    block: Annotated[int, Field(ge=-1000, le=1000)] = 9


@dataclass(config=STRICT)
class DataConfig:
    # "demo" (scenes); a folder, tars, parquet, CSV or JSON of pairs, also by
    # hf://datasets/OWNER/NAME (docs/data.md); or several, each with a share as WHAT::0.7.
    source: Name | Names = "demo"
    # Captions of the demo: "names" of one to four pictures, or "sentences" with other words too.
    scenes: Literal["names", "sentences"] = "names"
    val_source: Text = ""  # pairs to evaluate on; "": the validation part of `source`, or a share
    # Without a validation part: below 1 a share of pictures, else how many; null: 5%, up to 1,000.
    held_out: Positive | None = None
    image_root: Text = ""  # folder of the images that a table or JSON names; "": the list's
    image_key: Text = ""  # column of the image; "": detected
    caption_key: Text = ""  # column, or key in JSON, of the caption; "": detected
    image_size: Annotated[int, Field(ge=1, le=4096)] = 84  # pixels, square
    # "crop": the central square is resized. "shortest", as CLIP: the shorter side is resized, then
    # the square cut out. "squash", as SigLIP: all is resized. "_pillow": by Pillow, as open_clip.
    resize: Resize = "crop"
    interpolation: Interpolation = "bicubic"  # of resizing
    # The longest caption in tokens, with [CLS] and [SEP].
    context_length: Annotated[int, Field(ge=3, le=65536)] = 64
    # Texts are padded to the batch's "longest", or "full" and the padding attended to, as SigLIP.
    padding: Literal["longest", "full"] = "longest"
    # "demo" (MiniLM's), "builtin" (no download), "open_clip" (its BPE), transformers name or path.
    tokenizer: Name = "demo"
    workers: Annotated[int, Field(ge=0, le=256)] = 0  # data loading processes per rank
    # Shards whose samples are shuffled together; 0: all; null: 64 of remote tars, and of tars with
    # more than 10 million pictures, else all.
    shuffle_window: Number | None = None
    # Transforms of training pictures: the smallest share of the area that a crop keeps, the
    # probability of a flip (captions may name left and right), the change of colours.
    augmentation: dict[AugmentationName, Share] = EMPTY
    # The run stops if the share of broken images and empty captions exceeds this.
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01


@dataclass(config=STRICT)
class LossConfig:
    # Weights of global, global_sigmoid, cmli, cmli_sigmoid, target_cmli, cls_kd; or of a plugin's.
    weights: dict[str, Positive] = Field(
        default_factory=lambda: {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}, min_length=1
    )
    mse_reduction: Literal["mean", "sum"] = "mean"  # over H; (7) and (9) are written as sums
    target_image_weight: NotNegative = 1.0  # of patches (7) in the mean (10); 0: off
    target_text_weight: NotNegative = 1.0  # of tokens (9) in it; 0: off
    init_temperature: Temperature = 0.07  # of the global loss
    cmli_init_temperature: Temperature = 0.02  # of CMLI, whose means of maxima vary less
    # Of the sigmoid losses. null: the authors' -10, and -14 of `cmli_sigmoid`; with some hundred
    # pairs or fewer ln(1/negatives) learns faster, as -3.5 of 32.
    init_bias: Annotated[float, Field(ge=-100, le=100)] | None = None
    # What computes all-pairs scores: C++ ("cpu"), kernels of GPUs ("triton"), or PyTorch ("torch").
    cmli_backend: Literal["auto", "cpu", "triton", "torch"] = "auto"

    def __post_init__(self) -> None:
        for name in self.weights:
            choice("loss.weights", name, LOSSES)


@dataclass(config=STRICT)
class OptimConfig:
    """Fills the "auto" values of the DeepSpeed JSON, whose explicit values take precedence."""

    lr: Positive = 1e-4  # the learning rate after warmup, where the JSON says "auto"
    weight_decay: NotNegative = 0.05  # not on norms, biases and embeddings
    # Factors of the learning rate; "rest" is shared blocks, heads and temperatures.
    lr_factors: dict[Literal["image", "text", "rest"], Positive] = EMPTY
    # The factor of the learning rate per encoder layer downwards.
    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    warmup_share: BelowOne = 0.05  # the share of all steps with linear warmup
    grad_clip: NotNegative = 1.0  # largest gradient norm; 0: off
    # Decay of an average of the weights, evaluated and saved too (0.999: some 1,000 steps); 0: off.
    ema_decay: BelowOne = 0.0
    micro_batch: Count = 64  # B, pairs per rank, where the JSON says "auto"
    # What an image is compared with under accumulation; the whole step takes a second forward pass.
    negatives: Literal["micro_batch", "global_batch"] = "global_batch"
    steps: Count | None = 300  # optimizer steps
    epochs: Positive | None = None  # how often the data is seen, instead of `steps`

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
    # quick, demo, paper, finetune (usual with `student.source`) or tiny: all that is not given.
    preset: Name = "quick"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # that of weights, data order and scenes
    output_dir: Text = ""  # the run's folder; "": runs/<preset>-<date and time>
    log_every: Count = 10  # steps from one logged step to the next
    eval_every: Number = 0  # steps between evaluations; 0: only at the end
    eval_batch: Count = 50  # pairs per batch of an evaluation
    match_maps: Number = 4  # held-out pairs of each split whose match maps TensorBoard gets
    # TensorBoard gets numbers and pictures beside metrics.jsonl; "wandb": Weights & Biases too.
    report_to: Literal["tensorboard", "wandb"] = "tensorboard"
    save_every: Number = 0  # steps between checkpoints; 0: by time alone, and at the end
    save_minutes: NotNegative = 15.0  # minutes between them; 0: by steps alone, and at the end
    keep: Count = 2  # how many of the newest checkpoints are kept
    # Keep the best evaluation's checkpoint too, and its weights in model.best.safetensors.
    keep_best: bool = False
    patience: Number = 0  # evaluations without a better one that end the run; 0: never
    compile: Literal["off", "blocks"] = "off"  # torch.compile of each encoder block
    deterministic: bool = False  # results are bitwise the same on the same kind of device
    watchdog: NotNegative = 120.0  # seconds until a rank without progress counts as hung; 0: off


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
        for section, kind in SECTIONS.items():
            given = values.get(section, {})
            for name in given:
                choice(f"setting of {section}", name, kind.__dataclass_fields__)
            try:
                built[section] = kind(**given)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                setting = setting_of_error(first["loc"], given)
                line = f"{section}.{setting} is {first['input']!r}: {first['msg']}"
                raise UserError(line) from None
        return cls(**built)


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}


@cache
def meanings(section: str) -> dict[str, str]:
    """What the settings of a section mean, by the comments above or behind its fields."""
    _, _, text = Path(__file__).read_text("utf-8").partition(f"class {SECTIONS[section].__name__}:")
    field = r"((?:    # .*\n)*)    (\w+): (?:.*?)(?:  # (.*))?\n"
    found = re.findall(field, text.partition("\n\n\n")[0] + "\n")
    return {key: re.sub(r"\n? *# ", " ", above).strip() or behind for above, key, behind in found}


def check_sections(values: Mapping[str, object]) -> None:
    """Raise `UserError` for what is no section of settings."""
    check(isinstance(values, Mapping), "configuration", values, "give sections of settings")
    for name, settings in values.items():
        for section, kind in SECTIONS.items():
            meant = f"did you mean {section}.{name}?"
            check(name not in kind.__dataclass_fields__, "section of settings", name, meant)
        choice("section of settings", name, SECTIONS)
        check(isinstance(settings, Mapping), name, settings, "give a mapping of settings")


def load_config(path: Path, setting: str) -> Config:
    """The configuration of a run, from its `run.json`. Raises `UserError`, naming `setting`."""
    try:
        return Config.from_dict(read_json(path)["config"])
    except (OSError, ValueError, KeyError, RecursionError, UserError) as error:
        problem = f"its {path.name} is missing, damaged, of another version, or needs a --plugin"
        raise UserError(
            f"{setting} is {str(path.parent)!r}: {problem}: {one_line(error)}"
        ) from None


# --- what a resumed run must have kept

# Of `data` and of the DeepSpeed JSON, what no step depends on. Of `run`, what it does depend on.
FREE = {"workers", "max_bad_share"}
FREE_KEYS = words("""
    checkpoint comms_logger csv_monitor dump_state flops_profiler log_level memory_breakdown
    steps_per_print tensorboard timers wall_clock_breakdown wandb
""")
OF_STEPS = ("seed", "compile", "deterministic")


def compared(config: Config, ds_config: Section, data: Section | None = None) -> JsonObject:
    """The settings that must not change, as JSON values; `data` is `Data.fingerprint`."""
    sections = {
        **config.to_dict(),
        "run": {name: getattr(config.run, name) for name in OF_STEPS},
        "data": {key: value for key, value in vars(config.data).items() if key not in FREE},
        "deepspeed": {key: value for key, value in ds_config.items() if key not in FREE_KEYS},
        "sources": data or {},
    }
    return json.loads(json.dumps(sections))


def differences(before: Section, now: Section, path: str = "") -> Iterator[str]:
    """Lines as "optim.lr: 0.001 -> 0.002"."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{path}{key}: {json.dumps(old)} -> {json.dumps(new)}"
