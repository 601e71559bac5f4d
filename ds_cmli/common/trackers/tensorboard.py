"""TensorBoard, in the run's own folder: numbers in groups, match maps, the configuration, settings beside results."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ds_cmli.common import panels


class TensorBoard:
    """Its files are opened with the first value, and again after a full disk; what came in between is lost."""

    errors = (OSError,)

    def __init__(self, folder: Path, first_step: int):
        self.folder, self.first_step = folder, first_step
        self.events: SummaryWriter | None = None
        self.results: dict[str, float] = {}  # the last of each held-out metric
        threading.excepthook = _without_full_disks(threading.excepthook)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.results |= {name: value for name, value in values.items() if name.startswith(panels.RESULTS)}
        with self._opened(step) as events:
            for name, value in values.items():
                events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Any) -> None:
        with self._opened(step) as events:
            events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self.events is None:
            return
        if self.results and (self.folder / "config.json").is_file():
            for summary in panels.settings_and_results(self.folder, self.results):
                self.events.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        self.events.close()

    @contextmanager
    def _opened(self, step: int) -> Iterator[SummaryWriter]:
        try:
            if self.events is None:
                # What an interrupted run drew after the step it resumes from is hidden.
                self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=min(step, self.first_step + 1))
                self.events.add_text("configuration", panels.configuration(self.folder), step)
            yield self.events
        except OSError:
            self.events = None
            raise


def _without_full_disks(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """TensorBoard's thread would print a traceback for what its next use raises, and the writer tells, in one line."""

    def told_later(failure: Any) -> None:
        if not (type(failure.thread).__name__ == "_AsyncWriterThread" and isinstance(failure.exc_value, OSError)):
            hook(failure)

    return told_later
