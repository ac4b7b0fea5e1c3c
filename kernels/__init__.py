"""Spiking kernels: the whole time loop of a neuron, and attention maps, each in one pass over memory.

This package knows nothing of the rest of lasnn. README.md derives the formulas and counts the bytes.
"""

from lasnn.kernels.functional import SURROGATES, attention_map, lif, norm_lif
from lasnn.kernels.norm import BatchNorm2d

__all__ = ["SURROGATES", "BatchNorm2d", "attention_map", "lif", "norm_lif"]
