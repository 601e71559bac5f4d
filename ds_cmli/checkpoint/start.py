"""The start of a run: its folder, and the checkpoint that it goes on from.

`run_folder` makes the folder and locks it. `find_start` finds the newest undamaged checkpoint. The
`RunStart` that it returns compares the settings of the run with those of this start (`check`), and
then loads engine, state and files (`restore`).
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_cmli.checkpoint.lock import run_lock, written_together
from ds_cmli.checkpoint.save import publish_models, write_best, write_models
from ds_cmli.checkpoint.state import TrainState, read_rank_part, read_state
from ds_cmli.checkpoint.storage import (
    CHECKPOINTS,
    CHECKSUMS,
    LATEST,
    METRICS,
    RUN_RECORD,
    WRITING,
    CheckpointWriter,
    checkpoint_steps,
    find_damage,
    newest_first,
    publish,
    remove_incomplete,
)
from ds_cmli.checkpoint.universal import load_resharded
from ds_cmli.checkpoint.weights import load_averages, load_frozen
from ds_cmli.commands import print_line
from ds_cmli.config.comparison import setting_changes, settings_to_keep
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.config.source import MODEL_CONFIG
from ds_cmli.data.pairs import BadSamples
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import num_columns
from ds_cmli.errors import UserError, blame
from ds_cmli.files import read_json, sha256
from ds_cmli.models.hf import AVERAGE, BEST, WEIGHTS
from ds_cmli.pretrained import loading
from ds_cmli.provenance import revision, versions

# The sections of the DeepSpeed JSON that decide the form of DeepSpeed's files.
LAYOUT_SECTIONS = re.compile(r"zero_|fp16|bf16|data_types|torch_auto")
# These settings say how the batch is split over ranks, and change with the number of ranks.
BATCH_SPLIT = ("optim.micro_batch", "deepspeed.train_micro_batch_size_per_gpu")
# Results of averaged and of plain weights, or on other data, cannot be compared.
INCOMPARABLE = ("data.", "sources.", "optim.ema_decay")
# The position in a schedule, by the names of its state; the other names are settings.
SCHEDULE_POSITION = ("last_epoch", "_step_count", "_last_lr", "last_batch_iteration", "lr_lambdas")
# All that PyTorch's loader builds from a file besides tensors and plain values.
torch.serialization.add_safe_globals(
    [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
)


# --- the run's folder


@contextmanager
def run_folder(config: Config, resume: str) -> Iterator[Path]:
    """Make the run's folder and hold its lock inside. Collective.

    A new folder is removed at the end if it is empty. Raises `UserError` if another run holds it.
    """
    named = config.run.output_dir
    if not named and resume not in ("auto", "never"):
        named = str(root_of(resume).parent)  # of the run in `--resume PATH`
    base = Path(named or f"runs/{config.run.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = base
    new: list[Path] = []
    with written_together(base):  # collective
        if distributed.is_main():
            number = 1
            while not named and folder.exists():  # of another start in this second
                number += 1
                folder = base.with_name(f"{base.name}.{number}")
            new += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
    try:
        folder = distributed.broadcast_object(folder)  # collective
        with run_lock(folder):  # collective
            yield folder
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()


def root_of(resume: str) -> Path:
    """Return the folder of checkpoints that --resume PATH means.

    PATH is a run's folder, this folder itself, or a checkpoint in it.
    """
    path = Path(resume).absolute()
    if (path / CHECKSUMS).is_file():
        return path.parent
    return path if path.name == CHECKPOINTS else path / CHECKPOINTS


# --- find


def find_start(resume: str, folder: Path) -> "RunStart":
    """Find the newest undamaged checkpoint, given --resume and the run's folder. Collective.

    Raises `UserError` if the path has no checkpoint, or all of them are damaged.
    """
    checkpoint: Path | None = None
    with distributed.raised_together():  # collective
        if distributed.is_main():
            problem: str | None = None
            for candidate in _checkpoints_to_try(resume, folder):
                if problem is not None:
                    print_line(f"{problem}; trying the one before")
                damage = find_damage(candidate)
                if damage is None:
                    checkpoint = candidate
                    break
                problem = f"checkpoint {candidate} is damaged: {damage}"
            if problem is not None and checkpoint is None:
                raise UserError(f"{problem}; there is no other: give another --output-dir")
    checkpoint = distributed.broadcast_object(checkpoint)  # collective
    if checkpoint is None:
        return RunStart(folder, None, TrainState())
    state = read_state(checkpoint)
    if resume not in ("auto", "never"):
        state.resumed_from = state.resumed_from or resume
    return RunStart(folder, checkpoint, state)


def _checkpoints_to_try(resume: str, folder: Path) -> list[Path]:
    """Return the checkpoints in the order in which to try them. Raises `UserError`."""
    own_checkpoints = newest_first(folder / CHECKPOINTS)
    # A job has followed "never" or a path before it was requeued.
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if resume == "auto" or (own_checkpoints and is_requeued):
        return own_checkpoints
    if resume == "never":
        if own_checkpoints:
            raise UserError(f"--resume is 'never', and {folder} has a run: give another folder")
        return []
    root = root_of(resume)
    path = Path(resume).absolute()
    if own_checkpoints and root != (folder / CHECKPOINTS).absolute():
        for checkpoint in own_checkpoints:
            with suppress(UserError):
                if read_state(checkpoint).resumed_from == resume:
                    return own_checkpoints  # the same command again
        raise UserError(
            f"--resume is {resume!r}, and {folder} has checkpoints of its own: leave it out, or "
            "give another folder"
        )
    checkpoints = [path] if path.parent == root else newest_first(root)
    if not checkpoints:
        raise UserError(f"--resume is {resume!r}: no checkpoint there; give a run's output folder")
    return checkpoints


# --- check and restore


@dataclass
class RunStart:
    """A checkpoint that a run goes on from, or none, and its run's folder."""

    folder: Path
    checkpoint: Path | None  # verified; None: a new run
    state: TrainState  # of the checkpoint, then with the settings and the batch of this start
    changed: bool = False  # whether the settings are others, by --resume-with-changes
    keep_best: bool = False  # this one and the next are set by `check`
    record: dict[str, Any] = field(default_factory=dict)  # the content of `run.json`

    @property
    def _is_of_folder(self) -> bool:
        """True if the checkpoint is one of the run in the folder."""
        if self.checkpoint is None:
            return False
        return self.folder.resolve() in self.checkpoint.resolve().parents

    @property
    def _has_batch_of_settings(self) -> bool:
        """True if the run split its batch over ranks as this start's settings say."""
        return self.state.world_size == distributed.world_size() and not self.state.rebatched

    def keep_batch(self, ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
        """Return the DeepSpeed JSON with the batch of the run, if the ranks were or are others.

        The number of negatives stays the same, and so does gradient accumulation: micro-batches
        cannot replace ranks, because they do not see each other's negatives. Raises `UserError`.
        """
        if self.checkpoint is None or self._has_batch_of_settings:
            return ds_config
        total = self.state.train_batch_size
        accumulation = self.state.accumulation
        negatives = total // accumulation
        num_ranks = distributed.world_size()
        if negatives % num_ranks:
            divisors = [str(n) for n in range(1, negatives + 1) if negatives % n == 0]
            raise UserError(
                f"the run to resume has a batch of {total} = {negatives} pairs x {accumulation} "
                f"accumulation, which {num_ranks} ranks cannot share evenly: start it on a number "
                f"of ranks out of {', '.join(divisors)}"
            )
        sizes = (total, negatives // num_ranks, accumulation)
        batch = dict(zip(BATCH_KEYS, sizes, strict=True))
        for key in ("train_batch_size", "gradient_accumulation_steps"):
            if ds_config.get(key, "auto") != "auto":
                batch[key] = ds_config[key]
        return DeepSpeedConfig.of({**ds_config, **batch})

    def check(
        self,
        config: Config,
        ds_config: DeepSpeedConfig,
        accept_changes: bool,
        fingerprint: Mapping[str, object] | None = None,
    ) -> None:
        """Compare the settings of the run with those of this start, which `state` then has.

        `fingerprint` is that of the data, compared like the settings. Raises `UserError` if the run
        had other settings, which are listed, without `accept_changes`.
        """
        state = self.state
        settings = settings_to_keep(config, ds_config, fingerprint)
        self.keep_best = config.run.keep_best
        self.record = {
            "config": config.to_dict(),
            "deepspeed": dict(ds_config),
            "versions": versions(),
            "revision": revision(),
            "command": sys.argv,
        }
        if self.checkpoint is None:
            # A source is evaluated before training.
            state.evaluated = not config.student.source
        else:
            ignored = () if self._has_batch_of_settings else BATCH_SPLIT
            differences = setting_changes(state.config, settings)
            changes = [line for line in differences if not line.startswith(ignored)]
            if changes and not accept_changes:
                raise UserError(
                    f"the run in {self.checkpoint.parent.parent} was made with other settings: "
                    f"{'; '.join(changes)}. Give the old ones, another folder, or "
                    "--resume-with-changes"
                )
            self.changed = bool(changes)
            suffix = f" with changes: {'; '.join(changes)}" if changes else ""
            print_line(f"resuming from {self.checkpoint}{suffix}")
            num_ranks = distributed.world_size()
            if _is_resharded(state, settings):
                print_line(
                    f"from {state.world_size} ranks to {num_ranks}: through a universal checkpoint"
                )
            state.rebatched = not self._has_batch_of_settings
            if any(line.startswith(INCOMPARABLE) for line in changes):
                state.best = {}
                state.worse_in_row = 0
        state.sums = torch.zeros(num_columns(config.loss))
        state.config = settings
        state.train_batch_size = ds_config["train_batch_size"]
        state.accumulation = ds_config["gradient_accumulation_steps"]

    def has_ended(self, total_steps: int, patience: int) -> bool:
        """Return True, with a line, if no step of the run is left.

        Raises `UserError` if it is another folder's run, or is to go on with other settings.
        """
        state = self.state
        is_last = state.step == total_steps and state.evaluated
        if not (is_last or state.step > total_steps or state.out_of_patience(patience)):
            return False
        if self.checkpoint is not None and (self.changed or not self._is_of_folder):
            raise UserError(
                f"{self.checkpoint} has {state.step} of the {total_steps} steps of this start, and "
                "nothing would be trained: give more --steps, or start without --resume"
            )
        print_line(
            f"the run in {self.folder} is finished, {state.step} steps: "
            "give another --output-dir to start a new one"
        )
        return True

    def is_whole(self) -> bool:
        """Return True if the folder has what follows from its newest checkpoint. Collective."""
        whole = False
        if distributed.is_main():
            whole = not self._outdated_models() and (self.folder / MODEL_CONFIG).is_file()
        return distributed.broadcast_object(whole)  # collective

    def restore(
        self,
        engine: TrainEngine,
        sampler: GlobalBatchSampler,
        bad: BadSamples,
        describe: Callable[[Path], None],
    ) -> None:
        """Load the checkpoint, and set the folder back to it. Collective.

        `sampler` gets the position in the data, `bad` this rank's counts. `describe` writes what a
        model's folder has beside its weights.
        """
        state = self.state
        state.sums = state.sums.to(engine.device)
        outdated: dict[str, Path | None] = {}
        if self.checkpoint is not None:
            if distributed.is_main():
                outdated = self._outdated_models()
            outdated = distributed.broadcast_object(outdated)  # collective
            own_settings = _settings_of_optimizer(engine) if self.changed else None
            best = outdated.get(BEST)
            if best is not None and best != self.checkpoint:
                self._load(best, engine)  # collectives
                self._make_models(engine, [BEST], best)  # collectives
                del outdated[BEST]
            self._load(self.checkpoint, engine)  # collectives
            if own_settings is not None:
                _set_back(engine, *own_settings)
            sampler.load_state_dict(state.sampler)
            with distributed.raised_together(), blame(f"{self.checkpoint}: a rank's state"):
                state.restore(read_rank_part(self.checkpoint, state.world_size), bad)  # collectives
        with written_together(self.folder):  # collective
            if distributed.is_main():
                self._set_records_back()
                describe(self.folder)
                text = json.dumps(self.record, indent=2) + "\n"
                publish(self.folder / RUN_RECORD, text.encode())
        names = [name for name, checkpoint in outdated.items() if checkpoint is not None]
        if names and self.checkpoint is not None:
            self._make_models(engine, names, self.checkpoint)  # collectives

    def _load(self, checkpoint: Path, train_engine: TrainEngine) -> None:
        """Load a checkpoint of the run into the engine. Collective."""
        engine = train_engine.engine
        with blame(f"{checkpoint}: does not fit the model and the optimizer of this start"):
            engine.checkpoint_engine = CheckpointWriter()
            if _is_resharded(read_state(checkpoint), self.state.config):
                load_resharded(checkpoint, train_engine)  # collectives
            else:
                with loading(hub=False):
                    # Collectives. Frozen weights are not in its files.
                    engine.load_checkpoint(
                        str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False
                    )
            for name in read_json(checkpoint / CHECKSUMS):
                if name.startswith("../frozen-"):
                    load_frozen(checkpoint / name, train_engine)  # collectives
            load_averages(checkpoint / AVERAGE, train_engine)

    # --- the folder, by rank 0

    def _outdated_models(self) -> dict[str, Path | None]:
        """Return the files beside `checkpoint/` that do not follow from the newest checkpoint.

        Each name comes with the checkpoint to make the file from; None: none is left, or the file
        is not to be there.
        """
        state = self.state
        if not self._is_of_folder:
            return {}
        outdated: dict[str, Path | None] = {}
        models = state.models
        if not models:  # the run of an older version
            models = {WEIGHTS: None}
            if state.config["optim"]["ema_decay"]:
                models[AVERAGE] = None
        for name, digest in models.items():
            if self.changed or not _has_digest(self.folder / name, digest):
                outdated[name] = self.checkpoint
        best_digest = state.best.get("sha256")
        if (self.folder / BEST).is_file():
            if best_digest is None or not _has_digest(self.folder / BEST, best_digest):
                outdated[BEST] = self._best_checkpoint()
        elif self.keep_best and self._best_checkpoint() is not None:
            outdated[BEST] = self._best_checkpoint()
        return outdated

    def _best_checkpoint(self) -> Path | None:
        """Return the undamaged checkpoint of the best evaluation, if it is kept."""
        best = self.state.best
        root = self.folder / CHECKPOINTS
        steps = checkpoint_steps(root)
        for checkpoint in newest_first(root):
            if self.keep_best and "sha256" in best and steps[checkpoint] == best["step"]:
                with suppress(UserError):
                    has_best = read_state(checkpoint).best.get("sha256") == best["sha256"]
                    if has_best and find_damage(checkpoint) is None:
                        return checkpoint
        return None

    def _set_records_back(self) -> None:
        """Remove the records of steps after that at which the run goes on."""
        remove_incomplete(self.folder)
        if self.checkpoint is not None and self._is_of_folder:
            publish(self.folder / CHECKPOINTS / LATEST, self.checkpoint.name.encode())
        _cut_back(self.folder / METRICS, self.state.step, self.state.evaluated)
        best = self.folder / BEST
        if best.is_file() and not _has_digest(best, self.state.best.get("sha256", "none")):
            print_line(f"{best} is not the best of this run: removed")
            best.unlink()

    def _make_models(self, engine: TrainEngine, names: list[str], checkpoint: Path) -> None:
        """Make files beside `checkpoint/` from the checkpoint that the engine holds. Collective."""
        print_line(f"made from {checkpoint}: {', '.join(names)}")
        writer = CheckpointWriter()
        write_models(engine, self.folder, writer)  # collectives
        if BEST in names and distributed.is_main():
            write_best(engine, self.folder, writer)
        writer.gather()  # collective
        with written_together(self.folder):  # collective
            if writer.error is not None:
                raise OSError(writer.error)
            if distributed.is_main():
                if names == [BEST]:
                    os.replace(self.folder / (BEST + WRITING), self.folder / BEST)
                    remove_incomplete(self.folder)
                else:
                    publish_models(self.folder)


def _is_resharded(saved: TrainState, settings: Mapping[str, Any]) -> bool:
    """Return True if weights and moments are partitioned otherwise than by these settings."""

    def layout(deepspeed_json: Mapping[str, Any]) -> dict[str, Any]:
        return {key: x for key, x in deepspeed_json.items() if LAYOUT_SECTIONS.match(key)}

    has_other_layout = layout(saved.config["deepspeed"]) != layout(settings["deepspeed"])
    return has_other_layout or saved.world_size != distributed.world_size()


def _has_digest(path: Path, digest: str | None) -> bool:
    """Return True if the file is there, with this SHA-256 unless that is None."""
    return path.is_file() and digest in (None, sha256(path))


def _settings_of_optimizer(engine: TrainEngine) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the settings of the parameter groups, but for their rates, and of the schedule."""
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in engine.engine.optimizer.param_groups
    ]
    schedule = {
        key: value
        for key, value in engine.engine.lr_scheduler.state_dict().items()
        if key not in SCHEDULE_POSITION
    }
    return groups, schedule


def _set_back(engine: TrainEngine, groups: list[dict[str, Any]], schedule: dict[str, Any]) -> None:
    """Set what loading has overwritten: this start's rates, weight decay and schedule."""
    optimizer = engine.engine.optimizer
    lr_scheduler = engine.engine.lr_scheduler
    vars(lr_scheduler).update(schedule)
    rates = lr_scheduler.get_lr()
    for group, own_group, rate in zip(optimizer.param_groups, groups, rates, strict=True):
        group.update(own_group)
        group["lr"] = rate


def _cut_back(path: Path, step: int, evaluated: bool) -> None:
    """Keep the lines up to `step`; without that step's evaluation if it is still to be done."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):  # a line that was cut off
            values = json.loads(line)
            is_repeated = not evaluated and any(name.startswith("eval/") for name in values)
            last_step = step - 1 if is_repeated else step
            if values["step"] <= last_step and line.endswith(b"\n"):
                kept.append(line)
    publish(path, b"".join(kept))
