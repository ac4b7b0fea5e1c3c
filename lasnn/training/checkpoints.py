"""The state of a run on disk, from which it is resumed: tensors and plain values, which `weights_only=True` reads."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lasnn import processes
from lasnn.errors import UserError
from lasnn.training.average import Average
from lasnn.training.precision import Precision
from lasnn.training.progress import Progress
from lasnn.weights import save_state

# What a state must have been made with, besides its recipe, and what messages call it.
MADE_WITH = {
    "images": "the training images",
    "teacher": "the weights in {folder}/teacher.safetensors",
    "start": "the weights that the student started from",
}

# In the order of a run.
PHASES = ("teacher", "start", "student")


class Buffers:
    """The buffers of what is trained before a step: batch norm updates its statistics in the forward pass, so that a
    step that fails later would leave them ahead of the weights.
    """

    def __init__(self, learnt: nn.Module):
        self.learnt = learnt

    @contextmanager
    def restored_at_failure(self) -> Iterator[None]:
        """If the block fails, set the buffers back."""
        buffers = list(self.learnt.buffers())
        kept = [buffer.clone() for buffer in buffers]
        try:
            yield
        except Exception:
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
            raise


class Checkpoints:
    """Saves the full state of a run, and restores it.

    Args:
        path: of the state.
        minutes: between saves.
        saved: the state that the run is resumed from, if there is one.
    """

    def __init__(self, path: Path, minutes: float, saved: Mapping[str, Any] | None = None):
        self.path = path
        self.minutes = minutes
        self.saved = saved
        self._identity: dict[str, str | None] = dict.fromkeys(MADE_WITH)
        self._last = time.monotonic()

    def require(self, name: str, digest: str | None) -> None:
        """A state that is restored must have been made with this: these "images", this "teacher" or "start"."""
        self._identity[name] = digest

    @property
    def hint(self) -> str:
        """For messages of failures: where the last good state is."""
        return f" The last good state is in {self.path}." if self.path.is_file() else ""

    def due(self) -> bool:
        """Whether so many minutes have passed since the last save."""
        return time.monotonic() - self._last >= 60 * self.minutes

    def restore(
        self,
        progress: Progress,
        model: nn.Module,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        average: Average,
        *,
        epochs: int,
        steps: int,
    ) -> bool:
        """Load what was saved of a training; False where nothing was saved of its phase.

        Args:
            progress, model, objective, optimizer, precision, average: get their saved states.
            epochs, steps: how many epochs the training has, and how many steps an epoch has.

        Raises:
            UserError: it is of other images, another teacher or a later phase, or does not fit the recipe.
        """
        saved, self.saved = self.saved, None
        if saved is None:
            return False
        if PHASES.index(saved["phase"]) > PHASES.index(progress.phase):
            missing = f"{self.path.parent / progress.phase}.safetensors"
            raise UserError(
                f"{self.path} is of the {saved['phase']}'s training, but {missing} is missing: put it back, or choose "
                f"another --out to train the {progress.phase} again"
            )
        if saved["phase"] != progress.phase:
            return False
        self._check_identity(saved)
        with self._translate_errors():
            model.load_state_dict(saved["module"])
            objective.load_state_dict(saved["objective"])
            optimizer.load_state_dict(saved["optimizer"])
            precision.scaler.load_state_dict(saved["scaler"])
            average.load_state_dict(saved.get("average", {}))
            progress.load(saved, epochs, steps)
        return True

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        average: Average,
    ) -> None:
        """Write the full state: the main process does, and every process returns once the file is on the disk."""
        state = {
            **self._identity,
            **progress.as_dict(),
            "module": model.state_dict(),
            "objective": objective.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": precision.scaler.state_dict(),
            "average": average.state_dict(),
        }
        save_state(self.path, state)
        # No process may end before it is written: the others would be ended with it.
        processes.barrier()
        self._last = time.monotonic()

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        changed = [
            what.format(folder=self.path.parent)
            for name, what in MADE_WITH.items()
            # A state of an earlier lasnn does not say what the student started from.
            if name in saved and saved[name] != self._identity[name]
        ]
        if changed:
            raise UserError(
                f"{self.path} cannot be resumed: {' and '.join(changed)} are not those that the run began with; put "
                "them back as they were, or choose another --out"
            )

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn what a state that is whole, but not this run's, makes PyTorch raise into a line that names it."""
        try:
            yield
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            fix = "remove it to begin this training again, or choose another --out"
            raise UserError(f"{self.path} does not fit the recipe: {type(error).__name__}: {reason}; {fix}") from error
