"""Networks as ordered, named stages, written once and built as an ANN teacher or as a spiking student.

Shapes: T time steps, B batch, C channels, H x W pixels, K classes. Inside a network time is folded into the leading
dimension, T-major, so that convolution, pooling and linear layers are plain `torch.nn`; only the neuron unfolds it.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lasnn.activation import QCFS
from lasnn.encoder import check_images
from lasnn.errors import UserError
from lasnn.kernels import BatchNorm2d, BatchStatistics, pool_statistics, update_running_statistics
from lasnn.kernels.layout import state_dtype
from lasnn.neuron import Neuron
from lasnn.registry import architectures, neurons

# Time steps of a long evaluation that are computed at once.
PIECE = 8


@dataclass
class Clock:
    """How many time steps and images the current forward pass folds together.

    One clock is shared by a network and its units. `Staged.forward` sets it and the units read it, which is what
    lets everything between them be plain `torch.nn` modules that know nothing of time.

    It holds neuron state only while a caller runs a sequence in pieces (see `carried`): `voltages` of the units, by
    name, which each unit takes up and replaces, and `start`, the number of steps before this piece.
    """

    steps: int = 1
    batch: int = 0
    start: int = 0
    voltages: dict[str, Tensor] | None = None

    @contextmanager
    def carried(self, voltages: Mapping[str, Tensor], start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Within the block the units go on from `voltages` (from rest where there is none) instead of from rest.

        Yields the dict that holds the voltages after the last step once the network has run; `voltages` is not changed.
        """
        self.voltages, self.start = dict(voltages), start
        try:
            yield self.voltages
        finally:
            self.voltages, self.start = None, 0

    def unfold(self, x: Tensor) -> Tensor:
        """[T*B, ...] -> [T, B, ...]; a tensor that is constant in time, [B, ...] -> [1, B, ...]."""
        steps = 1 if x.shape[0] == self.batch else self.steps
        return rearrange(x, "(t b) ... -> t b ...", t=steps)


class NormActivate(nn.Module):
    """Batch normalisation, an optional residual, an activation (ReLU unless given): the unit of an ANN.

    `channels=None` leaves the normalisation out. Input and output are [N, C, H, W] (or [N, F] without it).
    """

    def __init__(self, channels: int | None, activation: nn.Module | None = None):
        super().__init__()
        self.norm = nn.Identity() if channels is None else BatchNorm2d(channels)
        self.activation = activation or nn.ReLU()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        return self.activation(x if residual is None else x + residual)


