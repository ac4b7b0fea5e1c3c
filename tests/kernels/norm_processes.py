"""Batch norms in one process, or in one of several that share the images: run by test_norm.py, by torchrun too."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kernel_cases import batch_norm, images
from lasnn.kernels import BatchNorm2d, norm_lif

TIMESTEPS = 3
# How many images of a step each process has: uneven, and one has none.
SHARES = (3, 0, 2)
KINDS = ("plain", "fused", "residual", "constant", "constant+residual")
CASES = [(kind, momentum, last) for kind in KINDS for momentum, last in ((0.1, False), (None, True))]


def results(kind: str, momentum: float | None, last: bool, rank: int | None = None, affine: bool = True) -> dict:
    """Outputs, gradients and running statistics after two passes, of all images or of a process's share in fp64."""
    torch.manual_seed(0)
    batch = sum(SHARES)
    first = 0 if rank is None else sum(SHARES[:rank])
    mine = slice(first, batch if rank is None else first + SHARES[rank])
    norm = batch_norm(4, affine=affine, momentum=momentum).double()
    found = {}
    if rank is not None:
        norm.__class__ = BatchNorm2d
        norm.group = dist.group.WORLD

    def share(tensor: torch.Tensor) -> torch.Tensor:
        """The process's images of every step."""
        part = tensor.unflatten(0, (-1, batch))[:, mine].flatten(0, 1)
        return part.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    for number in range(2):
        steps = 1 if kind.startswith("constant") else TIMESTEPS
        # Far from 0, as no sum of squares would take it.
        y = share(images(steps * batch, (4, 5, 3), torch.float64, last) * 2 + 100).requires_grad_()
        r = share(images(TIMESTEPS * batch, (4, 5, 3), torch.float64, last)).requires_grad_()
        grad = share(images((steps if kind == "plain" else TIMESTEPS) * batch, (4, 5, 3), torch.float64, last))
        if kind == "plain":
            out = norm(y)
        else:
            residual = r if kind.endswith("residual") else None
            constant = kind.startswith("constant")
            out, running = norm_lif(y, norm, residual, timesteps=TIMESTEPS, constant=constant)
            norm.running_mean.copy_(running[0])
            norm.running_var.copy_(running[1])
            norm.num_batches_tracked.add_(1)
        leaves = [leaf for leaf in (y, r, norm.weight, norm.bias) if leaf is not None]
        gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        names = ["y", "residual", *(["weight", "bias"] if affine else [])]
        named = {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True) if g is not None}
        found[number] = {"out": out.detach(), **named, **{name: b.clone() for name, b in norm.named_buffers()}}
    return found


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {case: results(*case, rank) for case in CASES}
    found["no affine"] = results("plain", 0.1, False, rank, affine=False)
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
