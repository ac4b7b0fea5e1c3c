"""Encoders: from images to what the student's first layer sees at each time step.

Shapes: T time steps, B batch, C channels, H x W pixels. Images are floats [B, C, H, W] in [0, 1].
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from lasnn.registry import encoders

__all__ = ["Direct", "Encoder", "Poisson", "Rate", "check_images"]


class Encoder(nn.Module, ABC):
    """Turns images [B, C, H, W] in [0, 1] into what the student sees at each of T time steps.

    A call is `encoder(images, timesteps, generator=None)`; it returns [T, B, C, H, W], or [1, B, C, H, W]
    where all steps are the same, in the images' dtype and on their device. A subclass writes `encode` and
    sets what it promises:

    - `constant`: all steps are the same, and the output's leading dimension is 1;
    - `causal`: the first t steps of a longer run are those of a run of t steps (with equal generators), so
      that one pass of T steps gives the result after every step up to T;
    - `spiking`: the output holds only 0 and 1;
    - `random`: the output is drawn, so that two runs of the same images differ.

    The range of the images is the caller's promise, which the loader keeps: a check here would stall a GPU
    and could not be exported. `check_images` is that check, for images from outside. Beyond the range, a
    spiking encoder acts as if the values were clipped to it.

    Args:
        mean, std: of each channel of the training data; kept as buffers [C, 1, 1] outside the state_dict.

    Raises:
        ValueError: `timesteps` is below 1.
        TypeError: the images are not floats.
    """

    constant = False
    causal = False
    spiking = False
    random = False

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, images: Tensor, timesteps: int, generator: Generator | None = None) -> Tensor:
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, not {timesteps}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in [0, 1], not {images.dtype}; divide bytes by 255")
        return self.encode(images, timesteps, generator)

    @abstractmethod
    def encode(self, images: Tensor, timesteps: int, generator: Generator | None) -> Tensor:
        """Images -> [T, B, C, H, W], or [1, B, C, H, W] where `constant`."""

    def part(
        self,
        images: Tensor,
        timesteps: int,
        generator: Generator | None = None,
        *,
        first: int = 0,
        total: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Steps `start` to `stop` of what images are encoded to within a larger batch: a part of the same numbers.

        So that what an image becomes does not depend on how a batch is split, over processes or in time. One that
        draws may override it, to draw no more than it needs.

        Args:
            images: [B, C, H, W], those from number `first` on of a batch of `total` (None: of `first` + B).
            timesteps: T of the whole run.
            generator: as it was before the run where `start` is 0; afterwards as the time chunk before left it.
            start, stop: the time chunk; None is T.

        Returns:
            [stop - start, B, C, H, W], or [1, B, C, H, W] where `constant`.
        """
        whole, count = images, len(images)
        if self.random and generator is not None:
            # Whatever it draws depends on the shape alone. The generator stays where it is: the next chunk is cut
            # from the same draws.
            generator = Generator(generator.device).set_state(generator.get_state())
            whole = images.new_zeros(first + count if total is None else total, *images.shape[1:])
            whole[first : first + count] = images
        encoded = self(whole, timesteps, generator)
        if whole is not images:
            encoded = encoded[:, first : first + count]
        return encoded if self.constant else encoded[start:stop]


@encoders.register("direct")
class Direct(Encoder):
    """A constant current: the normalised image at every step; the first layer runs once, not T times.

    Returns (images - mean) / std as [1, B, C, H, W], the leading 1 saying that it is constant in time.
    Causal.
    """

    constant = True
    causal = True

    def encode(self, images: Tensor, timesteps: int, generator: Generator | None) -> Tensor:
        return ((images - self.mean) / self.std).to(images.dtype)[None]


@encoders.register("rate")
class Rate(Encoder):
    """Evenly spread spikes, round(intensity x T) of them; no randomness.

    With n = round(intensity·T), ties to even, a pixel has spiked floor(t·n/T + 1/2) times after t steps: n
    times in all, and never more than half a spike away from an even flow. Without that half, every pixel that
    is not black would spike at the last step, and only the white ones at the first. Mean and deviation are
    not applied.

    Not causal: both the count and the places depend on T, so a run of T steps says nothing of a shorter one.
    """

    spiking = True

    def encode(self, images: Tensor, timesteps: int, generator: Generator | None) -> Tensor:
        return self.part(images, timesteps)

    def part(
        self,
        images: Tensor,
        timesteps: int,
        generator: Generator | None = None,
        *,
        first: int = 0,
        total: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        count = (images.clamp(0, 1) * timesteps).round().int()
        last = timesteps if stop is None else stop
        steps = torch.arange(start, last + 1, device=images.device).int().view(-1, 1, 1, 1, 1)
        # Integers, so that no rounding error can add or lose a spike.
        spiked = (2 * steps * count + timesteps) // (2 * timesteps)
        return spiked.diff(dim=0).to(images.dtype)


@encoders.register("poisson")
class Poisson(Encoder):
    """Random spikes: at each step a pixel spikes with a probability equal to its intensity.

    Pixels and steps are independent Bernoulli draws, the discrete form of Poisson spike trains: over T steps
    the rate has the intensity p as its mean and sqrt(p(1 - p)/T) as its deviation; 0 never spikes and 1
    always does. Mean and deviation are not applied. Without a generator, PyTorch's global one for the images'
    device is used.

    Causal: one step is drawn after the other.
    """

    causal = True
    spiking = True
    random = True

    def encode(self, images: Tensor, timesteps: int, generator: Generator | None) -> Tensor:
        return self.part(images, timesteps, generator)

    def part(
        self,
        images: Tensor,
        timesteps: int,
        generator: Generator | None = None,
        *,
        first: int = 0,
        total: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        last = first + len(images)
        drawn = (last if total is None else total, *images.shape[1:])
        spikes = images.new_empty((timesteps if stop is None else stop) - start, *images.shape)
        for step in spikes:
            # In single precision, whatever the images' type: half precision has too few values below 1.
            step.copy_(torch.rand(drawn, generator=generator, device=images.device)[first:last] < images)
        return spikes


def check_images(images: Tensor, channels: int | None = None) -> None:
    """Check that images are floats [B, C, H, W] in [0, 1]; on a GPU this waits for them to be computed.

    Args:
        channels: C of the training images; None does not check it.

    Raises:
        ValueError: they are not (NaN included), are normalised already, or have another C.
    """
    if not images.is_floating_point() or images.ndim != 4:
        shape = list(images.shape)
        raise ValueError(f"images must be floats in [0, 1] of shape [B, C, H, W], not {images.dtype} {shape}")
    if channels not in (None, images.shape[1]):
        # One channel would be taken for all of them, without a word.
        raise ValueError(f"images have {images.shape[1]} channels, those that the network was trained on {channels}")
    if not images.numel() or images.is_meta:
        return
    low, high = (value.item() for value in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"images must be in [0, 1], not from {low:.4g} to {high:.4g}; the network itself applies mean and deviation"
        )
