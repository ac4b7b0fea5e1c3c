"""Whether a reader agrees with the student on images, by a rule that says which differences rounding explains.

Two programs that add the same numbers in another order differ in the last bits. Where a potential lies that near to the
threshold, one fires and the other does not, and such a flipped spike is then seen by everything behind it: a difference
of 1e-7 in one layer becomes hundreds of flips some layers on. A mistake in the export looks otherwise: potentials that
are not near the threshold fire. So the rule looks at where the flips of an image begin. A reader agrees if

- the arg-max is equal on every image, and at most `FLIPPED` of all spikes differ;
- |h - threshold| < `MARGIN` where an image's flips begin: in the first layer that has any, at each neuron's first;
- the logits of an image without a flip are within `LOGITS`;
- in a network of few layers (`Reader.exact_layers`) no spike differs at all.

An exact reader (`Reader.exact`) may not differ in a bit.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lasnn.data import DatasetDescription, Images, Streamed
from lasnn.export.exporter import Reader, Sample
from lasnn.network.student import Student
from lasnn.network.units import NormSpike
from lasnn.random import generator

# Images that a reader is held against, spread evenly over the test set.
IMAGES = 64
# The first batches are small and of different sizes, since a file must take any.
BATCHES = (1, 2, 5)
BATCH = 8
# Of a potential from its threshold where an image's flips begin.
MARGIN = 1e-5
# Of all spikes.
FLIPPED = 0.005
# Of the logits of an image none of whose spikes differ, relative to the largest logit where that is above 1.
LOGITS = 1e-4
# What a difference is blamed on that no spiking layer shows.
HEAD = "the head"


@dataclass(frozen=True)
class Agreement:
    """How near a reader comes to the student."""

    reader: str
    images: int
    same_class: int
    logit_difference: float
    """The largest."""
    spikes: int
    """How many neurons times steps were compared, whether they spiked or not."""
    flipped: int
    """In how many of them one spiked and the other did not."""
    first_layer: str | None
    """The first layer in which something differs beyond rounding, or else in which a spike does."""
    margin: float | None
    """The largest |h - threshold| where an image's flips begin; None without flips, or where a neuron does not tell."""
    problem: str | None
    """Why this is no agreement."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def drawn_images(description: DatasetDescription, seed: int) -> Images:
    """Images of a data set's shape that are no pictures: smooth spots with noise upon them."""
    shape, random = (description.channels, description.height, description.width), generator(seed, "export", "images")
    spots = torch.rand(IMAGES, description.channels, 4, 4, generator=random)
    smooth = interpolate(spots, shape[1:], mode="bilinear", align_corners=True)
    noise = torch.rand(IMAGES, *shape, generator=random)
    pixels = (200 * smooth + 55 * noise).to(torch.uint8)
    return Images(pixels, torch.zeros(IMAGES, dtype=torch.int64))


def samples(student: Student, images: Images | Streamed, seed: int) -> Iterator[Sample]:
    """Batches of some of the images, in sizes of 1, 2, 5 and 8, with what the student makes of them."""
    chosen = torch.linspace(0, len(images) - 1, min(IMAGES, len(images))).round().long().unique()
    sizes = []
    while (left := len(chosen) - sum(sizes)) > 0:
        sizes.append(min(left, BATCHES[len(sizes)] if len(sizes) < len(BATCHES) else BATCH))
    for number, (pixels, _) in enumerate(images.batches(chosen.split(sizes))):
        batch = pixels.float() / 255
        encoded = student.encoder(batch, student.timesteps, generator(seed, "export", number))
        yield Sample(batch, encoded, *observe(student, encoded))


