"""A converted start: the weights of an ANN, scaled so that neurons of the student's kind follow it best over T steps.

For a constant current x a neuron emits r(x) spikes a step, a staircase that its kind, its threshold and T make. Of each
unit the scale k of its current and the amplitude a of its spikes are chosen so that a·r(x/k) is nearest to what the
ANN's unit gives of x, in the mean square over its currents. For an integrate-and-fire neuron this is the threshold
balancing of conversions (Rueckauer et al., Frontiers in Neuroscience 2017; Li et al., ICML 2021 choose it by the mean
square error too); the staircase makes it right for leaky neurons, for hard resets and for the threshold of the recipe.
Where a shortcut makes units share a scale, the sum of their relative errors is what is smallest (`lasnn.network.scales`
finds which do).

Shapes: T time steps, B batch, C channels, H x W pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lasnn.data import Batches, Images, Streamed
from lasnn.errors import not_finite
from lasnn.network.scales import NORMS, Scales, fold
from lasnn.network.staged import Staged
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import NormActivate, NormSpike
from lasnn.random import generator, keyed

# Training images that currents are measured on, and currents kept of each batch and unit.
IMAGES, BATCH, KEPT = 512, 128, 4096
# Images of noise that stand for them without data.
NOISE = 64
# Currents in thresholds that the staircase is tabulated for, and how finely; beyond it is flat.
REACH, FINE = 16.0, 256
# Scales that are tried of a group, as shares of the last one, from coarse to fine; and how often.
SHARES = (torch.logspace(-1.5, 1.5, 61), torch.logspace(-0.1, 0.1, 41), torch.logspace(-0.01, 0.01, 21))
SWEEPS = 4


@dataclass
class Response:
    """What a unit does in both networks.

    Args:
        current: of the ANN's unit, [N].
        output: of its activation, [N].
        table: spikes a step of the student's neuron at each current, [REACH * FINE].
        threshold: of the neuron.
    """

    current: Tensor
    output: Tensor
    table: Tensor
    threshold: float

    def error(self, k: float, amplitude: float) -> float:
        """The mean square of the difference, relative to that of the output."""
        index = (self.current * (FINE / (k * self.threshold))).long().clamp_(0, len(self.table) - 1)
        square = (amplitude * self.table[index] - self.output).square().mean()
        return float(square / self.output.square().mean().clamp(min=1e-12))


@torch.no_grad()
def balance(
    student: Student,
    ann: Teacher,
    image: tuple[int, int, int],
    images: Images | Streamed | None,
    seed: int,
    time_chunk: int = 0,
) -> None:
    """Scale the weights that a student has of an ANN for its neurons and its T, in place.

    Args:
        student: with the ANN's weights, on its device.
        ann: in eval mode.
        image: C, H, W.
        images: training images, whose currents are measured; None takes those that batch norm announces, N(beta,
            gamma^2) in each channel, and no data.
        seed: of the choice of the images, or of the draws.
        time_chunk: time steps of the student to compute at once; 0 is all of them.

    Raises:
        UserError: the network has no scales to be chosen (see `Scales`).
        MachineError: the ANN's activations are not finite numbers.
    """
    found = Scales(ann.network, image)
    inputs = noise(ann, image, seed) if images is None else measured(ann, images, seed)
    responses = {
        name: Response(current, output, *staircase_of(student.network.get_submodule(name), student.timesteps))
        for name, (current, output) in inputs.items()
    }
    fold(student.network, found, best_scales(found, responses))
    if images is not None:
        measure_statistics(student, images, seed, time_chunk)


def measure_statistics(student: Student, images: Images | Streamed, seed: int, time_chunk: int = 0) -> None:
    """Make the batch norms' running statistics those of the student's own spikes on some training images: the ANN's
    are off by what the units before round away.
    """
    norms = [module for module in student.modules() if isinstance(module, NORMS)]
    momenta = [norm.momentum for norm in norms]
    mode = student.training
    student.train()
    for number, batch in enumerate(calibration_batches(images, seed), start=1):
        for norm in norms:
            # The mean over the batches so far.
            norm.momentum = 1 / number
        # The global generators, for layers that draw by themselves.
        draws = generator(seed, "balance", number, device=batch.device)
        with keyed(seed, "balance", number):
            if time_chunk:
                student.in_chunks(batch, time_chunk, generator=draws)
            else:
                student.steps(batch, generator=draws)
    student.train(mode)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def staircase_of(unit: NormSpike, timesteps: int) -> tuple[Tensor, float]:
    """The staircase of a unit's neuron; one of a user's own may differ from channel to channel."""
    return staircase(unit.neuron, timesteps, 1 if unit.fused else getattr(unit.norm, "num_features", 1))


def staircase(neuron: nn.Module, timesteps: int, channels: int = 1) -> tuple[Tensor, float]:
    """A neuron's spikes a step, over T steps from rest, at constant currents from 0 to `REACH` thresholds, the mean of
    so many channels; and its threshold, 1 where it does not say one.
    """
    threshold = float(getattr(neuron, "options", {}).get("threshold", 1.0))
    device = next((held.device for held in (*neuron.parameters(), *neuron.buffers())), torch.device("cpu"))
    current = torch.arange(int(REACH * FINE), device=device) / FINE * threshold
    # A pixel for each current, [T, 1, C, pixels, 1], as the neuron has it in a network.
    image = current.view(1, 1, 1, -1, 1).expand(timesteps, 1, channels, -1, 1).contiguous()
    spikes, _ = neuron(image, timesteps=timesteps)
    return spikes.float().mean((0, 1, 2, 4)).cpu(), threshold


def best_scales(found: Scales, responses: Mapping[str, Response]) -> dict[int, float]:
    """The scale of every group that units read or write: one group after the other gets the best for its units, until
    all have had their turn `SWEEPS` times.
    """
    units = {name: found.units[name] for name in responses}
    scales = {}
    for name, (before, after) in units.items():
        # A first guess: half of the positive currents' root mean square to fire at, all of it for a spike.
        size = float(responses[name].output.square().mean().sqrt()) or 1.0
        scales.setdefault(before, size / responses[name].threshold)
        scales.setdefault(after, 2 * size)
    scales |= {group: 1.0 for group in found.fixed if group in scales}
    readers = {group: [name for name, pair in units.items() if group in pair] for group in scales}

    def error(group: int, scale: float) -> float:
        now = scales | {group: scale}
        return sum(responses[name].error(now[units[name][0]], now[units[name][1]]) for name in readers[group])

    for _ in range(SWEEPS):
        for group in scales:
            if group in found.fixed:
                continue
            for shares in SHARES:
                tried = [scales[group] * share for share in shares.tolist()]
                scales[group] = min(tried, key=lambda scale, group=group: error(group, scale))
    return scales


def measured(ann: Teacher, images: Images | Streamed, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Currents and outputs of each unit on some training images, without augmentation, [N] each."""

    def run() -> None:
        for batch in calibration_batches(images, seed):
            ann(batch)

    return recorded(ann, run)


