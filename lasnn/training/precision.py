"""Arithmetic of a training: autocast, fp16's gradient scaler, and the optimiser's step under both."""

import torch
from torch import Tensor, nn

from lasnn.errors import MachineError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A scaler halves its scale at each overflow: from 65,536 forty in a row come here, and no further one would help.
SMALLEST_SCALE = 2.0**-24


class Precision:
    """What a recipe's precision means for a step; in fp32 each method is the plain PyTorch call.

    Args:
        name: "fp32", "bf16" or "fp16".
        device: where the training runs.
    """

    def __init__(self, name: str, device: torch.device):
        self.device = device
        self.dtype = DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    @property
    def uses_scaler(self) -> bool:
        """Whether gradients are scaled: then one that overflows is expected, and the scaler skips the step."""
        return self.scaler.is_enabled()

    def autocast(self) -> torch.autocast:
        """Around a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss, scaled where fp16 needs it."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, clip: float, found_inf: Tensor | None) -> None:
        """One step of the optimiser.

        Args:
            clip: largest norm of the whole gradient; 0 does not clip.
            found_inf: 1 where the step is to be skipped, decided on the device; None leaves it to the scaler.
        """
        if found_inf is not None:
            # PyTorch's fused optimisers read this attribute.
            optimizer.found_inf = found_inf
        if clip:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def check_scale(self, phase: str, epoch: int, step: int, hint: str) -> None:
        """Check that fp16's scale has not fallen to where no scale helps; waits for the device.

        Raises:
            MachineError: it has.
        """
        if self.uses_scaler and self.scaler.get_scale() < SMALLEST_SCALE:
            raise MachineError(
                f"the {phase}'s gradient overflows fp16 at every scale of the loss by epoch {epoch + 1}, step "
                f'{step + 1}: lower the weights of the losses, or set precision = "bf16".{hint}'
            )
