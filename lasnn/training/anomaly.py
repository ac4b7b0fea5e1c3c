"""A training that looks at every pass: slow, and it names the operation that first gives a NaN gradient."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from lasnn.errors import MachineError
from lasnn.training.parallel import Batch, BatchSlice
from lasnn.training.trainer import Trainer


class AnomalyTrainer(Trainer):
    """Checks the terms before each backward pass, and runs under autograd's anomaly detection."""

    checks_every_step = True

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        with name_anomaly(self.phase.name, batch.epoch, batch.step):
            return super().train_step(batch)

    def backward(self, terms: dict[str, Tensor], batch_slice: BatchSlice) -> None:
        # Summed over the processes, so that all of them stop.
        self.monitor.update(batch_slice.batch.step, self.parallel.sum(terms))
        self.raise_if_nonfinite(batch_slice.batch)
        super().backward(terms, batch_slice)


@contextmanager
def name_anomaly(phase: str, epoch: int, step: int) -> Iterator[None]:
    """Turn what autograd's anomaly detection raises into a line: the operation, and the line of code it came from."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
    except RuntimeError as error:
        if "returned nan values" not in str(error):
            raise
        # The warning has the stack of the forward call; its last lines outside of PyTorch are what the reader knows.
        stack = "".join(str(warning.message) for warning in said)
        frames = [f for f in re.findall(r'File "(.+?)", line (\d+), in (\w+)', stack) if "/torch/" not in f[0]]
        where = f", computed in {frames[-1][2]} ({frames[-1][0]}:{frames[-1][1]})" if frames else ""
        reason = str(error).rstrip(".")
        raise MachineError(
            f"the {phase}'s gradient breaks in epoch {epoch + 1}, step {step + 1}: {reason}{where}"
        ) from error
