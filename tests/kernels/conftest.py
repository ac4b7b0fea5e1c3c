"""Which implementation the tests of this folder reach: the CPU path, or Triton under its interpreter.

Under TRITON_INTERPRET=1 (test_triton.py starts such a process) the Triton launchers take the place of the CPU
implementations; otherwise the dispatcher would quietly test the CPU path against itself. With TEST_DEVICE=cuda
(likewise) all tensors are made on the GPU.
"""

from collections import Counter

import pytest
import torch

from kernel_cases import DEVICE, TRITON
from lasnn.kernels import cpu, ops

torch.set_default_device(DEVICE)
OPS = {
    "lif_forward": ops.lif,
    "lif_backward": ops.lif_backward,
    "attention_forward": ops.attention,
    "attention_backward": ops.attention_backward,
}
ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))
calls = Counter()


def watched(name, function):
    """`function`, counted, with every buffer that it allocates full of NaN, not of luckily right values."""

    def poisoned(allocate):
        def fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return fill

    def run(*args):
        calls[name] += 1
        with pytest.MonkeyPatch.context() as patch:
            for owner, allocator in ALLOCATORS:
                patch.setattr(owner, allocator, poisoned(getattr(owner, allocator)))
            return function(*args)

    return run


if TRITON:
    from lasnn.kernels import attention_triton, lif_triton

    for name, op in OPS.items():
        module = lif_triton if name.startswith("lif") else attention_triton
        op.register_kernel(DEVICE)(watched(name, getattr(module, name)))


@pytest.fixture(scope="session")
def implementation() -> str:
    return "triton" if TRITON else "cpu"


@pytest.fixture
def reached(monkeypatch):
    """Poisons the implementation under test, and fails where the test did not run it."""
    if not TRITON:
        for name in OPS:
            monkeypatch.setattr(cpu, name, watched(name, getattr(cpu, name)))
    calls.clear()
    yield
    assert calls, "no kernel was called"


@pytest.fixture
def cpu_only(implementation):
    if implementation != "cpu":
        pytest.skip("the CPU path's own")
