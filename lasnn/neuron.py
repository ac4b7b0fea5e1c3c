"""Spiking neurons as modules over the kernels.

A neuron starts from rest at each forward pass: it holds no state, so there is nothing to reset. Callers that run a
sequence in pieces pass the voltage on themselves.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lasnn.errors import UserError
from lasnn.kernels import SURROGATES, BatchStatistics, lif, norm_lif
from lasnn.registry import neurons

__all__ = ["IF", "LIF", "Neuron", "ParametricLIF"]

Surrogate = Literal[SURROGATES]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# At tau = 1 nothing of the voltage is left from one step to the next; below it the decay overshoots.
TimeConstant = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class Neuron(nn.Module):
    """What the neurons share; a subclass adds its time constant."""

    def __init__(
        self,
        *,
        threshold: Positive = 1.0,
        reset: Literal["hard", "soft"] = "hard",
        v_reset: Finite = 0.0,
        surrogate: Surrogate = "atan",
        alpha: Positive = 2.0,
        detach_reset: bool = False,
    ):
        super().__init__()
        if reset == "soft" and v_reset != 0.0:
            raise UserError(f'v_reset = {v_reset} has no meaning under a soft reset; leave it out or reset = "hard"')
        if reset == "hard" and v_reset >= threshold:
            raise UserError(f"v_reset = {v_reset} must be below the threshold, {threshold}: it would fire for ever")
        self.options = {
            "threshold": threshold,
            "v_reset": v_reset if reset == "hard" else None,
            "surrogate": surrogate,
            "alpha": alpha,
            "detach_reset": detach_reset,
        }

    @property
    def time_constant(self) -> float | Tensor:
        """tau, in time steps."""
        return math.inf

    def forward(self, current: Tensor, v0: Tensor | None = None, timesteps: int | None = None) -> tuple[Tensor, Tensor]:
        """Run all T steps from `v0`, or from rest.

        Args:
            current: [T, ...], or [1, ...] if constant in time.
            v0: voltage before the first step, [...].
            timesteps: T, where `current` is constant in time.

        Returns:
            Spikes [T, ...] in the type of `current`, and the voltage after the last step [...].
        """
        return lif(current, v0, tau=self.time_constant, timesteps=timesteps, **self.options)

    def after_norm(
        self,
        y: Tensor,
        norm: nn.BatchNorm2d,
        residual: Tensor | None = None,
        *,
        timesteps: int,
        constant: bool = False,
        v0: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, BatchStatistics | None] | tuple[Tensor, Tensor, BatchStatistics | None]:
        """Batch norm, residual and this neuron in one: what `forward` gives of their sum.

        Args, returns: as for `lasnn.kernels.norm_lif`.
        """
        run = {"timesteps": timesteps, "constant": constant, "v0": v0, "return_state": return_state}
        return norm_lif(y, norm, residual, **run, tau=self.time_constant, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


@neurons.register("if")
class IF(Neuron):
    """Integrate-and-fire: h[t] = v[t-1] + x[t], a spike where h >= threshold; the voltage does not leak.

    Args: as for `lif`, without `tau` (it is infinite) and `decay_input` (the input's gain would be 0).
    """


@neurons.register("lif")
class LIF(Neuron):
    """Leaky integrate-and-fire: h[t] = v[t-1] - (v[t-1] - v_rest)/tau + x[t], a spike where h >= threshold.

    Args:
        tau: membrane time constant in time steps.
        threshold: firing threshold.
        decay_input: divide the input current by tau too.
        reset: after a spike, "hard" sets the voltage to `v_reset`, "soft" subtracts the threshold.
        v_reset: the voltage after a hard reset, and the rest voltage then; under a soft reset rest is 0.
        surrogate: derivative of the spike with respect to h - threshold in the backward pass.
        alpha: sharpness of the surrogate.
        detach_reset: let no gradient flow through the spike in the reset.
    """

    def __init__(
        self,
        *,
        tau: TimeConstant = 2.0,
        decay_input: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        self.options["decay_input"] = decay_input
        self._set_tau(tau)

    def _set_tau(self, tau: float) -> None:
        self.tau = tau

    @property
    def time_constant(self) -> float | Tensor:
        return self.tau

    def extra_repr(self) -> str:
        tau = self.time_constant
        return f"tau={tau.item() if isinstance(tau, Tensor) else tau:.4g}, {super().extra_repr()}"


@neurons.register("plif")
class ParametricLIF(LIF):
    """Parametric LIF (Fang et al., ICCV 2021): each layer learns its tau, with 1/tau = sigmoid(w).

    `w` is the one key that a student's state dict has beyond its teacher's.

    Args: as for `lif`; `tau` is the value that training starts from.
    """

    def _set_tau(self, tau: float) -> None:
        self.w = nn.Parameter(torch.tensor(-math.log(tau - 1.0)))

    @property
    def time_constant(self) -> Tensor:
        return 1.0 / torch.sigmoid(self.w)
