"""`lasnn.distill` with everything that is fp32 in fp64, in which processes are compared: run by test_distributed.py.

In fp32 sums that are taken in another order make spikes flip.
"""

import sys

import torch

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double

from lasnn import distill

if __name__ == "__main__":
    distill(sys.argv[1], sys.argv[2], overrides=sys.argv[3:])
