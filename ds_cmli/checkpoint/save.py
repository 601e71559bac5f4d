"""Writes a checkpoint beside the last one and publishes it by a rename.

`checkpoint/stepN/` holds DeepSpeed's files, `state.json` and `rank-R.pt` (`TrainState`), the
averages as `model.ema.safetensors`, and `checksums.json`. Beside `checkpoint/` lie
`model.safetensors` and `model.ema.safetensors` of the newest, `model.best.safetensors` of the best,
which transformers loads with the files of `models/hf.py`.
"""

import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ds_cmli.checkpoint import files
from ds_cmli.checkpoint.files import FOLDER, LATEST, WRITING, CheckpointWriter, Entry
from ds_cmli.checkpoint.state import STATE, TrainState
from ds_cmli.checkpoint.weights import full_averages, full_weights, write_weights
from ds_cmli.common.errors import UserError, first_line
from ds_cmli.common.patches import patched
from ds_cmli.config.schema import RunConfig
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.launchers import this_node
from ds_cmli.engine import TrainEngine
from ds_cmli.models.hf import AVERAGE, BEST, WEIGHTS
from ds_cmli.models.lora import merged
from ds_cmli.models.weights import not_finite

WRITTEN = ("run.json", "metrics.jsonl", "tensorboard", FOLDER, WEIGHTS, AVERAGE, BEST)


