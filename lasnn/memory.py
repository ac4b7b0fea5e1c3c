"""The memory that a training step needs, found out on the meta device; and how it is given back."""

import ctypes
import math
import sys
from collections.abc import Callable

import torch
from torch import nn

from lasnn import processes
from lasnn.data import Dataset
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.time_chunks import even_chunks
from lasnn.recipe.schema import Recipe
from lasnn.registry import neurons, translate_errors

# Numbers that an optimiser keeps of each that is learnt.
STATES = {"sgd": 1, "adamw": 2}
# Options of glibc's mallopt, from <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
# Freed memory stays in the heap, or goes back to the system.
WHOLE = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
CHUNKS = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 64 * 2**10, M_TRIM_THRESHOLD: 128 * 2**10}
# What PyTorch says where the value of a tensor is read on the meta device.
NO_VALUES = "cannot be called on meta tensors"


def count_parameters(network: nn.Module) -> int:
    """Learnable numbers in the network."""
    return sum(parameter.numel() for parameter in network.parameters())


def training_images(recipe: Recipe, data: Dataset) -> int:
    """How many images are trained on: all but those that `data.validation` holds out."""
    return data.train_size - recipe.data.validation


def carried_voltages(recipe: Recipe, data: Dataset, student: Student) -> list[torch.Tensor]:
    """What is carried from one chunk of time to the next, on the meta device.

    Raises:
        UserError: the neuron cannot go on from a voltage.
    """
    student.eval()
    with translate_errors(neurons[recipe.student.neuron.name]), student.network.time.carry_state({}) as voltages:
        student.network(_encoded(recipe, data, student, 1), 1)
    return list(voltages.values())


def _encoded(recipe: Recipe, data: Dataset, student: Student, steps: int) -> torch.Tensor:
    """The first steps of what a micro-batch of images is encoded to, on the meta device."""
    return student.encoder.part(_images(recipe, data), recipe.student.timesteps, stop=steps)


def _images(recipe: Recipe, data: Dataset) -> torch.Tensor:
    """What a process computes at once, on the meta device."""
    # A batch has no more images than there are.
    part = min(recipe.data.batch_size / recipe.data.accumulate, training_images(recipe, data))
    batch = math.ceil(part / processes.world_size())
    return torch.empty(batch, data.channels, data.height, data.width, device="meta")


def training_memory(
    recipe: Recipe, data: Dataset, student: Student, teacher: Teacher | None, of_losses: int = 0, half: bool = False
) -> int:
    """Bytes of a training step: weights, gradients, optimiser state and what the student keeps for its backward pass.

    `of_losses` is how many learnable numbers the losses have. The activations are the tensors that autograd saves in a
    forward pass of a micro-batch on the meta device, half of them where the training is in `half` precision. With time
    in chunks they are those of one chunk, and the voltages before each. Workspaces of the convolutions are not in it.
    """
    timesteps, carried = recipe.student.timesteps, 0
    if recipe.time_chunk:
        count, timesteps = even_chunks(timesteps, recipe.time_chunk)
        carried = count * sum(voltage.nbytes for voltage in carried_voltages(recipe, data, student))
    saved = _saved(student, lambda: student.network(_encoded(recipe, data, student, timesteps), timesteps))
    learnt = 4 * (count_parameters(student.network) + of_losses) * (2 + STATES[recipe.distill.optimizer])
    frozen = 4 * count_parameters(teacher.network) if teacher else 0
    return saved // (2 if half else 1) + carried + learnt + frozen


def ann_memory(recipe: Recipe, data: Dataset, ann: Teacher, name: str, half: bool = False) -> int:
    """Bytes of a step of an ANN's own training, on the meta device, counted as those of the student's.

    Args:
        name: "teacher" or "start".
    """
    saved = _saved(ann, lambda: ann(_images(recipe, data)))
    learnt = 4 * count_parameters(ann.network) * (2 + STATES[getattr(recipe, name).optimizer])
    return saved // (2 if half else 1) + learnt


def _saved(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of what autograd saves in a model's forward pass in training, but for parameters."""
    saved: dict[int, int] = {}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in saved and not isinstance(tensor, nn.Parameter):
            kept.append(storage)
            saved[id(storage)] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        try:
            model.train()
            forward()
        except RuntimeError as error:
            if NO_VALUES not in str(error):
                raise
            # What it draws to leave parts out by chance; in evaluation it leaves none out.
            saved.clear()
            model.eval()
            forward()
    return sum(saved.values())


def tune_allocator(chunks: bool) -> None:
    """Set what glibc does with memory that is freed, for a training on a CPU (elsewhere: nothing).

    A step frees what the next one allocates: kept in the heap it is used again as it is, where the system would give
    new pages, zeroed one by one. Not with time in `chunks`: the voltages between them fragment the heap, and the
    process grows several times beyond the tensors that it holds. Each block of 64 KiB and more then goes back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in (CHUNKS if chunks else WHOLE).items():
            mallopt(option, value)
