"""The activations that a teacher can be trained on; each is the last step of its *normalise, add, activate* units."""

from typing import Any

import torch
from torch import Tensor, nn


class Floor(torch.autograd.Function):
    """The floor, with the gradient of the identity (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.floor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class QCFS(nn.Module):
    """Quantisation clip-floor-shift: y = threshold · clip(floor(x·L/threshold + 1/2) / L, 0, 1).

    It is what an integrate-and-fire neuron with soft reset that starts at threshold/2 emits on average over T = L steps
    of a constant input x. The gradient passes the floor as if it were the identity; where x is clipped, x gets none and
    the threshold gets it all. Arithmetic is fp32, whatever the type of x.

    Args:
        levels: L, the steps between 0 and the threshold.
        threshold: where its learning starts, above 0; one number for the layer.

    Source: Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural Networks",
    ICLR 2022. The clip comes before the floor, as in some of the code that follows theirs: the value is the same, the
    gradient differs for x within threshold/2L of the clip. That code starts the threshold at 8 and trains for 300
    epochs; in the dozen of the quickstart it hardly falls from there, hence 4 (docs/design.md has the figures).
    """

    def __init__(self, levels: int = 4, threshold: float = 4.0):
        super().__init__()
        self.levels = levels
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x: Tensor) -> Tensor:
        threshold = self.threshold.float()
        share = (x.float() / threshold).clamp(0, 1)
        return (Floor.apply(share * self.levels + 0.5) / self.levels * threshold).to(x.dtype)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"
