"""What every format is: a file that is written, and the readers that it is verified in."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lasnn import __version__
from lasnn.description import describe_student
from lasnn.errors import UserError
from lasnn.loaded_run import Run
from lasnn.registry import architectures, encoders, neurons, reason


@dataclass(frozen=True, eq=False)
class Sample:
    """A batch of test images and what the student makes of them: what a reader is held against.

    Shapes: T time steps, B batch, K classes.
    """

    images: Tensor
    """[B, C, H, W] in [0, 1]."""
    encoded: Tensor
    """What the first layer sees, [T, B, C, H, W], or [1, B, C, H, W] where it is constant in time."""
    logits: Tensor
    """[B, K], the mean over the steps."""
    spikes: dict[str, Tensor]
    """Of each layer, in the order in which they run: [T, B, ...]."""


@dataclass(frozen=True)
class Reader:
    """A program with the exported file loaded."""

    name: str
    """With its version."""
    run: Callable[[Sample], tuple[Tensor, dict[str, Tensor]]]
    """From a sample (its images or its encoded images, as the file takes them) to logits [B, K] and, by the student's
    names, the spikes [T, B, ...] of those layers that the program shows."""
    exact: bool = False
    """Whether logits and spikes must be the student's bit for bit."""
    exact_layers: int = 0
    """Up to how many spiking layers no spike of a network may differ."""


class Exporter(ABC):
    """One format: writes a student to a file and loads it in the programs that the file is for.

    A subclass is registered with `exporters.register(name)`; lasnn calls `check`, `write` and `readers`, in this order.
    Packages that are not among lasnn's own dependencies are imported within the methods, never with the module.

    Args:
        run: a finished run, on the CPU.
        timesteps: T.
    """

    suffix: str
    """What the file's name ends in, with the dot."""
    extra: str = ""
    """The optional dependency of lasnn that brings `packages`."""
    packages: Sequence[str] = ()
    """Modules that must be there."""

    def __init__(self, run: Run, timesteps: int):
        self.run = run
        # A view with its own T; the run's student keeps its own.
        self.student = copy.copy(run.student)
        self.student.timesteps = timesteps
        self.timesteps = timesteps

    def check(self) -> None:  # noqa: B027
        """Find what the format cannot say of this student, before anything is written.

        Raises:
            UserError: the reasons, a line each.
        """

    @abstractmethod
    def write(self, path: Path) -> None:
        """Write the file; `path` ends in `suffix`, and what is there is replaced."""

    @abstractmethod
    def readers(self, path: Path) -> Sequence[Reader]:
        """The file, loaded in each of its readers; at least one."""

    def fed(self, sample: Sample) -> Tensor:
        """What the file takes of a sample: images, or what an encoder that draws has drawn."""
        return sample.encoded if self.student.encoder.random else sample.images

    def example(self) -> tuple[Tensor, int]:
        """An input of two images, as the file takes it, and the axis of the batch."""
        data = self.run.description
        images = torch.rand(2, data.channels, data.height, data.width)
        if not self.student.encoder.random:
            return images, 0
        return self.student.encoder(images, self.timesteps), 1

    @contextmanager
    def translate_part_errors(self) -> Iterator[None]:
        """Turn an error in a network with the user's own parts into one line that names them; otherwise it is a bug."""
        student = self.run.recipe.student
        entries = (
            architectures[student.architecture],
            neurons[student.neuron.name],
            encoders[student.encoder_table.name],
        )
        own = [entry for entry in entries if entry.own]
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if not own:
                raise
            names = " with ".join(f"{entry.kind} {entry.name!r} ({entry.where})" for entry in own)
            raise UserError(f"{names} cannot be exported: {reason(error)}") from error

    @property
    def takes(self) -> str:
        """What the file takes, for people."""
        shape = (
            f"C, H, W] = [{self.run.description.channels}, {self.run.description.height}, {self.run.description.width}]"
        )
        if self.student.encoder.random:
            name = self.run.recipe.student.encoder_table.name
            return f"encoded images [T, B, {shape}, T = {self.timesteps}; the {name} encoder's draws are the caller's"
        return f"images in [0, 1], [B, {shape}"

    @property
    def gives(self) -> str:
        """What the file gives, for people."""
        return f"logits [B, {len(self.run.description.classes)}], the mean over the steps"

    @property
    def needs(self) -> list[str]:
        """The files that must lie beside the exported one for its readers."""
        return []

    def description(self) -> dict[str, Any]:
        """What the metadata of every format says: the network, the data, T, the encoder and the whole recipe."""
        table = self.run.recipe.student.model_copy(update={"timesteps": self.timesteps})
        recipe = self.run.recipe.model_copy(update={"student": table})
        return {"lasnn": __version__, **describe_student(recipe, self.run.description), "takes": self.takes}
