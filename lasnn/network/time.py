"""How many time steps a forward pass folds together, and the voltages that are carried from one pass to the next."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from lasnn.kernels import BatchStatistics, update_running_statistics


@dataclass
class TimeContext:
    """How many time steps and images the current forward pass folds together.

    One is shared by a network and its units. `Staged.forward` sets it and the units read it, which is what lets
    everything between them be plain `torch.nn` modules that know nothing of time.

    It holds neuron state only while a caller runs a sequence in time chunks (see `carry_state`): `voltages` of the
    units, by name, which each unit takes up and replaces, and `start`, the number of steps before this chunk.
    """

    steps: int = 1
    batch: int = 0
    start: int = 0
    voltages: dict[str, Tensor] | None = None
    # Where batch statistics go in the place of the running ones, which a run in time chunks updates once.
    collected: dict[nn.BatchNorm2d, list[BatchStatistics]] | None = None

    @contextmanager
    def carry_state(self, voltages: Mapping[str, Tensor], start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Within the block the units go on from `voltages` (from rest where there is none) instead of from rest.

        Yields the dict that holds the voltages after the last step once the network has run; `voltages` is not changed.
        """
        self.voltages, self.start = dict(voltages), start
        try:
            yield self.voltages
        finally:
            self.voltages, self.start = None, 0

    @contextmanager
    def collect_statistics(self) -> Iterator[dict[nn.BatchNorm2d, list[BatchStatistics]]]:
        """Within the block the units' batch statistics are collected, and no running statistics updated."""
        before, self.collected = self.collected, {}
        try:
            yield self.collected
        finally:
            self.collected = before

    def update_statistics(self, norm: nn.BatchNorm2d, batch: BatchStatistics | None) -> None:
        """Update a norm's running statistics by a batch's (None: nothing to do), or collect these."""
        if batch is None or self.collected is None:
            update_running_statistics(norm, batch)
        else:
            self.collected.setdefault(norm, []).append(batch)

    def unfold(self, x: Tensor) -> Tensor:
        """[T*B, ...] -> [T, B, ...]; a tensor that is constant in time, [B, ...] -> [1, B, ...]."""
        steps = 1 if x.shape[0] == self.batch else self.steps
        return rearrange(x, "(t b) ... -> t b ...", t=steps)
