"""The start of a run, in the order in which `train` goes through it:

1. `find_start` finds the newest undamaged checkpoint, of the run's folder or of --resume PATH.
2. `RunStart.keep_batch` keeps the batch of the run, if this start has other ranks.
3. `RunStart.check` compares the settings of the run with those of this start.
4. `RunStart.has_ended` says that no step is left, and `is_whole` that no file has to be made.
5. `RunStart.restore` loads the checkpoint, and sets the folder back to its step.
"""

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_cmli.checkpoint import storage
from ds_cmli.checkpoint.load import is_resharded, load_checkpoint
from ds_cmli.checkpoint.lock import written_together
from ds_cmli.checkpoint.model_files import make_models
from ds_cmli.checkpoint.state import TrainState, read_rank_part, read_state
from ds_cmli.checkpoint.storage import CHECKPOINTS
from ds_cmli.commands import print_line
from ds_cmli.config.comparison import setting_changes, settings_to_keep
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.config.source import MODEL_CONFIG
from ds_cmli.data.pairs import BadSamples
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import num_columns
from ds_cmli.errors import UserError, blame
from ds_cmli.files import JsonObject, Section, sha256
from ds_cmli.models.hf import BEST, write_config
from ds_cmli.provenance import revision, versions

# These settings say how the batch is split over ranks, and change with the number of ranks.
BATCH_SPLIT = ("optim.micro_batch", "deepspeed.train_micro_batch_size_per_gpu")
# Results of averaged and of plain weights, or on other data, cannot be compared.
INCOMPARABLE = ("data.", "sources.", "optim.ema_decay")


def find_start(config: Config, resume: str, folder: Path) -> "RunStart":
    """Find the newest undamaged checkpoint, given --resume and the run's folder. Collective.

    Raises `UserError` if the path has no checkpoint, or all of them are damaged.
    """
    checkpoint: Path | None = None
    problem = ""
    with distributed.raised_together():  # collective
        for candidate in _checkpoints_to_try(resume, folder) if distributed.is_main() else ():
            if problem:
                print_line(f"{problem}; trying the one before")
            damage = storage.find_damage(candidate)
            if damage is None:
                checkpoint = candidate
                break
            problem = f"checkpoint {candidate} is damaged: {damage}"
        if problem and checkpoint is None:
            raise UserError(f"{problem}; there is no other: give another --output-dir")
    checkpoint = distributed.broadcast_object(checkpoint)  # collective
    if checkpoint is None:
        return RunStart(config, folder, None, TrainState())
    state = read_state(checkpoint)
    if resume not in ("auto", "never"):
        state.resumed_from = state.resumed_from or resume
    return RunStart(config, folder, checkpoint, state)


def _checkpoints_to_try(resume: str, folder: Path) -> list[Path]:
    """Return the checkpoints in the order in which to try them. Raises `UserError`."""
    checkpoints_in_folder = storage.newest_first(folder / CHECKPOINTS)
    # A job has followed "never" or a path before it was requeued.
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if resume == "auto" or (checkpoints_in_folder and is_requeued):
        return checkpoints_in_folder
    if resume == "never":
        if checkpoints_in_folder:
            raise UserError(f"--resume is 'never', and {folder} has a run: give another folder")
        return []
    root = storage.root_of(resume)
    path = Path(resume).absolute()
    if checkpoints_in_folder and root != (folder / CHECKPOINTS).absolute():
        for checkpoint in checkpoints_in_folder:
            with suppress(UserError):
                if read_state(checkpoint).resumed_from == resume:
                    return checkpoints_in_folder  # the same command again
        raise UserError(
            f"--resume is {resume!r}, and {folder} has checkpoints of its own: leave it out, or "
            "give another folder"
        )
    checkpoints = [path] if path.parent == root else storage.newest_first(root)
    if not checkpoints:
        raise UserError(f"--resume is {resume!r}: no checkpoint there; give a run's output folder")
    return checkpoints


