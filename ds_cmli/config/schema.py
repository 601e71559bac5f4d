"""The run's configuration: one dataclass per component, checked when it is built.

No heavy imports here: `--help` and `--dry-run` read this file before torch is needed.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_cmli.common.errors import UserError, nearest

LOSSES = ("global", "cmli", "target_cmli", "cls_kd")


def check(ok: bool, setting: str, found: object, need: str) -> None:
    """Raise the one-line `UserError` for a setting that does not hold."""
    if not ok:
        raise UserError(f"{setting} is {found!r}: {need}")


def choice(setting: str, found: str, known) -> None:
    if found not in known:
        raise UserError(f"{setting} is {found!r}: {nearest(found, known)}")


@dataclass
class StudentConfig:
    """`student.py`. Weights: "demo" (the packaged ones), "hub" (by model name), "random", or a local path."""

    image_model: str = "vit_small_patch14_dinov2"  # timm name
    image_weights: str = "demo"
    image_overrides: dict[str, Any] = field(default_factory=dict)  # keyword arguments of timm.create_model
    text_model: str = "bert"  # transformers name, or architecture, of a BERT-like encoder
    text_weights: str = "demo"
    text_overrides: dict[str, Any] = field(default_factory=dict)  # fields of the transformers config
    layers: int = 6  # first layers kept of each encoder
    shared_blocks: int = 1  # Transformer blocks over both modalities
    embed_dim: int = 256  # D, the matching space
    dropout: float = 0.1  # in the text encoder, as BERT was trained

    def __post_init__(self):
        check(self.layers >= 1, "student.layers", self.layers, "give at least 1")
        check(self.shared_blocks >= 1, "student.shared_blocks", self.shared_blocks, "give at least 1")
        check(0 <= self.dropout < 1, "student.dropout", self.dropout, "give 0 (off) to below 1")
        check(1 <= self.embed_dim <= 1024, "student.embed_dim", self.embed_dim, "give 1 to 1024")


@dataclass
class TeacherConfig:
    """`teacher.py`. Weights as for the student."""

    model: str = "vit_small_patch14_dinov2"  # timm name
    weights: str = "demo"
    overrides: dict[str, Any] = field(default_factory=dict)
    block: int = 9  # features after this block, 0-based; negative counts from the last

    def __post_init__(self):
        check(isinstance(self.block, int), "teacher.block", self.block, "give a block number, 0-based")


@dataclass
class DataConfig:
    """`data/`."""

    source: str = "demo"  # "demo" (scenes) or a folder with metadata.jsonl or metadata.csv
    image_size: int = 84  # pixels, square
    text_positions: int = 64  # longest caption in tokens, [CLS] and [SEP] included; longer ones are cut
    tokenizer: str = "demo"  # "demo" (MiniLM's), "builtin" (no download), transformers name or local path
    workers: int = 0  # data loading processes per rank
    max_bad_share: float = 0.01  # broken images and empty captions above this share stop the run

    def __post_init__(self):
        check(bool(self.source), "data.source", self.source, "give 'demo' or a folder")
        check(self.image_size >= 1, "data.image_size", self.image_size, "give a positive number of pixels")
        check(self.text_positions >= 3, "data.text_positions", self.text_positions, "give at least 3")
        check(self.workers >= 0, "data.workers", self.workers, "give 0 or more")
        check(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "give a share from 0 to 1")


@dataclass
class LossConfig:
    """`objective.py`, `losses.py`, `cmli/`."""

    weights: dict[str, float] = field(default_factory=lambda: {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0})
    mse_reduction: str = "mean"  # over H: "mean", or "sum" as (7) and (9) are written
    match: str = "teacher"  # whose patches Target-CMLI matches the tokens with: "teacher" (the document) or "student"
    init_temperature: float = 0.07  # of the global loss
    cmli_init_temperature: float = 0.02  # of the CMLI loss: a mean of maxima spreads less than a cosine
    cmli_backend: str = "auto"
    cmli_recompute: bool = False
    cmli_scratch_bytes: int = 64 * 2**20

    def __post_init__(self):
        check(bool(self.weights), "losses", self.weights, f"choose at least one of {', '.join(LOSSES)}")
        for name, weight in self.weights.items():
            choice("losses", name, LOSSES)
            check(weight > 0, f"losses.{name}", weight, "give a positive weight, or leave the loss out")
        choice("loss.mse_reduction", self.mse_reduction, ("mean", "sum"))
        choice("loss.match", self.match, ("teacher", "student"))
        for name in ("init_temperature", "cmli_init_temperature"):
            value = getattr(self, name)
            check(0.01 <= value <= 10, f"loss.{name}", value, "give 0.01 to 10 (1/temperature is at most 100)")
        choice("loss.cmli_backend", self.cmli_backend, ("auto", "chunked", "triton"))
        check(self.cmli_scratch_bytes >= 2**20, "loss.cmli_scratch_bytes", self.cmli_scratch_bytes, "give >= 1 MiB")


@dataclass
class OptimConfig:
    """Fills the "auto" values of the DeepSpeed JSON, whose own numbers always win."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05  # not on norms, biases and embeddings
    warmup_share: float = 0.05  # of all steps, linear
    grad_clip: float = 1.0
    micro_batch: int = 64  # B, pairs per rank
    steps: int | None = 300
    epochs: float | None = None

    def __post_init__(self):
        check(self.lr > 0, "optim.lr", self.lr, "give a positive learning rate")
        check(self.micro_batch >= 1, "optim.micro_batch", self.micro_batch, "give at least 1 pair per rank")
        check(0 <= self.warmup_share < 1, "optim.warmup_share", self.warmup_share, "give a share from 0 to below 1")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "give 0 or more")
        check(self.grad_clip >= 0, "optim.grad_clip", self.grad_clip, "give 0 (off) or more")
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"optim.steps is {self.steps} and optim.epochs is {self.epochs}: give one of the two")
        if self.steps is not None:
            check(self.steps >= 1, "--steps", self.steps, "give at least 1")
        if self.epochs is not None:
            check(self.epochs > 0, "--epochs", self.epochs, "give a positive number")

    def warmup_steps(self, total_steps: int) -> int:
        return max(1, round(self.warmup_share * total_steps))