@dataclass
class Checkpoints:
    """The checkpoints of a run: when one is due, and which state the last holds."""

    folder: Path
    engine: TrainEngine
    settings: RunConfig
    saved: tuple[int, bool]  # step and whether it was evaluated, of the last one or of the start
    saved_at: float = field(default_factory=time.monotonic)
    error: str | None = None  # why the last one could not be written
    frozen: tuple[str, Entry] | None = None  # the file of the weights that are not trained

    def due(self) -> bool:
        """Whether a checkpoint is due by this rank's clock."""
        return 0 < 60 * self.settings.save_minutes < time.monotonic() - self.saved_at

    def due_after_evaluation(self, state: TrainState) -> bool:
        """Whether the last evaluation ends the run, or has found the best result, which is kept."""
        best = self.settings.keep_best and state.is_best
        return state.out_of_patience(self.settings.patience) or best

    def holds(self, state: TrainState) -> bool:
        """Whether `state` is that of the last checkpoint, or that of the start."""
        return self.saved == (state.step, state.evaluated)

    def save(self, state: TrainState) -> str:
        """Write and publish a checkpoint: the line that tells of it. Collective.

        If that fails on any rank, as on a full disk, the files published before are unchanged.

        Raises:
            UserError: a weight is not finite.
        """
        started = time.monotonic()
        parts = {}
        for key, parameter in self.engine.objective.named_parameters():
            part = getattr(parameter, "ds_tensor", None)  # this rank's, of ZeRO-3
            if part is not None:  # what is behind the parameter's end was never set
                size = getattr(parameter, "ds_numel", 0)
                part = part[: max(0, size - distributed.rank() * part.numel())]
            parts[key] = parameter if part is None else part
        mine = not_finite(parts)
        bad = next(filter(None, distributed.gather_objects(mine)), None)  # collective
        if bad is not None:
            why = f"the weight {bad} is not finite, nothing was saved"
            raise UserError(self.diverged(why, state))
        root, name, again = self.folder / FOLDER, f"step{state.step}", 0
        if distributed.is_main():
            while (root / name).is_dir():
                again += 1
                name = f"step{state.step}.{again}"
        name = distributed.broadcast_object(name)  # collective
        writing, error = root / (name + WRITING), None
        if distributed.is_main():
            try:
                files.remove_incomplete(self.folder)
                writing.mkdir(parents=True)
            except OSError as caught:
                error = str(caught)
        error = distributed.broadcast_object(error)  # collective
        entries: dict[str, Entry] = {}
        if error is None:
            entries, error = self._write(writing, state)  # collectives
        if distributed.is_main():
            try:
                if error is None:
                    files.write_checksums(writing, entries)
                    self._publish(name, state.best.get("step"))
            except OSError as caught:
                error = str(caught)
            if error is not None:
                with suppress(OSError):  # what cannot be written can often not be removed either
                    files.remove_incomplete(self.folder)
        # Collective: no rank continues or ends before it is published.
        self.error = distributed.broadcast_object(error)
        self.saved_at = time.monotonic()
        if self.error is not None:
            kept = "the one before stays" if files.names(root) else "there is none before"
            return f"warning: no checkpoint at step {state.step}, {kept}: {self.error}"
        self.saved = state.step, state.evaluated
        size = sum(entry["bytes"] for path, entry in entries.items() if "/" not in path)
        return f"checkpoint {name}: {size / 1e6:.1f} MB in {self.saved_at - started:.2f} s"

    def _write(self, writing: Path, state: TrainState) -> tuple[dict[str, Entry], str | None]:
        """Write all files: those of all ranks, and the first rank's error. Collective."""
        writer, engine = CheckpointWriter(), self.engine.engine
        engine.checkpoint_engine = writer
        with patched("deepspeed: recovery script", lambda _: lambda self, path: None):
            engine.save_checkpoint(  # collectives
                str(writing.parent),
                tag=writing.name,
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        weights = full_weights(self.engine)  # collectives
        averages = full_averages(self.engine)  # collectives
        if distributed.is_main() and writer.error is None:
            scale, frozen = self.engine.objective.student.lora_scale, self.engine.frozen
            for name, tensors in ((WEIGHTS, weights), (AVERAGE, averages)):
                if tensors is not None:  # with averages the best result is theirs
                    student = merged({key: tensors[key] for key in weights}, scale)
                    writer.write(self.folder / (name + WRITING), partial(write_weights, student))
                    if state.is_best and writer.error is None:
                        state.best["sha256"] = writer.files[name + WRITING]["sha256"]
                    writer.files.pop(name + WRITING, None)
            if averages is not None:
                moving = {name: x for name, x in averages.items() if name not in frozen}
                writer.write(writing / AVERAGE, partial(write_weights, moving))
            text = json.dumps(state.shared(), indent=1)
            writer.write(writing / STATE, lambda path: path.write_text(text))
            self._keep_frozen(writer, writing.parent)
        of_rank = partial(torch.save, state.of_rank())  # CPU-GPU sync
        writer.write(writing / f"rank-{distributed.rank()}.pt", of_rank)
        error = None if writer.error is None else first_line(writer.error)
        every = distributed.gather_objects((this_node(), writer.files, error))  # collective
        nodes, listed, errors = zip(*every, strict=True)
        entries = {name: entry for files_of_rank in listed for name, entry in files_of_rank.items()}
        failed = next((rank for rank, error in enumerate(errors) if error), None)
        if failed is None:
            return entries, None
        return entries, f"{distributed.named(failed, nodes)}: {errors[failed]}"

    def _keep_frozen(self, writer: CheckpointWriter, root: Path) -> None:
        """Write the weights that are not trained, unless that is done, and list their file."""
        if self.frozen is None and self.engine.frozen and writer.error is None:
            path = root / ("frozen" + WRITING)
            writer.write(path, partial(write_weights, self.engine.frozen))
            if writer.error is not None:
                return
            entry = writer.files.pop(path.name)
            name = f"frozen-{entry['sha256'][:12]}.safetensors"
            os.replace(path, root / name)
            self.frozen = name, entry
        if self.frozen is not None:
            name, entry = self.frozen
            writer.files[f"../{name}"] = entry

    def _publish(self, name: str, best: int | None) -> None:
        """Publish the checkpoint that has been written, then remove old ones."""
        folder, root = self.folder, self.folder / FOLDER
        before = files.candidates(root)
        os.replace(root / (name + WRITING), root / name)
        files.sync_folder(root)
        for file in (WEIGHTS, AVERAGE):
            if (folder / (file + WRITING)).is_file():
                os.replace(folder / (file + WRITING), folder / file)
                evaluated = file
            else:  # of an earlier run, or from before a change of settings
                (folder / file).unlink(missing_ok=True)
        best = best if self.settings.keep_best else None
        if best == files.step_of(name):
            shutil.copyfile(folder / evaluated, folder / (BEST + WRITING))
            os.replace(folder / (BEST + WRITING), folder / BEST)
        files.sync_folder(folder)
        files.publish(root / LATEST, name.encode())
        # Those newer than the one published before are left over from before a resume from an older
        # one.
        kept = {name, *before[: self.settings.keep - 1]}
        kept |= {*[other for other in (name, *before) if files.step_of(other) == best][:1]}
        listed: set[str] = set()
        for other in files.names(root):
            if other not in kept:
                files.remove(root / other)
            else:
                with suppress(ValueError):
                    listed |= files.read_checksums(root / other).keys()
        for path in root.glob("frozen-*"):
            if f"../{path.name}" not in listed:
                path.unlink()

    def diverged(self, what: str, state: TrainState) -> str:
        """The error message of a diverged run: its first bad step and the last good checkpoint."""
        first = state.step - max(0, state.skipped_in_row - 1)
        good = next(iter(files.candidates(self.folder / FOLDER)), None)
        kept = "no checkpoint had been saved before"
        if good is not None:
            kept = f"the last good checkpoint is {self.folder / FOLDER / good}"
        return (
            f"the run has diverged: {what}; the first bad step is {first}, {kept}. Look at the "
            f"samples that {self.folder / 'metrics.jsonl'} names, or start over with a lower --lr"
        )

    def closing_lines(self, state: TrainState) -> list[str]:
        """The lines to print at the end of a run.

        Raises:
            UserError: its last checkpoint could not be written.
        """
        if not self.holds(state):
            raise UserError(
                f"the last checkpoint could not be written ({self.error}): mend that, and start "
                f"{self.folder} again"
            )
        lines = []
        if state.out_of_patience(self.settings.patience):
            lines.append(
                f"ended at step {state.step}: {state.worse_in_row} evaluations in a row gave no "
                "better result"
            )
        best = state.best
        over = f" ({best['pairs']} pairs, chance {best['chance']:.3f})"
        lines.append(f"best {best['metric']} {best['value']:.3f} at step {best['step']}{over}")
        paths = [self.folder / name for name in WRITTEN if (self.folder / name).exists()]
        names = ", ".join(path.name + "/" * path.is_dir() for path in paths)
        return [*lines, f"written to {self.folder}: {names}"]
