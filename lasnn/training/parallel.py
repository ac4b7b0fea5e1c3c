"""How a batch is computed: by how many processes, and in how many parts one after the other.

In one process, and without `data.accumulate`, a batch is one slice and everything else here does nothing.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lasnn import processes
from lasnn.errors import UserError
from lasnn.kernels import BatchNorm2d
from lasnn.plan import micro_batches
from lasnn.recipe.schema import Recipe


@dataclass(frozen=True)
class Batch:
    """Those images of a step that this process has, of `total` in all processes; epoch and step count from 0."""

    epoch: int
    step: int
    images: Tensor
    targets: Tensor
    total: int


@dataclass(frozen=True)
class BatchSlice:
    """Images that are computed at once: from number `first` on in the batch of `total`.

    `weight` is the factor of their mean loss whose gradients, averaged over the processes, add up to that of the mean
    over the batch; `last` says that no slice of the batch follows.
    """

    epoch: int
    step: int
    images: Tensor
    targets: Tensor
    first: int
    total: int
    weight: float
    last: bool


class ForwardPass(nn.Module):
    """An objective, called as the forward pass of the model that it runs: what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, objective: nn.Module):
        super().__init__()
        self.model = model
        self.objective = objective
        # One that is never used: without any, DistributedDataParallel advises against looking for them.
        self.unused = nn.Parameter(torch.zeros((), device=next(model.parameters()).device))

    def forward(self, *arguments, **options) -> dict[str, Tensor]:
        return self.objective(*arguments, **options)


class Parallel:
    """Shares a recipe's batches out, over processes and in time."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def wrap(self, model: nn.Module, objective: nn.Module) -> nn.Module:
        """`objective`, which runs `model`, such that all processes train the model together.

        In the backward pass gradients are averaged over the processes, and batch norms in training have the statistics
        of all processes' images.

        Raises:
            UserError: the model has batch norms whose statistics would stay each process's own.
        """
        if processes.world_size() == 1:
            return objective
        share_batch_norms(model)
        with warnings.catch_warnings():
            # Buffers are equal as they are; torch 2.14 has another name for saying so.
            warnings.simplefilter("ignore", FutureWarning)
            # Blocks that a forward pass leaves out are found in each. So the buckets stay as they are, too, and a
            # resumed run adds up in the same order.
            return DistributedDataParallel(
                ForwardPass(model, objective), broadcast_buffers=False, find_unused_parameters=True
            )

    def _indices(self, total: int) -> list[Tensor]:
        """Which images of a batch of `total` this process has, in each slice."""
        slices = torch.arange(total).tensor_split(micro_batches(total, self.recipe))
        return [indices[processes.local_slice(len(indices))] for indices in slices]

    def local_images(self, total: int) -> Tensor:
        """Which images of a batch of `total` this process has."""
        return torch.cat(self._indices(total))

    def slices(self, batch: Batch) -> Iterator[BatchSlice]:
        """What is computed one after the other."""
        indices = self._indices(batch.total)
        sizes = [len(part) for part in indices]
        parts = zip(indices, batch.images.split(sizes), batch.targets.split(sizes), strict=True)
        for number, (part, images, targets) in enumerate(parts, start=1):
            yield BatchSlice(
                batch.epoch,
                batch.step,
                images,
                targets,
                first=int(part[0]) if len(part) else 0,
                total=batch.total,
                weight=processes.world_size() * len(part) / batch.total,
                last=number == len(indices),
            )

    def gradient_exchange(self, forward: nn.Module, part: BatchSlice) -> AbstractContextManager:
        """Around a forward pass: where the gradients of several slices add up, the last one exchanges the sum."""
        return nullcontext() if part.last or not isinstance(forward, DistributedDataParallel) else forward.no_sync()

    def sum(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes' images; none of it waits for the device."""
        if processes.world_size() == 1:
            return terms
        own = torch.stack([value.detach().double() for value in terms.values()])
        return dict(zip(terms, processes.all_reduce_sum(own), strict=True))


def share_batch_norms(model: nn.Module) -> None:
    """Let batch norms in training have the statistics of all processes' images.

    Raises:
        UserError: there are some of a kind that cannot.
    """
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, _BatchNorm)}
    known = (nn.BatchNorm2d, BatchNorm2d)
    other = [f"{name} ({type(norm).__name__})" for name, norm in norms.items() if type(norm) not in known]
    if other:
        raise UserError(
            f"in several processes these would normalise by a part of the batch each: {', '.join(other)}; use "
            "nn.BatchNorm2d, or train in one process"
        )
    for norm in norms.values():
        # In place: a network's stages may be views of its layers (see StagedView).
        norm.__class__ = BatchNorm2d
        norm.group = dist.group.WORLD


def zero_loss(outputs: Iterable[Tensor | list[Tensor]]) -> Tensor:
    """The loss of no image: 0, from a network's empty outputs, whose parameters get gradients as ever."""
    tensors = [tensor for output in outputs for tensor in (output if isinstance(output, list) else [output])]
    return torch.stack([tensor.sum().float() for tensor in tensors]).sum()


def check_processes(recipe: Recipe) -> None:
    """Check that a recipe can be run by the processes that there are.

    Raises:
        UserError: it cannot.
    """
    count, problems = processes.world_size(), []
    if (batch := recipe.data.batch_size) < count:
        problems.append(recipe.line("data.batch_size", f"{batch} images cannot be shared by {count} processes"))
    if count > 1 and ":" in recipe.device:
        problems.append(recipe.line("device", f'one GPU for {count} processes; with "cuda" each takes its own'))
    if problems:
        raise UserError(*problems)
