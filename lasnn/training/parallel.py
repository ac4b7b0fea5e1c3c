"""How a batch is computed: by how many processes, and in how many slices one after the other (gradient accumulation).

In one process, and without `data.accumulate`, a batch is one slice and everything else here does nothing.
"""

import warnings
from collections.abc import Iterator
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
from lasnn.loss import does_couple_images
from lasnn.plan import micro_batches
from lasnn.recipe.schema import Recipe


@dataclass(frozen=True)
class Batch:
    """This process's images of one training step; `total` counts those of all processes. Epoch and step are from 0."""

    epoch: int
    step: int
    images: Tensor
    targets: Tensor
    total: int


@dataclass(frozen=True)
class BatchSlice:
    """Images of a batch that are computed at once: from number `first` on.

    `share` scales the slice's mean loss, so that the slices' gradients, averaged over the processes, add up to those of
    the batch's mean loss: in one process it is the slice's share of the images. `last` says that no slice follows.
    """

    batch: Batch
    images: Tensor
    targets: Tensor
    first: int
    share: float
    last: bool

    @property
    def inputs(self) -> tuple[Tensor, Tensor, int, int]:
        """Images, targets, epoch and step: what an objective is called with."""
        return self.images, self.targets, self.batch.epoch, self.batch.step

    @property
    def position(self) -> dict[str, int]:
        """Where in the batch the slice lies."""
        return {"first": self.first, "total": self.batch.total}


class ForwardPass(nn.Module):
    """An objective, called as the forward pass of the model that it runs: what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, objective: nn.Module):
        super().__init__()
        self.model = model
        self.objective = objective
        # Never used: without any such parameter DistributedDataParallel warns against find_unused_parameters.
        self.unused = nn.Parameter(torch.zeros((), device=next(model.parameters()).device))

    def forward(self, *arguments, **options) -> dict[str, Tensor]:
        return self.objective(*arguments, **options)


class Parallel:
    """Splits a recipe's batches over the processes, and each process's images into slices."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def distribute(self, model: nn.Module, objective: nn.Module) -> nn.Module:
        """The objective, which runs the model; with several processes, inside of DistributedDataParallel.

        In the backward pass gradients are then averaged over the processes, and batch norms in training have the
        statistics of all processes' images.

        Raises:
            UserError: model or losses have batch norms whose statistics would stay each process's own.
        """
        if processes.world_size() == 1:
            return objective
        share_batch_norms(model)
        share_batch_norms(objective)
        with warnings.catch_warnings():
            # The buffers agree anyway; torch 2.14 deprecates `broadcast_buffers`.
            warnings.simplefilter("ignore", FutureWarning)
            # Blocks that a forward pass skips leave parameters unused. With this the buckets are not rebuilt, either,
            # so that a resumed run adds up in the same order.
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
        """The slices that are computed one after the other."""
        indices = self._indices(batch.total)
        sizes = [len(numbers) for numbers in indices]
        parts = zip(indices, batch.images.split(sizes), batch.targets.split(sizes), strict=True)
        for position, (numbers, images, targets) in enumerate(parts, start=1):
            yield BatchSlice(
                batch,
                images,
                targets,
                first=int(numbers[0]) if len(numbers) else 0,
                share=processes.world_size() * len(numbers) / batch.total,
                last=position == len(indices),
            )

    def gradient_exchange(self, objective: nn.Module, batch_slice: BatchSlice) -> AbstractContextManager:
        """Around a forward pass: processes exchange gradients once a batch, in its last slice."""
        if batch_slice.last or not isinstance(objective, DistributedDataParallel):
            return nullcontext()
        return objective.no_sync()

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
    # A loss that compares images is given all of them.
    given_all = {part for module in model.modules() if does_couple_images(module) for part in module.modules()}
    norms = {
        name: norm for name, norm in model.named_modules() if isinstance(norm, _BatchNorm) and norm not in given_all
    }
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


def check_processes(recipe: Recipe) -> None:
    """Check that a recipe can be run by the processes that there are.

    Raises:
        UserError: it cannot.
    """
    count, problems = processes.world_size(), []
    if (batch := recipe.data.batch_size) < count:
        problems.append(
            recipe.line(
                "data.batch_size", f"{batch} images cannot be shared by {count} processes; raise it, or start fewer"
            )
        )
    if count > 1 and ":" in recipe.device:
        problems.append(
            recipe.line("device", f'names one GPU for {count} processes; set device = "cuda", and each takes its own')
        )
    if count > 1 and recipe.compile:
        problems.append(recipe.line("compile", f"is for one process, and there are {count}; set compile = false"))
    if problems:
        raise UserError(*problems)
