"""Where a training breaks: the first step whose numbers are not finite, and the first layer in it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NEVER = torch.iinfo(torch.int64).max


class Watch:
    """The first step at which each of several numbers was not finite, kept on the device: reading it waits for it.

    Args:
        names: of the numbers.
        device: where they are.
    """

    def __init__(self, names: Iterable[str], device: torch.device):
        self.names = tuple(names)
        self.first = torch.full((len(self.names),), NEVER, device=device)

    def see(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Look at the numbers of a step, without waiting for them."""
        broken = ~torch.stack([values[name].detach().double() for name in self.names]).isfinite()
        self.first = torch.where(broken & (self.first == NEVER), step, self.first)

    def broken(self) -> Tensor:
        """1 once any of them was not finite, else 0: what an optimiser takes as `found_inf`."""
        return (self.first != NEVER).any().to(torch.float32)

    def found(self) -> tuple[int, list[str]] | None:
        """The first step at which any was not finite, and which; None where all were."""
        first = self.first.tolist()
        step = min(first)
        return (
            None if step == NEVER else (step, [name for name, at in zip(self.names, first, strict=True) if at == step])
        )


def largest(gradients: Iterable[Tensor]) -> Tensor:
    """The largest absolute value of all; NaN where there is one."""
    return nn.utils.get_total_norm(gradients, torch.inf)


@contextmanager
def layers_watched(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, str]]:
    """Within the block the first layer that computes a value which is not finite is found, forward and backward.

    Yields a dict that gets `forward` (the first layer, in the order of the calls) and `backward` (the layer whose
    output is the first to get a gradient that is not finite), each described in a few words.
    """
    found: dict[str, str] = {}

    def look(which: str, tensor: Tensor, name: str) -> None:
        if which not in found and not (finite := tensor.isfinite()).all():
            found[which] = f"{name}, {int((~finite).sum()):,} of {tensor.numel():,} values"

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, _: object, output: object) -> None:
            described = f"{name} ({type(module).__name__})"
            for tensor in output if isinstance(output, tuple) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                look("forward", tensor.detach(), described)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: look("backward", gradient, described))

        return hook

    hooks = [
        module.register_forward_hook(watch(f"{what} {name.removeprefix('network.')}"))
        for what, network in networks.items()
        for name, module in network.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