class NormSpike(nn.Module):
    """Batch normalisation, an optional residual, a spiking neuron: the unit of an SNN, in one kernel.

    `channels=None` leaves the normalisation out. Input [T*B, C, H, W], or [B, C, H, W] where it is constant in time
    (it is then normalised once, with the statistics of the unrepeated tensor); output: spikes [T*B, C, H, W].

    A registered neuron with a `forward` of its own runs behind `lasnn.kernels.BatchNorm2d`, not in the kernel.
    """

    def __init__(self, channels: int | None, neuron: nn.Module, clock: Clock):
        super().__init__()
        self.norm = nn.Identity() if channels is None else BatchNorm2d(channels)
        self.neuron = neuron
        self.clock = clock
        self.fused = channels is not None and getattr(type(neuron), "forward", None) is Neuron.forward
        # In its network; the network sets it.
        self.name = ""
        # Where several passes are to update the running statistics together, the batches of those seen so far.
        self.batches: list[BatchStatistics] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        voltages = self.clock.voltages
        before = None if voltages is None else voltages.get(self.name)
        if self.fused:
            steps = self.clock.steps
            spikes, *after, batch = self.neuron.after_norm(
                x,
                self.norm,
                residual,
                v0=before,
                return_state=voltages is not None,
                timesteps=steps,
                constant=steps > 1 and x.shape[0] == self.clock.batch,
            )
            if self.batches is None:
                update_running_statistics(self.norm, batch)
            elif batch is not None:
                self.batches.append(batch)
        elif voltages is None:
            spikes, *after = self._in_turn(x, residual)
        elif self.training:
            # Only x, the residual and the voltage are kept for the backward pass, as by the kernel.
            spikes, *after = again_backward(self, self._in_turn, x, residual, v0=before)
        else:
            spikes, *after = self._in_turn(x, residual, v0=before)
        if voltages is not None:
            (voltages[self.name],) = after
        return spikes

    def _in_turn(self, x: Tensor, residual: Tensor | None, **before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalisation and neuron one after the other, with the voltage before and after if it is carried."""
        current = self.clock.unfold(self.norm(x))
        if residual is not None:
            current = current + self.clock.unfold(residual)
        spikes, after = self.neuron(current, timesteps=self.clock.steps, **before)
        return rearrange(spikes.to(x.dtype), "t b ... -> (t b) ..."), after


def again_backward(module: nn.Module, function: Callable, *inputs, **options):
    """`function(*inputs, **options)`, computed again in the backward pass instead of keeping what is in between.

    What layers draw of their own accord is drawn alike, and the batch norms of `module`, which the function runs,
    update their running statistics in the first pass alone.
    """

    def contexts():
        return nullcontext(), running_statistics_left(module)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts, **options)


@contextmanager
def running_statistics_left(module: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Within the block the batch norms that train update copies of their running statistics, which are then dropped.

    Yields these batch norms.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    names = ("running_mean", "running_var", "num_batches_tracked")
    kept = [[getattr(norm, name) for name in names] for norm in norms]
    for norm, values in zip(norms, kept, strict=True):
        for name, value in zip(names, values, strict=True):
            setattr(norm, name, value.clone())
    try:
        yield norms
    finally:
        for norm, values in zip(norms, kept, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(norm, name, value)


@contextmanager
def running_statistics_pooled(module: nn.Module) -> Iterator[None]:
    """The running statistics are updated once, at the end, by those of all passes in the block together.

    As if all their elements had been normalised at once: the variance within the passes and that between them.
    """
    units = [m for m in module.modules() if isinstance(m, NormSpike) and m.fused]
    passes: dict[_BatchNorm, list[BatchStatistics]] = {unit.norm: [] for unit in units}

    def collect(norm: _BatchNorm, inputs: tuple[Tensor, ...], _: object) -> None:
        count = inputs[0].numel() // inputs[0].shape[1] if getattr(norm, "group", None) is None else int(norm.count)
        mean, var = (value.to(torch.float64, copy=True) for value in (norm.running_mean, norm.running_var))
        passes.setdefault(norm, []).append(BatchStatistics(mean, var * ((count - 1) / count), count))

    with running_statistics_left(module) as norms:
        alone = [norm for norm in norms if norm not in passes]
        momenta = [norm.momentum for norm in alone]
        hooks = [norm.register_forward_hook(collect) for norm in alone]
        for norm in alone:
            # With a momentum of 1 a pass's running statistics are its own.
            norm.momentum = 1.0
        for unit in units:
            unit.batches = passes[unit.norm]
        try:
            yield
        finally:
            for unit in units:
                unit.batches = None
            for norm, momentum, hook in zip(alone, momenta, hooks, strict=True):
                norm.momentum = momentum
                hook.remove()
    for norm, batches in passes.items():
        if batches:
            update_running_statistics(norm, pool_statistics(batches))


# Makes the units of one network; an architecture calls it as `act(channels)`, or `act()` for no normalisation.
Act = Callable[..., nn.Module]


def ann_units(activation: str = "relu", **options) -> Act:
    """The factory that makes a network an ANN on "relu", or on "qcfs" with its `options` (see `QCFS`)."""
    make = {"relu": nn.ReLU, "qcfs": QCFS}[activation]
    return lambda channels=None: NormActivate(channels, make(**options))


def snn_units(neuron: str = "lif", **options) -> Act:
    """The factory that makes a network an SNN of the registered `neuron` with its `options`."""
    clock = Clock()
    return lambda channels=None: NormSpike(channels, neurons.build(neuron, **options), clock)


class Staged(nn.Module):
    """Ordered, named stages and a head.

    Args:
        stages: name -> module, in order, named `stage1`, `stage2`, ...; each output can be tapped.
        head: module from the last stage's output to logits [N, K].
        stem: what comes before the first stage; it cannot be tapped.

    The state dict's keys are `stem.*`, `<stage>.*` and `head.*`: the same for a teacher and its student.
    """

    def __init__(self, stages: Mapping[str, nn.Module], head: nn.Module, stem: nn.Module | None = None):
        super().__init__()
        self.stem = nn.Identity() if stem is None else stem
        self.stage_names = tuple(stages)
        for name, stage in stages.items():
            if name in ("stem", "head"):
                raise ValueError(f"a stage cannot be named {name!r}; name the stages stage1, stage2, ...")
            self.add_module(name, stage)
        self.head = head
        units = {name: module for name, module in self.named_modules() if isinstance(module, NormSpike)}
        for name, unit in units.items():
            unit.name = name
        clocks = {id(unit.clock): unit.clock for unit in units.values()}
        if len(clocks) > 1:
            raise ValueError("the units of one network must come from one `act` factory")
        self.clock = next(iter(clocks.values()), Clock())

    def forward(self, x: Tensor, timesteps: int = 1, taps: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the network from rest.

        Args:
            x: [T, B, C, H, W], or [1, B, C, H, W] where the input is constant in time.
            timesteps: T.
            taps: names of stages whose outputs are wanted.

        Returns:
            Logits of each step [T, B, K] and {stage: feature [T, B, C, H, W]}; T is 1 for an ANN.

        Raises:
            ValueError: the leading dimension of `x` is neither 1 nor T.
        """
        if x.shape[0] not in (1, timesteps):
            raise ValueError(f"the input has {x.shape[0]} time steps; expected {timesteps}, or 1 if constant in time")
        self.clock.steps, self.clock.batch = timesteps, x.shape[1]
        x = self.stem(rearrange(x, "t b c h w -> (t b) c h w"))
        features = {}
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in taps:
                features[name] = self.clock.unfold(x)
        return self.clock.unfold(self.head(x)), features


class Borrowed(Staged):
    """A network from elsewhere, seen as stages: it can only teach, and its state dict keeps its own keys.

    Args:
        network: any module; its parts are used in `stem`, `stages` and `head`, it is not called itself.
        stages, head, stem: as for `Staged`, made of parts of `network` and of modules without parameters.
        mean, std: what its images were normalised with, per channel, in [0, 1] units; None is the data set's.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Mapping[str, nn.Module],
        head: nn.Module,
        stem: nn.Module | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        nn.Module.__init__(self)
        # The parts are registered where `network` has them, which keeps the keys; the stages are only views of them.
        self._modules.update(network._modules)
        self._parameters.update(network._parameters)
        self._buffers.update(network._buffers)
        for name, view in {"stem": stem or nn.Identity(), **stages, "head": head}.items():
            object.__setattr__(self, name, view)
        self.stage_names = tuple(stages)
        self.clock = Clock()
        self.normalisation = None if mean is None or std is None else (tuple(mean), tuple(std))


def without_activations(teacher: Staged) -> dict[str, Tensor]:
    """A teacher's state dict without what its activations have learnt: what it shares with its student."""
    units = tuple(f"{name}.activation." for name, unit in teacher.named_modules() if isinstance(unit, NormActivate))
    return {name: value for name, value in teacher.state_dict().items() if not name.startswith(units)}


def build(architecture: str, act: Act, *, in_channels: int, num_classes: int, **options) -> Staged:
    """Build a registered architecture with the units that `act` makes.

    Raises:
        UserError: the architecture is not known or did not return a `Staged` network.
    """
    network = architectures.build(architecture, act, in_channels=in_channels, num_classes=num_classes, **options)
    if not isinstance(network, Staged):
        where = architectures[architecture].where
        raise UserError(f"architecture {architecture!r} ({where}) returned {type(network).__name__}, not lasnn.Staged")
    return network


def probe(network: Staged, image: tuple[int, int, int], timesteps: int = 1) -> dict[str, tuple[int, ...]]:
    """The shape of each stage's feature, (C, H, W), found by a forward pass of one image on the meta device.

    Args:
        network: on the meta device.
        image: C, H, W of the input.

    Raises:
        UserError: the network cannot take images of this size; the stage at which it fails is named.
    """
    channels, height, width = image
    mode = network.training
    network.eval()
    network.clock.steps, network.clock.batch = timesteps, 1
    x = torch.empty(1, channels, height, width, device="meta")
    shapes = {}
    for name in ("stem", *network.stage_names, "head"):
        try:
            x = getattr(network, name)(x)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"the network cannot run on {height} x {width} images ({name}: {reason})") from error
        if name in network.stage_names:
            shapes[name] = tuple(x.shape[1:])
    network.train(mode)
    return shapes


