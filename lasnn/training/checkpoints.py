"""A run's state on disk, from which it goes on: a `.pt` of tensors and plain values (`weights_only=True` reads it)."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lasnn import processes
from lasnn.errors import UserError
from lasnn.training.precision import Precision
from lasnn.weights import save_state

STATE = "last.pt"


@dataclass
class TrainingState:
    """How far a phase is: `step` steps of `epoch` are done. Sums over the epoch's images stay on the device."""

    phase: str
    terms: tuple[str, ...]
    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor | float] = field(default_factory=dict)
    images: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self._start_clocks()

    def _start_clocks(self) -> None:
        now = time.perf_counter()
        self._begin, self._epoch_begin = now - self.seconds, now - self.epoch_seconds

    def begin_epoch(self, epoch: int) -> None:
        """Start an epoch, or go on with one that was interrupted after some steps."""
        if not self.step:
            self.sums = dict.fromkeys(["loss", *self.terms], 0.0)
            self.images, self.epoch_seconds = 0, 0.0
        self.epoch = epoch
        self._epoch_begin = time.perf_counter() - self.epoch_seconds

    def update(self, terms: Mapping[str, Tensor], step: int, images: int) -> None:
        """Count a step: sums of its terms over its images."""
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value
        self.images += images
        self.step = step + 1
        self.epoch_seconds = time.perf_counter() - self._epoch_begin

    @property
    def images_per_second(self) -> float:
        return self.images / self.epoch_seconds

    def finish_epoch(self, accuracy: float, images: int, lr: float) -> dict[str, Any]:
        """Close an epoch over `images` images; returns its metrics."""
        self.metrics = {
            "phase": self.phase,
            "epoch": self.epoch + 1,
            "loss": float(self.sums["loss"]) / images,
            "losses": {name: float(self.sums[name]) / images for name in self.terms},
            "accuracy": accuracy,
            "lr": lr,
            "seconds": self.epoch_seconds,
            "images_per_second": self.images_per_second,
        }
        self.epoch, self.step = self.epoch + 1, 0
        return self.metrics

    def result(self) -> dict[str, float]:
        """The last accuracy, the seconds of the whole phase and the last epoch's throughput."""
        return {
            "accuracy": self.metrics["accuracy"],
            "seconds": time.perf_counter() - self._begin,
            "images_per_second": self.metrics["images_per_second"],
        }

    def as_dict(self) -> dict[str, Any]:
        """What is saved of it."""
        return {
            "phase": self.phase,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": time.perf_counter() - self._begin,
            "sums": self.sums,
            "trained": self.images,
            "epoch_seconds": self.epoch_seconds,
            "latest": self.metrics,
        }

    def load(self, saved: Mapping[str, Any], epochs: int, steps: int) -> None:
        """Go on where `as_dict` was made.

        Raises:
            ValueError: there is no such epoch or step.
        """
        self.epoch, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
        self.sums, self.metrics = saved["sums"], saved["latest"]
        self.images, self.epoch_seconds = saved["trained"], saved["epoch_seconds"]
        if not (0 <= self.epoch <= epochs and 0 <= self.step <= steps):
            raise ValueError(f"there is no epoch {self.epoch + 1}, step {self.step + 1}")
        self._start_clocks()


class Checkpoints:
    """Saves the full state of a run, and takes it up again.

    Args:
        path: of the state.
        minutes: between saves.
        identity: what a state holds for, besides its recipe: {name: digest}.
        saved: the state that the run goes on from, if there is one.
    """

    def __init__(
        self, path: Path, minutes: float, identity: Mapping[str, str | None], saved: Mapping[str, Any] | None = None
    ):
        self.path = path
        self.minutes = minutes
        self.identity = dict(identity)
        self.saved = saved
        self._last = time.monotonic()

    @property
    def hint(self) -> str:
        """For messages of failures: where the last good state is."""
        return f" The last good state is in {self.path}." if self.path.is_file() else ""

    def due(self) -> bool:
        """Whether so many minutes have passed since the last save."""
        return time.monotonic() - self._last >= 60 * self.minutes

    def restore(
        self,
        state: TrainingState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        epochs: int,
        steps: int,
    ) -> bool:
        """Load what was saved of this phase; False where nothing was.

        Raises:
            UserError: it is of other images or another teacher, or does not fit the recipe.
        """
        saved, self.saved = self.saved, None
        if saved is None or saved["phase"] != state.phase:
            return False
        self._check_identity(saved)
        with self._translate_errors():
            model.load_state_dict(saved["module"])
            optimizer.load_state_dict(saved["optimizer"])
            precision.scaler.load_state_dict(saved["scaler"])
            state.load(saved, epochs, steps)
        return True

    def save(
        self, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision
    ) -> None:
        """Write the full state; returns once it is on the disk, in every process."""
        kept = {
            **self.identity,
            **state.as_dict(),
            "module": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": precision.scaler.state_dict(),
        }
        save_state(self.path, kept)
        # Until it is written no process ends, which would end the others.
        processes.barrier()
        self._last = time.monotonic()

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        named = {
            "images": "the training images",
            "teacher": f"the weights in {self.path.parent / 'teacher.safetensors'}",
        }
        changed = [what for key, what in named.items() if saved.get(key) != self.identity[key]]
        if changed:
            raise UserError(
                f"{self.path} cannot be resumed: {' and '.join(changed)} are not those that the run began with"
            )

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn what a state that is whole, but not this run's, makes PyTorch raise into a line that names it."""
        try:
            yield
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.path} does not fit the recipe: {type(error).__name__}: {reason}") from error
