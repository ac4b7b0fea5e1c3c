"""How far a training has come, and its metrics."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lasnn.evaluation.measure import VALIDATION


@dataclass
class Progress:
    """Of one phase: `step` steps of `epoch` are done; both count from 0.

    Args:
        phase: "teacher", "start" or "student".
        terms: names of the loss terms.
        sums: of the terms and of "loss" over the epoch's images so far; they stay on the device.
        images: of the epoch so far.
        metrics: of the last whole epoch, whose number counts from 1 there.
    """

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
        """Start an epoch, or continue one that was interrupted after some steps."""
        if not self.step:
            self.sums = dict.fromkeys(["loss", *self.terms], 0.0)
            self.images, self.epoch_seconds = 0, 0.0
        self.epoch = epoch
        self._epoch_begin = time.perf_counter() - self.epoch_seconds

    def update(self, sums: Mapping[str, Tensor], step: int, images: int) -> None:
        """Count a step: the sums of its terms over its images."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value
        self.images += images
        self.step = step + 1
        self.epoch_seconds = time.perf_counter() - self._epoch_begin

    def position(self) -> str:
        """Where the training stands, for messages."""
        return f"{self.phase} epoch {self.epoch + 1}, step {self.step + 1}"

    @property
    def images_per_second(self) -> float:
        return self.images / self.epoch_seconds

    def finish_epoch(self, measured: Mapping[str, Any], lr: float) -> dict[str, Any]:
        """Close an epoch, after which the model was `measured`; returns its metrics."""
        self.metrics = {
            "phase": self.phase,
            "epoch": self.epoch + 1,
            "loss": float(self.sums["loss"]) / self.images,
            "losses": {name: float(self.sums[name]) / self.images for name in self.terms},
            **measured,
            "lr": lr,
            "seconds": self.epoch_seconds,
            "images_per_second": self.images_per_second,
        }
        self.epoch, self.step = self.epoch + 1, 0
        return self.metrics

    def result(self) -> dict[str, float]:
        """What was measured last, the seconds of the whole phase and the last epoch's throughput."""
        return {
            **{key: self.metrics[key] for key in ("accuracy", *VALIDATION) if key in self.metrics},
            "seconds": time.perf_counter() - self._begin,
            "images_per_second": self.metrics["images_per_second"],
        }

    def as_dict(self) -> dict[str, Any]:
        """What is saved of it. No generator's state is: every random number is keyed by seed, epoch and step."""
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
        """Continue where `as_dict` was made.

        Raises:
            ValueError: there is no such epoch or step.
        """
        self.epoch, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
        self.sums, self.metrics = saved["sums"], saved["latest"]
        self.images, self.epoch_seconds = saved["trained"], saved["epoch_seconds"]
        if not (0 <= self.epoch <= epochs and 0 <= self.step <= steps):
            raise ValueError(f"there is no epoch {self.epoch + 1}, step {self.step + 1}")
        self._start_clocks()