def even_chunks(timesteps: int, most: int) -> tuple[int, int]:
    """T in chunks of at most `most` steps, as even as can be: how many, and how long (the last may be shorter)."""
    count = -(-timesteps // most)
    return count, -(-timesteps // count)


class Student(nn.Module):
    """A spiking network with its encoder: images in, logits out.

    Args:
        network: the spiking network.
        encoder: from images to [T or 1, B, C, H, W].
        timesteps: T; set the attribute to run with another.
    """

    def __init__(self, network: Staged, encoder: nn.Module, timesteps: int):
        super().__init__()
        self.network = network
        self.encoder = encoder
        self.timesteps = timesteps

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> logits [B, K], averaged over the T steps.

        Raises:
            ValueError: the images are not in [0, 1], as when they were normalised already.
        """
        if not torch.compiler.is_compiling():
            check_images(images)
        return self.steps(images)[0].mean(0)

    def steps(
        self,
        images: Tensor,
        taps: Iterable[str] = (),
        generator: torch.Generator | None = None,
        *,
        first: int = 0,
        total: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, C, H, W] in [0, 1] -> logits of each step [T, B, K] and the tapped features.

        They may be a part of a batch, from number `first` of `total`: the encoder then draws as it does for the whole.
        In evaluation without gradients a long run is made in pieces of `PIECE` steps, so that its memory does not grow
        with T; the spikes are the same.
        """
        if self.timesteps > PIECE and self._can_pause():
            pieces, voltages = [], {}
            for start in range(0, self.timesteps, PIECE):
                stop = min(start + PIECE, self.timesteps)
                place = {"first": first, "total": total, "start": start, "stop": stop}
                with self.network.clock.carried(voltages, start) as voltages:
                    encoded = self.encoder.part(images, self.timesteps, generator, **place)
                    pieces.append(self.network(encoded, stop - start, taps))
            logits, features = zip(*pieces, strict=True)
            return torch.cat(logits), {name: torch.cat([piece[name] for piece in features]) for name in features[0]}
        if total in (None, len(images)):
            encoded = self.encoder(images, self.timesteps, generator)
        else:
            encoded = self.encoder.part(images, self.timesteps, generator, first=first, total=total)
        return self.network(encoded, self.timesteps, taps)

    def _can_pause(self) -> bool:
        """Whether a run can go on from its voltages: nothing is learnt or traced, and every neuron takes them."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        units = [unit for unit in self.network.modules() if isinstance(unit, NormSpike)]
        return all("v0" in inspect.signature(unit.neuron.forward).parameters for unit in units)

    def in_chunks(
        self,
        images: Tensor,
        chunk: int,
        taps: Iterable[str] = (),
        generator: torch.Generator | None = None,
        *,
        first: int = 0,
        total: int | None = None,
        of_steps: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """A training pass over T steps in the memory of a few: chunks of time that are computed again backward.

        The voltages are carried from chunk to chunk, and gradients flow back through them. Batch norm takes the
        statistics of each chunk; the running statistics are updated once, by those of all T steps. What is encoded is
        what `steps` encodes, and both passes draw the same.

        Args:
            images, taps, generator, first, total: as for `steps`. An encoder that draws needs a generator.
            chunk: the most steps that are computed at once; T is cut evenly.
            of_steps: from logits [t, B, K] and features {stage: [t, B, C, H, W]} of some steps to the mean over them of
                anything, a tensor.

        Returns:
            Logits of each step [T, B, K]; the mean over time of each tapped feature, in fp32, {stage: [1, B, C, H, W]};
            the mean over time of `of_steps`.
        """
        _, chunk = even_chunks(self.timesteps, chunk)

        def run(images: Tensor, voltages: dict[str, Tensor], state: Tensor | None, start: int, stop: int):
            draws = None if state is None else torch.Generator(generator.device).set_state(state)
            place = {"first": first, "total": total, "start": start, "stop": stop}
            encoded = self.encoder.part(images, self.timesteps, draws, **place)
            with self.network.clock.carried(voltages, start) as after:
                logits, features = self.network(encoded, stop - start, taps)
            sums = {name: feature.to(state_dtype(feature.dtype)).sum(0) for name, feature in features.items()}
            found = None if of_steps is None else (stop - start) * of_steps(logits, features)
            return logits, sums, found, after, None if draws is None else draws.get_state()

        voltages: dict[str, Tensor] = {}
        state = None if generator is None else generator.get_state()
        parts, features, found = [], {}, None
        with running_statistics_pooled(self.network):
            for start in range(0, self.timesteps, chunk):
                stop = min(start + chunk, self.timesteps)
                done = again_backward(self.network, run, images, voltages, state, start, stop)
                logits, sums, of_chunk, voltages, state = done
                parts.append(logits)
                features = {name: features[name] + value if features else value for name, value in sums.items()}
                found = of_chunk if found is None else found + of_chunk
        means = {name: value[None] / self.timesteps for name, value in features.items()}
        return torch.cat(parts), means, None if found is None else found / self.timesteps

    @torch.no_grad()
    def step(
        self, images: Tensor, voltages: Mapping[str, Tensor] | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One time step, for streams: the state comes in and goes out, the student keeps none.

        The mean of the logits of T such steps is what a run of T steps returns, from the same spikes.

        Args:
            images: [B, C, H, W] in [0, 1], what is seen at this step.
            voltages: what the step before returned; None starts from rest.
            generator: of the encoder's draws; one for all steps.

        Returns:
            Logits of this step [B, K], and the voltage [B, ...] of each layer by name.

        Raises:
            ValueError: the student is in training mode, or its encoder cannot go step by step.
        """
        if self.training:
            raise ValueError("batch statistics belong to all steps at once; call .eval() before step()")
        if not self.encoder.causal:
            raise ValueError(
                f"the encoder {type(self.encoder).__name__} decides the spikes of all steps at once; step() needs a "
                "causal one, as direct or poisson"
            )
        with self.network.clock.carried(voltages or {}) as after:
            logits, _ = self.network(self.encoder(images, 1, generator))
        return logits[0], after


class Teacher(nn.Module):
    """An ANN with its normalisation: images in, logits out.

    Args:
        network: the ANN.
        mean, std: of the data set, per channel, in [0, 1] units.
    """

    def __init__(self, network: Staged, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> logits [B, K]."""
        return self.taps(images)[0]

    def taps(self, images: Tensor, taps: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, C, H, W] in [0, 1] -> logits [B, K] and the tapped features [B, C, H, W]."""
        logits, features = self.network(((images - self.mean) / self.std)[None], taps=taps)
        return logits[0], {name: feature[0] for name, feature in features.items()}
