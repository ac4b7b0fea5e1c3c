"""Images as a network from elsewhere wants them."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lasnn.errors import UserError

Colour = list[Annotated[float, Field(ge=0, le=1)]] | None
Deviation = list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None
Pixels = Annotated[int, Field(ge=1)]


class Fit(nn.Module):
    """Images as the network wants them: [N, C, H, W] -> [N, channels, *size], one channel repeated to all.

    Args:
        channels: that the network takes.
        size: (height, width) that images are resized to; None leaves them.
        mode: of the interpolation, which is antialiased.
    """

    def __init__(self, channels: int, size: tuple[int, int] | None, mode: Literal["bilinear", "bicubic"] = "bilinear"):
        super().__init__()
        self.channels = channels
        self.size = size
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x = x.expand(-1, self.channels, -1, -1)
        if self.size is not None:
            x = F.interpolate(x, self.size, mode=self.mode, antialias=True)
        return x


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, channels: Sequence[int]) -> None:
    """Check the options `mean` and `std` of a teacher against the numbers of channels that its images may have.

    Raises:
        UserError: one is without the other, or has other values than there are channels.
    """
    if (mean is None) != (std is None):
        raise UserError("mean and std go together; give both or neither")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in channels:
            raise UserError(f"{name} has {len(values)} values; the images have {channels[0]} channels")
