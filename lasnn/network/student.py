"""The spiking network with its encoder."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lasnn.encoder import check_images
from lasnn.kernels.layout import state_dtype
from lasnn.network.staged import CURRENT, Staged
from lasnn.network.time_chunks import even_chunks, pool_running_statistics, recompute
from lasnn.network.units import NormSpike

# Time steps of a long evaluation that are computed at once.
TIME_CHUNK = 8


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
        # The network's training pass, compiled; nothing where it runs as it is. nn.Module does not look into a tuple.
        self._compiled: tuple[Callable, ...] = ()

    def compile_training(self) -> None:
        """Compile the network's pass in training mode, all of it in one graph; evaluation runs as ever.

        Spikes are those of the network as it is but for what a compiler's sums round otherwise.
        """
        self._compiled = (torch.compile(self.network.forward, fullgraph=True),)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within the block the network runs module by module, where hooks see it."""
        compiled, self._compiled = self._compiled, ()
        try:
            yield
        finally:
            self._compiled = compiled

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> logits [B, K], averaged over the T steps.

        Raises:
            ValueError: the images are not in [0, 1], as when they were normalised already, or have other channels than
                those of the training.
        """
        if not torch.compiler.is_compiling():
            mean = getattr(self.encoder, "mean", None)
            check_images(images, None if mean is None else len(mean))
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
        """Images [B, C, H, W] in [0, 1], not checked, -> logits of each step [T, B, K] and the tapped features.

        They may be a part of a batch, from number `first` of `total`: the encoder then draws as it does for the whole.
        In evaluation without gradients a long run is made in time chunks of `TIME_CHUNK` steps, so that its memory does
        not grow with T; the spikes are the same.
        """
        if self.timesteps > TIME_CHUNK and self._can_pause():
            pieces, voltages, features = [], {}, {}
            if generator is None and self.encoder.random:
                # Each piece is cut from the same draws.
                seed = int(torch.randint(2**63 - 1, ()))
                generator = torch.Generator(images.device).manual_seed(seed)
            for start in range(0, self.timesteps, TIME_CHUNK):
                stop = min(start + TIME_CHUNK, self.timesteps)
                place = {"first": first, "total": total, "start": start, "stop": stop}
                with self.network.time.carry_state(voltages, start) as voltages:
                    encoded = self.encoder.part(images, self.timesteps, generator, **place)
                    logits, tapped = self.network(encoded, stop - start, taps)
                pieces.append(logits)
                for name, value in tapped.items():
                    # A current is already the mean over the chunk.
                    features.setdefault(name, []).append(value.expand(stop - start, *value.shape[1:]))
            joined = {name: torch.cat(values) for name, values in features.items()}
            return torch.cat(pieces), {
                name: value.mean(0, keepdim=True) if name.endswith(CURRENT) else value for name, value in joined.items()
            }
        if total in (None, len(images)):
            encoded = self.encoder(images, self.timesteps, generator)
        else:
            encoded = self.encoder.part(images, self.timesteps, generator, first=first, total=total)
        network = self._compiled[0] if self._compiled and self.training else self.network
        return network(encoded, self.timesteps, taps)

    def _can_pause(self) -> bool:
        """Whether a run can go on from its voltages: nothing is learnt or traced, and every neuron takes them."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return self.neurons_carry_voltages()

    def neurons_carry_voltages(self) -> bool:
        """Whether every neuron can go on from a voltage."""
        units = [unit for unit in self.network.modules() if isinstance(unit, NormSpike)]
        return bool(units) and all("v0" in inspect.signature(unit.neuron.forward).parameters for unit in units)

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
            with self.network.time.carry_state(voltages, start) as after:
                logits, features = self.network(encoded, stop - start, taps)
            sums = {name: sum_over_steps(feature, stop - start) for name, feature in features.items()}
            found = None if of_steps is None else (stop - start) * of_steps(logits, features)
            return logits, sums, found, after, None if draws is None else draws.get_state()

        voltages: dict[str, Tensor] = {}
        state = None if generator is None else generator.get_state()
        parts, features, found = [], {}, None
        with pool_running_statistics(self.network, self.network.time):
            for start in range(0, self.timesteps, chunk):
                stop = min(start + chunk, self.timesteps)
                done = recompute(self.network, self.network.time, run, images, voltages, state, start, stop)
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
            images: [B, C, H, W] in [0, 1], which is not checked: what is seen at this step.
            voltages: what the step before returned; None starts from rest.
            generator: of the encoder's draws; one for all steps.

        Returns:
            Logits of this step [B, K], and the voltage [B, ...] of each layer by name.

        Raises:
            ValueError: the student is in training mode, or its encoder or its neurons cannot go step by step.
        """
        if self.training:
            raise ValueError("batch statistics belong to all steps at once; call .eval() before step()")
        if not self.encoder.causal:
            raise ValueError(
                f"the encoder {type(self.encoder).__name__} decides the spikes of all steps at once; step() needs a "
                "causal one, as direct or poisson"
            )
        try:
            with self.network.time.carry_state(voltages or {}) as after:
                logits, _ = self.network(self.encoder(images, 1, generator))
        except TypeError as error:
            # Asked only now: a stream has no time for it at each step.
            if self.neurons_carry_voltages():
                raise
            message = "its neurons take no v0, the voltage to go on from, so that step() cannot go step by step"
            raise ValueError(message) from error
        return logits[0], after


def sum_over_steps(feature: Tensor, steps: int) -> Tensor:
    """[t, B, ...] -> [B, ...] in single precision or better; one that is constant in time, or a mean over it, has t = 1
    for all of the steps.
    """
    feature = feature.to(state_dtype(feature.dtype))
    return steps * feature[0] if len(feature) == 1 else feature.sum(0)
