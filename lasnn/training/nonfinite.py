"""Where a training breaks: the first step whose numbers are not finite, and the first layer in it."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lasnn.errors import MachineError

NEVER = torch.iinfo(torch.int64).max


class NonFiniteMonitor:
    """The first step of an epoch at which each number was not finite, kept on the device: reading it waits for it.

    Args:
        terms: names of the loss terms.
        device: where they are.
        watches_gradient: whether the gradient counts; under a scaler it does not.
        every: steps between looks at what was found.
    """

    def __init__(self, terms: Iterable[str], device: torch.device, *, watches_gradient: bool = True, every: int = 1):
        self.names = (*terms, "loss", *(["gradient"] if watches_gradient else []))
        self.watches_gradient = watches_gradient
        self.every = every
        self.first = torch.full((len(self.names),), NEVER, device=device)

    def begin_epoch(self) -> None:
        """Count steps from 0 again."""
        self.first.fill_(NEVER)

    def update(self, step: int, values: Mapping[str, Tensor], model: nn.Module | None = None) -> None:
        """Look at a step's terms, and at the gradients of the model, without waiting for them."""
        if self.watches_gradient and model is not None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            values = {**values, "gradient": max_abs(gradients)}
        broken = ~torch.stack([values[name].detach().double() for name in self.names]).isfinite()
        self.first = torch.where(broken & (self.first == NEVER), step, self.first)

    def found_inf(self) -> Tensor | None:
        """1 once anything was not finite, else 0: from then on a fused optimiser leaves its steps out, and the weights
        stay what they were. None where a scaler decides.
        """
        return (self.first != NEVER).any().to(torch.float32) if self.watches_gradient else None

    def first_failure(self) -> tuple[int, list[str]] | None:
        """The first step at which a number was not finite, and which; None where all were. Waits for the device."""
        first = self.first.tolist()
        step = min(first)
        if step == NEVER:
            return None
        return step, [name for name, at in zip(self.names, first, strict=True) if at == step]

    def due(self, step: int, steps: int) -> bool:
        """Whether it is time to look at what was found."""
        return step % self.every == 0 or step + 1 == steps


def max_abs(gradients: Iterable[Tensor]) -> Tensor:
    """The largest absolute value of all; NaN where there is one."""
    return nn.utils.get_total_norm(gradients, torch.inf)


def failure(phase: str, epoch: int, step: int, names: list[str], layers: Mapping[str, str], hint: str) -> MachineError:
    """The error that stops a run: which numbers of a step were not finite, and where that began.

    Args:
        names: of the numbers, as `first_failure` returns them.
        layers: what `first_nonfinite_layers` found when the batch was repeated.
        hint: where the last good state is.
    """
    terms = [name for name in names if name not in ("loss", "gradient")]
    what = "gradient" if names == ["gradient"] else "loss"
    which = ", ".join(terms) or ("the weighted sum" if what == "loss" else "after a finite loss")
    if "forward" in layers:
        where = f"it began in the layer {layers['forward']}"
    elif what == "gradient" and "backward" in layers:
        where = f"it began in the gradient of what the layer {layers['backward']} gives on"
    elif what == "gradient":
        where = "it began in the gradient of a weight, or did not occur again when the batch was repeated"
    else:
        where = "every layer's values are finite, so that it began in the loss itself"
    return MachineError(
        f"the {phase}'s {what} is not a finite number in epoch {epoch + 1}, step {step + 1} ({which}); {where}; "
        f"lower the learning rate or set clip_norm; --detect-anomaly finds more.{hint}"
    )


def check_weights(model: nn.Module, phase: str, epoch: int, step: int, hint: str) -> None:
    """Check that a model's weights are finite: no saved state, and no accuracy, shall come of others.

    Raises:
        MachineError: they are not.
    """
    states = model.state_dict().items()
    broken = [name for name, value in states if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise MachineError(
            f"the {phase}'s weights are not finite numbers in epoch {epoch + 1}, after step {step} ({broken[0]}, "
            f"{len(broken)} in all); lower the learning rate or set clip_norm.{hint}"
        )


@contextmanager
def first_nonfinite_layers(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, str]]:
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
