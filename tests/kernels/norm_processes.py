"""Batch norms in one process, or in one of several sharing the images: run by test_batch_norm.py, by torchrun too."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kernel_cases import batch_norm, images
from lasnn.kernels import BatchNorm2d, norm_lif, update_running_statistics

TIMESTEPS = 3
# How many images of a step each process has: uneven, and one has none.
SHARES = (3, 0, 2)
KINDS = ("plain", "fused", "residual", "constant", "constant+residual", "state", "constant+residual+state")
CASES = [(kind, momentum, last) for kind in KINDS for momentum, last in ((0.1, False), (None, True))]


def results(kind: str, momentum: float | None, last: bool, rank: int | None = None, affine: bool = True) -> dict:
    """Outputs, gradients and running statistics after two passes, of all images or of a process's share in fp64."""
    torch.manual_seed(0)
    whole = sum(SHARES)
    first = 0 if rank is None else sum(SHARES[:rank])
    mine = slice(first, whole if rank is None else first + SHARES[rank])
    norm = batch_norm(4, affine=affine, momentum=momentum).double()
    found = {}
    if rank is not None:
        norm.__class__ = BatchNorm2d
        norm.group = dist.group.WORLD

    def share(tensor: torch.Tensor) -> torch.Tensor:
        """The process's images of every step."""
        part = tensor.unflatten(0, (-1, whole))[:, mine].flatten(0, 1)
        return part.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    for number in range(2):
        steps = 1 if kind.startswith("constant") else TIMESTEPS
        # Far from 0, as no sum of squares would take it.
        y = share(images(steps * whole, (4, 5, 3), torch.float64, last) * 2 + 100).requires_grad_()
        r = share(images(TIMESTEPS * whole, (4, 5, 3), torch.float64, last)).requires_grad_()
        v0 = share(images(whole, (4, 5, 3), torch.float64, last)).requires_grad_()
        grad_v = share(images(whole, (4, 5, 3), torch.float64, last))
        grad = share(images((steps if kind == "plain" else TIMESTEPS) * whole, (4, 5, 3), torch.float64, last))
        if kind == "plain":
            outputs = {"out": norm(y)}
        else:
            parts = kind.split("+")
            options = {"timesteps": TIMESTEPS, "constant": "constant" in parts, "return_state": "state" in parts}
            options["v0"] = v0 if "state" in parts else None
            out, *v_last, batch = norm_lif(y, norm, r if "residual" in parts else None, **options)
            update_running_statistics(norm, batch)
            outputs = {"out": out, **dict(zip(("v_last",), v_last, strict=False))}
        leaves = {"y": y, "residual": r, "v0": v0, "weight": norm.weight, "bias": norm.bias}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        upstream = (grad, grad_v)[: len(outputs)]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream, allow_unused=True)
        named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
        outputs = {name: output.detach() for name, output in outputs.items()}
        found[number] = {**outputs, **named, **{name: b.clone() for name, b in norm.named_buffers()}}
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
