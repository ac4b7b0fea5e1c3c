"""The exponential moving average of a model's weights, kept beside those that are trained (`ema` in the recipe)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average:
    """The average of a model over its steps; without a decay, the model itself.

    Parameters are averaged, and so are batch norm's running statistics, by the same rule, as timm and torchvision do:
    no pass over the images is needed. Counters are copied.

    Args:
        model: what is trained; made before it is distributed over processes, each of which averages the same weights.
        decay: a, in average = a average + (1 - a) weights after each step; 0 keeps no average. Of the first steps it is
            at most (1 + n) / (10 + n) after n of them, as in TensorFlow's ExponentialMovingAverage, so that the random
            start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.averaged: AveragedModel | None = None
        if decay:
            self.averaged = AveragedModel(model, multi_avg_fn=self._mix, use_buffers=True)

    @torch.no_grad()
    def _mix(self, averages: list[Tensor], current: list[Tensor], _: Tensor | int) -> None:
        # The number of steps that is given may be on a GPU, which reading it would wait for.
        count = int(self.averaged.n_averaged)
        decay = min(self.decay, (1 + count) / (10 + count))
        for average, value in zip(averages, current, strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)

    def update(self) -> None:
        """Count the weights after a step."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averages; afterwards its own weights again, to the bit."""
        if self.averaged is None:
            yield
            return
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.adopt()
        try:
            yield
        finally:
            self.model.load_state_dict(kept)

    def adopt(self) -> None:
        """Give the model the averages for good."""
        if self.averaged is not None:
            self.model.load_state_dict(self.averaged.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What is saved of it; {} where there is no average."""
        return {} if self.averaged is None else self.averaged.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what was saved.

        Raises:
            RuntimeError: it is of another model, or there is none.
        """
        if self.averaged is not None:
            self.averaged.load_state_dict(saved)