def calibration_batches(images: Images | Streamed, seed: int) -> Iterator[Tensor]:
    """At least `IMAGES` training images, or all of a smaller set, in batches [B, C, H, W]; the same ones every time."""
    seen = 0
    with closing(iter(Batches(images, min(BATCH, len(images)), seed=seed, epoch=0))) as batches:
        for batch, _ in batches:
            # Batch norm has nothing to average over in a last batch of one image.
            if len(batch) > 1 or not seen:
                yield batch
            seen += len(batch)
            if seen >= IMAGES:
                return


def noise(ann: Teacher, image: tuple[int, int, int], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The same where every batch norm gives N(beta, gamma^2) in each channel, whatever it is given."""
    with noise_of_norms(ann, seed) as images:
        return recorded(ann, lambda: ann(images(image)))


@contextmanager
def noise_of_norms(ann: Teacher, seed: int) -> Iterator[Callable[[tuple[int, int, int]], Tensor]]:
    """Within the block every batch norm gives N(beta, gamma^2) in each channel, whatever it is given.

    Yields:
        From C, H, W to the images to call the ANN with.
    """
    draws = generator(seed, "noise")

    def drawn(norm: nn.Module, _: object, output: Tensor) -> Tensor:
        x = torch.randn(output.shape, generator=draws).to(output.device)
        if norm.weight is None:
            return x
        shape = (-1, *(1 for _ in output.shape[2:]))
        return x * norm.weight.view(shape) + norm.bias.view(shape)

    hooks = [module.register_forward_hook(drawn) for module in ann.modules() if isinstance(module, NORMS)]
    try:
        device = next(ann.parameters()).device
        yield lambda image: torch.zeros(NOISE, *image, device=device)
    finally:
        for hook in hooks:
            hook.remove()


def recorded(ann: Teacher, run: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """Currents and outputs of each unit during some forward passes."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with recording(ann.network, lambda name, output, current: seen.setdefault(name, []).append((current, output))):
        run()
    found = {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in seen.items()}
    for name, (current, _) in found.items():
        if not current.isfinite().all():
            raise not_finite(f"the ANN's activations in {name}")
    return found


@contextmanager
def recording(network: Staged, tell: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Tell of every call of a unit within the block: its name, and some of its outputs and currents, [N]."""
    units = {name: unit for name, unit in network.named_modules() if isinstance(unit, NormActivate)}

    def on_call(name: str) -> Callable[[Tensor, Callable[[], Tensor]], None]:
        def record(output: Tensor, current: Callable[[], Tensor]) -> None:
            # A step that is prime to the sizes of maps takes some of every channel and place.
            step = max(1, output.numel() // KEPT) | 1
            tell(name, *(x.reshape(-1)[::step].float().cpu() for x in (output, current())))

        return record

    for name, unit in units.items():
        unit.on_call = on_call(name)
    try:
        yield
    finally:
        for unit in units.values():
            del unit.on_call