@torch.no_grad()
def observe(student: Student, encoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the encoder returned -> logits [B, K], and the spikes of each layer [T, B, ...] in the order of running."""
    network, spikes, hooks = student.network, {}, []
    for name, unit in network.named_modules():
        if isinstance(unit, NormSpike):

            def keep(_unit, _inputs, output, name=name):
                spikes[name] = network.time.unfold(output)

            hooks.append(unit.register_forward_hook(keep))
    try:
        logits, _ = network(encoded, student.timesteps)
    finally:
        for hook in hooks:
            hook.remove()
    return logits.mean(0), spikes


class Verification:
    """Adds up what one reader makes of one sample after another."""

    def __init__(self, reader: Reader, student: Student):
        self.reader, self.student = reader, student
        self.images = self.same = self.spikes = 0
        self.difference, self.margin = 0.0, None
        # By layer, in the order in which they run.
        self.flips: dict[str, int] = {}
        # What rounding does not explain, by layer.
        self.objections: dict[str, str] = {}

    def add(self, sample: Sample) -> None:
        """Run the reader on a sample and compare.

        Raises:
            ValueError: the reader returns other shapes than the student.
        """
        logits, spikes = self.reader.run(sample)
        for name, found, wanted in (
            ("logits", logits, sample.logits),
            *((n, spikes[n], sample.spikes[n]) for n in spikes),
        ):
            if found.shape != wanted.shape:
                raise ValueError(f"{self.reader.name} gives {name} as {list(found.shape)}, not {list(wanted.shape)}")
        self.images += len(logits)
        self.same += int((logits.argmax(1) == sample.logits.argmax(1)).sum())
        flipped = torch.zeros(len(logits), dtype=torch.bool)
        for name in (name for name in sample.spikes if name in spikes):
            flips = spikes[name].ne(sample.spikes[name])
            self.spikes += flips.numel()
            self.flips[name] = self.flips.get(name, 0) + int(flips.sum())
            here = flips.transpose(0, 1).flatten(1).any(1)
            if (first := here & ~flipped).any():
                # What a neuron does after its first flip follows from that, as does all that other layers do.
                begin = flips & (flips.cumsum(0) == 1) & first.view(1, -1, *[1] * (flips.dim() - 2))
                self._look_at(name, begin, sample)
            flipped |= here
        distance = (logits - sample.logits).abs().amax(1).nan_to_num(torch.inf)
        self.difference = max(self.difference, distance.max().item())
        bound = 0 if self.reader.exact else LOGITS * sample.logits.abs().amax(1).clamp(min=1)
        if (~flipped & (distance > bound)).any():
            place = HEAD if spikes.keys() == sample.spikes.keys() else "a layer that the reader does not show"
            self.objections[place] = f"logits differ by {distance[~flipped].max():.2g} where no spike does"

    def _look_at(self, name: str, begin: Tensor, sample: Sample) -> None:
        """How near to the threshold the potentials are at which the flips of an image begin."""
        from lasnn.export.plain import Plain

        if self.reader.exact:
            self.objections[name] = "it must be equal bit for bit"
            return
        plain = Plain(self.student)
        potentials = plain.potentials(sample.encoded)
        if name not in potentials:
            # A neuron with a forward of its own does not tell.
            return
        margin = (potentials[name][begin] - plain.units[name].threshold).abs().max().item()
        self.margin = max(self.margin or 0.0, margin)
        if not margin < MARGIN:
            self.objections[name] = (
                f"a spike differs where the potential is {margin:.2g} from the threshold, which is not by rounding"
            )
        elif len(sample.spikes) <= self.reader.exact_layers:
            self.objections[name] = (
                f"a spike differs, and none may where {self.reader.exact_layers} layers or fewer spike"
            )

    def agreement(self) -> Agreement:
        """The result over all samples."""
        flipped = sum(self.flips.values())
        first = next((name for name, count in self.flips.items() if count), None)
        problem = None
        if self.objections:
            first = next((name for name in self.flips if name in self.objections), None) or next(iter(self.objections))
            problem = self.objections[first]
        elif flipped > FLIPPED * self.spikes:
            problem = f"{flipped / self.spikes:.2%} of spikes differ, more than {FLIPPED:.1%}"
        elif self.same < self.images:
            problem = f"another class on {self.images - self.same} of {self.images} images"
        return Agreement(
            self.reader.name,
            self.images,
            self.same,
            self.difference,
            self.spikes,
            flipped,
            first,
            self.margin,
            problem,
        )
