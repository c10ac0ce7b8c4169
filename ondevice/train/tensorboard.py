"""A run for TensorBoard, step by step (the extra `tensorboard`: tensorboardX writes its files without TensorFlow)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OnDeviceError, Unavailable
from .events import Event, Started, StepDone


class Board:
    """Takes a run's events. A resumed run hides what an earlier one wrote behind its checkpoint."""

    def __init__(self, folder: Path, writer: Any):
        self.folder, self.new, self.writer = folder, writer, None

    def add(self, event: Event) -> None:
        if isinstance(event, Started):
            self.writer = self.new(str(self.folder), purge_step=event.done + 1 if event.done else None)
        if not isinstance(event, StepDone):
            return
        numbers = event.as_dict()
        for name in numbers.keys() - {"step"}:
            self.writer.add_scalar(name, numbers[name], event.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


@contextmanager
def board(folder: Path) -> Iterator[Board]:
    """Raises Unavailable without tensorboardX, OnDeviceError where `folder` cannot be written to."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise Unavailable("TensorBoard's files need the package tensorboardX.", "pip install tensorboardX") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnDeviceError(f"{folder} cannot be written to: {error.strerror}.", "Choose another place.") from None
    made = Board(folder, SummaryWriter)
    try:
        yield made
    finally:
        made.close()
