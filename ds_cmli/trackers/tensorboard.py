"""TensorBoard files in the run's folder.

They hold scalars, match maps, the configuration, and an entry of the HParams panel.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from numpy import ndarray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ds_cmli import trackers

Hook = Callable[[threading.ExceptHookArgs], object]


class TensorBoard:
    """The event file is opened at the first value, and anew after an error such as a full disk.

    Values are lost by such an error.
    """

    errors = (OSError,)

    def __init__(self, folder: Path, first_step: int):
        self.folder, self.first_step = folder, first_step
        self.events: SummaryWriter | None = None
        self.results: dict[str, float] = {}  # the last value of each held-out metric
        threading.excepthook = _without_full_disks(threading.excepthook)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.results |= {
            name: value for name, value in values.items() if name.startswith(trackers.RESULTS)
        }
        with self._opened(step) as events:
            for name, value in values.items():
                events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: ndarray) -> None:
        with self._opened(step) as events:
            events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self.events is None:
            return
        if self.results and (self.folder / "config.json").is_file():
            for summary in hparams(trackers.settings(self.folder), self.results):
                self.events.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        self.events.close()

    @contextmanager
    def _opened(self, step: int) -> Iterator[SummaryWriter]:
        try:
            if self.events is None:
                # `purge_step` hides what an interrupted run wrote after the step from which this
                # one resumes.
                self.events = SummaryWriter(
                    str(self.folder / "tensorboard"), purge_step=min(step, self.first_step + 1)
                )
                self.events.add_text("configuration", trackers.configuration(self.folder), step)
            yield self.events
        except OSError:
            self.events = None
            raise


def _without_full_disks(hook: Hook) -> Hook:
    """Make an excepthook that prints no traceback if TensorBoard's thread meets a full disk.

    The next use of the thread raises the same error.
    """

    def told_later(failure: threading.ExceptHookArgs) -> None:
        if not (
            type(failure.thread).__name__ == "_AsyncWriterThread"
            and isinstance(failure.exc_value, OSError)
        ):
            hook(failure)

    return told_later
