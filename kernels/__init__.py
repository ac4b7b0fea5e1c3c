"""Spiking kernels: the whole time loop of a neuron, and attention maps, each in one pass over memory.

This package knows nothing of the rest of lasnn. README.md derives the formulas and counts the bytes.
"""

from lasnn.kernels.batch_norm import (
    BatchNorm2d,
    BatchStatistics,
    normalised_mean,
    pool_statistics,
    update_running_statistics,
)
from lasnn.kernels.checks import SURROGATES
from lasnn.kernels.functional import attention_map, avg_pool2, energy_map, lif, norm_lif

__all__ = [
    "SURROGATES",
    "BatchNorm2d",
    "BatchStatistics",
    "attention_map",
    "avg_pool2",
    "energy_map",
    "lif",
    "norm_lif",
    "normalised_mean",
    "pool_statistics",
    "update_running_statistics",
]
