"""The ANN with its normalisation."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasnn.encoder import check_images
from lasnn.errors import UserError
from lasnn.network.staged import Staged
from lasnn.network.units import NormActivate


def without_activations(teacher: Staged) -> dict[str, Tensor]:
    """A teacher's state dict without what its activations have learnt: what it shares with its student."""
    units = tuple(f"{name}.activation." for name, unit in teacher.named_modules() if isinstance(unit, NormActivate))
    return {name: value for name, value in teacher.state_dict().items() if not name.startswith(units)}


class Classifier(NamedTuple):
    """A network's last linear layer: weight [K, D] and bias [K], zeros where it has none."""

    weight: Tensor
    bias: Tensor


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
        """Images [B, C, H, W] in [0, 1] -> logits [B, K].

        Raises:
            ValueError: the images are not in [0, 1], as when they were normalised already, or have other channels than
                those of the training.
        """
        if not torch.compiler.is_compiling():
            # A network from elsewhere may be given one channel for all of those that its mean has.
            check_images(images, len(self.mean) if type(self.network) is Staged else None)
        return self.taps(images)[0]

    def taps(self, images: Tensor, taps: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, C, H, W] in [0, 1], not checked, -> logits [B, K] and the tapped features [B, C, H, W]."""
        logits, features = self.network(((images - self.mean) / self.std)[None], taps=taps)
        return logits[0], {name: feature[0] for name, feature in features.items()}

    @property
    def classifier(self) -> Classifier:
        """The last nn.Linear of the head, without gradient; of a network from elsewhere that is called as a whole, of
        what it registers behind its last stage.

        Raises:
            UserError: there is none.
        """
        head = self.network.modules_by_part()["head"].values()
        layers = [layer for layer in head if isinstance(layer, nn.Linear)]
        if not layers:
            raise UserError("the teacher's head has no nn.Linear, so that it has no classifier")
        weight, bias = layers[-1].weight.detach(), layers[-1].bias
        return Classifier(weight, weight.new_zeros(len(weight)) if bias is None else bias.detach())
