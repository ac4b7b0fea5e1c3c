"""One epoch of batches from images that live on the device as bytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from lasnn.data.augment import Augmentation
from lasnn.data.dataset import Images
from lasnn.data.stream import Streamed
from lasnn.random import generator, keyed


class Batches:
    """The batches of one epoch: pairs of images [b, C, H, W], floats in [0, 1], and labels [b] (class probabilities
    [b, K] where the augmentation mixes images).

    Every image comes once; the last batch may be short. The order is a function of (seed, epoch) alone, the
    same on every device; batch k's augmentation is a function of (seed, epoch, k). So an epoch that is taken up
    again with `start` yields exactly the batches that were left. Iterating again yields the same.

    Args:
        images: all images, on the device that the batches shall be on, or streamed to it.
        batch_size: images in a batch.
        seed: the run's seed.
        epoch: number of the epoch.
        augment: the augmentation, or names of those that need nothing of the data set, in order.
        shuffle: False keeps the order of `images` (evaluation).
        start: number of the first batch to yield; `len` counts the batches from there on.
        share: which of a batch of n images this process is to have, a slice or their numbers; None is all. The batch is
            drawn and augmented as ever, so that an image does not depend on who has it.

    Raises:
        ValueError: `batch_size` is below 1, or `start` is not a batch's number (or the number of batches).
    """

    def __init__(
        self,
        images: Images | Streamed,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        augment: Augmentation | Sequence[str] = (),
        shuffle: bool = True,
        start: int = 0,
        share: Callable[[int], slice | Tensor] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.total = -(-len(images) // batch_size)
        if not 0 <= start <= self.total:
            raise ValueError(f"start must be from 0 to {self.total}, the number of batches, not {start}")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.augment = augment if isinstance(augment, Augmentation) else Augmentation(augment)
        self.shuffle = shuffle
        self.start = start
        self.share = share

    def __len__(self) -> int:
        return self.total - self.start

    def images_in(self, batch: int) -> int:
        """How many images a batch has, those of other processes too."""
        return min(self.batch_size, len(self.images) - batch * self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU: generators of different devices give different orders.
        draws = generator(self.seed, "order", self.epoch)
        count = len(self.images)
        order = torch.randperm(count, generator=draws) if self.shuffle else torch.arange(count)
        chosen = order.split(self.batch_size)[self.start :]
        if self.share is not None and not self.augment.steps:
            # Nothing is drawn that needs the other images.
            chosen = [batch[self.share(len(batch))] for batch in chosen]
        # What reads ahead ends with the epoch, however that ends.
        with closing(self.images.batches(chosen)) as read:
            for step, (pixels, labels) in enumerate(read, start=self.start):
                # Drawn on the CPU, for the same reason.
                draws = generator(self.seed, "augment", self.epoch, step)
                # A user's augmentation may draw from the global generators instead: those are keyed as well.
                with keyed(self.seed, "augment", self.epoch, step):
                    images, targets = self.augment(pixels.float() / 255, labels, draws)
                if self.share is None or not self.augment.steps:
                    yield images, targets
                else:
                    mine = self.share(len(targets))
                    yield images[mine], targets[mine]