@dataclass
class RunStart:
    """A checkpoint that a run goes on from, or none, and its run's folder."""

    config: Config  # of this start
    folder: Path
    checkpoint: Path | None  # verified; None: a new run
    state: TrainState  # of the checkpoint, then with the settings and the batch of this start
    changed: bool = False  # whether the settings are others, by --resume-with-changes
    record: JsonObject = field(default_factory=dict)  # the content of `run.json`

    @property
    def _is_in_folder(self) -> bool:
        """True if the checkpoint is one of the run in the folder."""
        if self.checkpoint is None:
            return False
        return self.folder.resolve() in self.checkpoint.resolve().parents

    @property
    def _splits_batch_as_set(self) -> bool:
        """True if the run split its batch over ranks as the settings of this start say."""
        return self.state.world_size == distributed.world_size() and not self.state.rebatched

    def keep_batch(self, ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
        """Return the DeepSpeed JSON, with the run's batch if its number of ranks has ever changed.

        The number of negatives and the accumulation stay. More accumulation could not stand in for
        fewer ranks, because micro-batches do not see each other's negatives. Raises `UserError`.
        """
        if self.checkpoint is None or self._splits_batch_as_set:
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
        self, ds_config: DeepSpeedConfig, accept_changes: bool, fingerprint: Section | None = None
    ) -> None:
        """Compare the settings of the run with those of this start, which `state` then gets.

        `fingerprint` is that of the data, compared like the settings. Raises `UserError` if the run
        had other settings, which are listed, without `accept_changes`.
        """
        state = self.state
        settings = settings_to_keep(self.config, ds_config, fingerprint)
        if self.checkpoint is not None:
            self._compare(self.checkpoint, settings, accept_changes)
        else:
            state.evaluated = not self.config.student.source  # evaluated before training
        state.sums = torch.zeros(num_columns(self.config.loss))
        state.config = settings
        state.train_batch_size = ds_config["train_batch_size"]
        state.accumulation = ds_config["gradient_accumulation_steps"]
        self.record = {
            "config": self.config.to_dict(),
            "deepspeed": dict(ds_config),
            "versions": versions(),
            "revision": revision(),
            "command": sys.argv,
        }

    def _compare(self, checkpoint: Path, settings: JsonObject, accept_changes: bool) -> None:
        state = self.state
        ignored_settings = () if self._splits_batch_as_set else BATCH_SPLIT
        differences = setting_changes(state.config, settings)
        changes = [line for line in differences if not line.startswith(ignored_settings)]
        self.changed = bool(changes)
        if changes and not accept_changes:
            raise UserError(
                f"the run in {checkpoint.parent.parent} was made with other settings: "
                f"{'; '.join(changes)}. Give the old ones, another folder, or --resume-with-changes"
            )
        suffix = f" with changes: {'; '.join(changes)}" if changes else ""
        print_line(f"resuming from {checkpoint}{suffix}")
        if is_resharded(state, settings):
            ranks = f"from {state.world_size} ranks to {distributed.world_size()}"
            print_line(f"{ranks}: through a universal checkpoint")
        state.rebatched = not self._splits_batch_as_set
        if any(line.startswith(INCOMPARABLE) for line in changes):
            state.best = {}
            state.worse_in_row = 0

    def has_ended(self, total_steps: int) -> bool:
        """Return True, with a line, if no step of the run is left.

        Raises `UserError` if it is another folder's run, or is to go on with other settings.
        """
        state = self.state
        is_last = state.step == total_steps and state.evaluated
        out_of_patience = state.out_of_patience(self.config.run.patience)
        if not (is_last or state.step > total_steps or out_of_patience):
            return False
        if self.checkpoint is not None and (self.changed or not self._is_in_folder):
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
        """Return True if model files and configuration are there and up to date. Collective."""
        outdated = self._outdated_models()  # collective
        whole = not outdated and (self.folder / MODEL_CONFIG).is_file()
        return distributed.broadcast_object(whole)  # collective

    def restore(
        self,
        engine: TrainEngine,
        sampler: GlobalBatchSampler,
        bad_samples: BadSamples,
        tokenizer: CaptionTokenizer,
    ) -> None:
        """Load the checkpoint, and set the folder back to its step. Collective.

        `sampler` gets the position in the data, `bad_samples` this rank's counts of samples.
        """
        state = self.state
        state.sums = state.sums.to(engine.device)
        outdated = self._outdated_models()  # collective
        if self.checkpoint is not None:
            # The engine holds one checkpoint at a time: write the best file first, then load the
            # checkpoint to go on from.
            best_checkpoint = outdated.get(BEST)
            if best_checkpoint is not None and best_checkpoint != self.checkpoint:
                load_checkpoint(best_checkpoint, state.config, engine, self.changed)  # collectives
                make_models(engine, self.folder, [BEST], best_checkpoint)  # collectives
                del outdated[BEST]
            load_checkpoint(self.checkpoint, state.config, engine, self.changed)  # collectives
            sampler.load_state_dict(state.sampler)
            with distributed.raised_together(), blame(f"{self.checkpoint}: a rank's state"):
                rank_part = read_rank_part(self.checkpoint, state.world_size)  # collectives
                state.restore(rank_part, bad_samples)
        with written_together(self.folder):  # collective
            if distributed.is_main():
                self._set_records_back()
                if BEST in outdated and outdated[BEST] is None:
                    print_line(f"{self.folder / BEST} is not the best of this run: removed")
                    (self.folder / BEST).unlink()
                write_config(self.folder, self.config, engine.objective.student, tokenizer)
                text = json.dumps(self.record, indent=2) + "\n"
                storage.publish(self.folder / storage.RUN_RECORD, text.encode())
        names = [name for name, checkpoint in outdated.items() if checkpoint is not None]
        if self.checkpoint is not None and names:
            make_models(engine, self.folder, names, self.checkpoint)  # collectives

    def _outdated_models(self) -> dict[str, Path | None]:
        """Return the model files to make again, each with the checkpoint to make it from.

        None: there is no such checkpoint, and the file is removed. Collective.
        """
        outdated: dict[str, Path | None] = {}
        if distributed.is_main():
            for name, digest in self.state.models.items() if self._is_in_folder else ():
                if self.changed or not _has_digest(self.folder / name, digest):
                    outdated[name] = self.checkpoint
            if not _has_digest(self.folder / BEST, self.state.best.get("sha256")):
                best_checkpoint = self._best_checkpoint()
                if best_checkpoint is not None or (self.folder / BEST).is_file():
                    outdated[BEST] = best_checkpoint
        return distributed.broadcast_object(outdated)  # collective

    def _best_checkpoint(self) -> Path | None:
        """Return the undamaged checkpoint of the best evaluation, if it is kept."""
        digest = self.state.best.get("sha256")
        if not self.config.run.keep_best or digest is None:
            return None
        for checkpoint in storage.newest_first(self.folder / CHECKPOINTS):
            with suppress(UserError):
                saved = read_state(checkpoint)
                has_best = saved.is_best and saved.best.get("sha256") == digest
                if has_best and storage.find_damage(checkpoint) is None:
                    return checkpoint
        return None

    def _set_records_back(self) -> None:
        """Set the folder's records back to the step from which the run goes on."""
        storage.remove_incomplete(self.folder)
        if self.checkpoint is not None and self._is_in_folder:
            pointer = self.folder / CHECKPOINTS / storage.LATEST
            storage.publish(pointer, self.checkpoint.name.encode())
        _cut_back(self.folder / storage.METRICS, self.state.step, self.state.evaluated)


def _has_digest(path: Path, digest: str | None) -> bool:
    return path.is_file() and sha256(path) == digest


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
    storage.publish(path, b"".join(kept))
