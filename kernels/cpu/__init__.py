"""The CPU path: one file an op, and what they share."""

from lasnn.kernels.cpu import attention, lif, norm_lif, pool

__all__ = ["attention", "lif", "norm_lif", "pool"]