@dataclass
class RunConfig:
    """`train.py`."""

    preset: str = "demo"
    seed: int = 0
    output_dir: str = ""  # "": runs/<preset>-<date and time>
    log_every: int = 10  # steps
    eval_every: int = 0  # steps; 0: only at the end
    eval_batch: int = 50  # pairs a step of the evaluation
    save_every: int = 0  # steps; 0: by time alone, and at the end
    save_minutes: float = 15.0  # since the last checkpoint; 0: by steps alone, and at the end
    keep: int = 2  # checkpoints
    most_skipped: int = 5  # steps in a row skipped for values that are not finite
    deterministic: bool = False  # the same bits again on the same kind of device
    watchdog: float = 120.0  # seconds without progress after which a rank counts as hung or dead; 0: off

    def __post_init__(self):
        check(0 <= self.seed < 2**31, "--seed", self.seed, "give 0 to 2147483647")
        check(self.log_every >= 1, "--log-every", self.log_every, "give at least 1 step")
        check(self.eval_every >= 0, "--eval-every", self.eval_every, "give 0 (only at the end) or more steps")
        check(self.eval_batch >= 1, "run.eval_batch", self.eval_batch, "give at least 1")
        check(self.save_every >= 0, "--save-every", self.save_every, "give 0 (by time alone) or more steps")
        check(self.save_minutes >= 0, "--save-minutes", self.save_minutes, "give 0 (by steps alone) or more minutes")
        check(self.keep >= 1, "--keep", self.keep, "give at least 1 checkpoint")
        check(self.most_skipped >= 0, "run.most_skipped", self.most_skipped, "give 0 or more steps in a row")
        check(self.watchdog >= 0, "run.watchdog", self.watchdog, "give 0 (off) or more seconds")


@dataclass
class Config:
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Rebuild a configuration from `to_dict`, for instance out of a run's `config.json`."""
        sections = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        for name in values:
            choice("configuration section", name, sections)
        return cls(**{name: _build(name, section, values.get(name, {})) for name, section in sections.items()})


def _build(name: str, section: Any, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(section)
    for key, value in values.items():
        choice(f"setting of {name}", key, hints)
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise UserError(f"{name}.{key} is {value!r}: give a value of type {wanted}")
    return section(**{k: tuple(v) if k == "betas" else v for k, v in values.items()})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON or the command line is of a field's type."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        kind = typing.get_origin(kind) or kind
        accepted = {float: (int, float), tuple: (list, tuple)}.get(kind, kind)
        if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
            return True
    return False


def parse_losses(text: str) -> dict[str, float]:
    """`"global,cmli=0.5"` -> `{"global": 1.0, "cmli": 0.5}`."""
    weights = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError:
            raise UserError(f"--losses has {part!r}: write NAME or NAME=WEIGHT, for instance cmli=0.5") from None
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
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        out.setdefault(section, {})[key] = parsed
    return out


def save_config(config: Config, path: Path) -> None:
    path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
