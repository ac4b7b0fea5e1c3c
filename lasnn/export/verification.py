"""Whether a reader agrees with the student on test images, by a rule that says which differences rounding explains.

Two programs that add the same numbers in another order differ in the last bits. Where a potential lies that near to the
threshold, one fires and the other does not, and such a flipped spike is then seen by everything behind it: a difference
of 1e-7 in one layer becomes hundreds of flips some layers on. A mistake in the export looks otherwise: potentials that
are not near the threshold fire. So the rule (`RULE`) looks at where the flips of an image begin.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lasnn.data import Images, Streamed
from lasnn.export.exporter import Reader, Sample
from lasnn.network import NormSpike, Student
from lasnn.random import generator

# Test images that a reader is held against, spread evenly over the test set.
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
RULE = (
    f"arg-max equal on every image, at most {FLIPPED:.1%} of spikes flipped, |h - threshold| < {MARGIN:g} where an "
    f"image's flips begin, logits within {LOGITS:g} where none are"
)


@dataclass(frozen=True)
class Agreement:
    """How near a reader comes to the student on test images."""

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
    """The largest |h - threshold| where an image's flips begin."""
    problem: str | None
    """Why this is no agreement."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def samples(student: Student, test: Images | Streamed, seed: int) -> Iterator[Sample]:
    """Batches of test images, in sizes of 1, 2, 5 and 8, with what the student makes of them."""
    chosen = torch.linspace(0, len(test) - 1, min(IMAGES, len(test))).round().long().unique()
    sizes = []
    while (left := len(chosen) - sum(sizes)) > 0:
        sizes.append(min(left, BATCHES[len(sizes)] if len(sizes) < len(BATCHES) else BATCH))
    for number, (pixels, _) in enumerate(test.batches(chosen.split(sizes))):
        images = pixels.float() / 255
        encoded = student.encoder(images, student.timesteps, generator(seed, "export", number))
        yield Sample(images, encoded, *observe(student, encoded))


@torch.no_grad()
def observe(student: Student, encoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the encoder returned -> logits [B, K], and the spikes of each layer [T, B, ...] in the order of running."""
    network, spikes, hooks = student.network, {}, []
    for name, unit in network.named_modules():
        if isinstance(unit, NormSpike):

            def keep(_unit, _inputs, output, name=name):
                spikes[name] = network.clock.unfold(output)

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
        self.images = self.same = self.spikes = self.flipped = 0
        self.difference, self.margin = 0.0, None
        self.problem: str | None = None
        # By layer, in the order in which they run.
        self.flips: dict[str, int] = {}
        self.strange: str | None = None

    def add(self, sample: Sample) -> None:
        """Run the reader on a sample and compare."""
        logits, spikes = self.reader.run(sample)
        wrong = {name: value.shape for name, value in spikes.items() if value.shape != sample.spikes[name].shape}
        if logits.shape != sample.logits.shape or wrong:
            name, shape = next(iter(wrong.items()), ("the logits", logits.shape))
            raise ValueError(f"{self.reader.name} gives {name} as {list(shape)}")
        self.images += len(logits)
        self.same += int((logits.argmax(1) == sample.logits.argmax(1)).sum())
        distance = (logits - sample.logits).abs().amax(1)
        self.difference = max(self.difference, distance.max().nan_to_num(torch.inf).item())
        begun = torch.zeros(len(logits), dtype=torch.bool)
        for name in sample.spikes:
            if name not in spikes:
                continue
            flips = spikes[name].ne(sample.spikes[name])
            self.spikes += flips.numel()
            self.flips[name] = self.flips.get(name, 0) + int(flips.sum())
            by_image = flips.transpose(0, 1).flatten(1).any(1)
            if not self.reader.exact and (begin := by_image & ~begun).any():
                self._look_at(name, flips & begin.view(1, -1, *[1] * (flips.dim() - 2)), sample)
            begun |= by_image
        bound = LOGITS * sample.logits.abs().amax(1).clamp(min=1)
        if not (begun | (distance <= bound)).all() and self.strange is None:
            self.strange = "the head" if spikes else "some layer"
        self.flipped = sum(self.flips.values())

    def _look_at(self, name: str, flips: Tensor, sample: Sample) -> None:
        """How near to the threshold those potentials are at which the flips of an image begin."""
        from lasnn.export.plain import Plain

        plain = Plain(self.student)
        threshold = plain.units[name].threshold
        h = plain.potentials(sample.encoded)[name]
        # What a neuron does after its first flip follows from that.
        first = flips & (flips.cumsum(0) == 1)
        margin = (h[first] - threshold).abs().max().item()
        self.margin = max(self.margin or 0.0, margin)
        if not margin < MARGIN and self.strange is None:
            self.strange = name

    def agreement(self) -> Agreement:
        """The result over all samples."""
        first = next((name for name, count in self.flips.items() if count), None)
        if self.reader.exact:
            where = first or ("the head" if self.difference else None)
            problem = None if where is None else "it should be equal bit for bit"
        else:
            where = self.strange or first
            problem = self._problem()
        return Agreement(
            self.reader.name,
            self.images,
            self.same,
            self.difference,
            self.spikes,
            self.flipped,
            where,
            self.margin,
            problem,
        )

    def _problem(self) -> str | None:
        if self.margin is not None and not self.margin < MARGIN:
            return f"a spike differs where the potential is {self.margin:.2g} from the threshold: rounding is no reason"
        if self.strange is not None:
            return f"logits differ by {self.difference:.2g} where no spike that is shown does"
        if self.flipped > FLIPPED * self.spikes:
            return f"{self.flipped / self.spikes:.2%} of spikes differ, more than {FLIPPED:.1%}"
        if self.same < self.images:
            return f"another class on {self.images - self.same} of {self.images} images"
        return None
