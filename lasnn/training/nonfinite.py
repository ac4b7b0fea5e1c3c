"""Where a training breaks: the first step whose numbers are not finite, and the first layer in it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lasnn import processes
from lasnn.errors import MachineError
from lasnn.network.student import Student
from lasnn.training.objective import Objective
from lasnn.training.parallel import BatchSlice
from lasnn.training.precision import Precision
from lasnn.training.progress import Progress

# Steps between two looks at what was found, where looking waits for the device.
CHECK_EVERY = 20
NEVER = torch.iinfo(torch.int64).max


class NonFiniteMonitor:
    """Records, without waiting for the device, the first step of an epoch at which each number was not finite.

    The numbers are the terms of the loss, their sum and the gradient.

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

    @classmethod
    def of(cls, objective: Objective, precision: Precision, every_step: bool = False) -> "NonFiniteMonitor":
        """The monitor of a training."""
        # Reading what was found waits for a GPU, as fp16's scaler does at each step anyway.
        rarely = precision.device.type == "cuda" and not precision.uses_scaler and not every_step
        every = CHECK_EVERY if rarely else 1
        return cls(objective.weights, precision.device, watches_gradient=not precision.uses_scaler, every=every)

    def begin_epoch(self) -> None:
        """Count steps from 0 again."""
        self.first.fill_(NEVER)

    def update(self, step: int, terms: Mapping[str, Tensor], model: nn.Module | None = None) -> None:
        """Look at a step's terms and, given the model, at its gradients, without waiting for them."""
        gradient = terms["loss"].new_zeros(())
        if self.watches_gradient and model is not None:
            gradient = max_abs([p.grad for p in model.parameters() if p.grad is not None])
        values = {**terms, "gradient": gradient}
        broken = ~torch.stack([values[name].detach().double() for name in self.names]).isfinite()
        self.first = torch.where(broken & (self.first == NEVER), step, self.first)

    def found_inf(self) -> Tensor | None:
        """1 once a number was not finite, else 0: from then on a fused optimiser skips its steps, and the weights stay
        what they were. None where a scaler decides.
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
        """Whether to read what was found after a step of so many in the epoch."""
        return step % self.every == 0 or step + 1 == steps


def max_abs(gradients: Iterable[Tensor]) -> Tensor:
    """The largest absolute value of all; NaN where there is one."""
    return nn.utils.get_total_norm(gradients, torch.inf)


def nonfinite_error(
    phase: str, epoch: int, step: int, names: list[str], layers: Mapping[str, str], hint: str
) -> MachineError:
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
        where = f"the first gradient that is not finite is that of the output of {layers['backward']}"
    elif what == "gradient":
        where = "it began in the gradient of a weight, or did not occur again when the batch was repeated"
    else:
        where = "every layer's values are finite, so that it began in the loss itself"
    return MachineError(
        f"the {phase}'s {what} is not a finite number in epoch {epoch + 1}, step {step + 1} ({which}); {where}; "
        f"lower the learning rate or set clip_norm; --detect-anomaly names the operation.{hint}"
    )


def check_weights(modules: Iterable[nn.Module], progress: Progress, hint: str) -> None:
    """Check that the weights of what is trained are finite.

    Raises:
        MachineError: they are not.
    """
    states = [item for module in modules for item in module.state_dict().items()]
    broken = [name for name, value in states if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise MachineError(
            f"the {progress.phase}'s weights are not finite numbers in epoch {progress.epoch + 1}, after step "
            f"{progress.step} ({broken[0]}, {len(broken)} in all); lower the learning rate or set clip_norm.{hint}"
        )


def find_layers(
    networks: Mapping[str, nn.Module],
    forward: Callable[[BatchSlice], dict[str, Tensor]],
    slices: Iterable[BatchSlice],
) -> dict[str, str]:
    """Run a batch again, to find the layers where its numbers stop being finite, in any process.

    Args:
        networks: those that run, by name.
        forward: the forward pass of a slice.
        slices: the batch's.

    Returns:
        What `first_nonfinite_layers` yields.
    """
    with ExitStack() as stack:
        for network in networks.values():
            if isinstance(network, Student):
                stack.enter_context(network.uncompiled())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        layers = stack.enter_context(first_nonfinite_layers(networks))
        for batch_slice in slices:
            terms = forward(batch_slice)
            broken = "forward" in layers or not terms["loss"].isfinite()
            # A backward pass exchanges gradients, so that all processes run it or none does.
            if processes.all_reduce_max(broken) == [0]:
                terms["loss"].backward()
    found = dict(layers)
    for elsewhere in processes.all_gather(dict(layers)):
        found = elsewhere | found
    return found


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
