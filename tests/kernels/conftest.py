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
# implementation: (its op, the file in cpu/ and triton/ that it is in)
OPS = {
    "lif_forward": (ops.lif, "lif"),
    "lif_backward": (ops.lif_backward, "lif"),
    "norm_statistics": (ops.norm_statistics, "norm_lif"),
    "norm_lif_forward": (ops.norm_lif, "norm_lif"),
    "norm_lif_sums": (ops.norm_lif_sums, "norm_lif"),
    "norm_lif_grad": (ops.norm_lif_grad, "norm_lif"),
    "norm_grad": (ops.norm_grad, "norm_lif"),
    "norm_grad_": (ops.norm_grad_, "norm_lif"),
    "attention_forward": (ops.attention, "attention"),
    "attention_backward": (ops.attention_backward, "attention"),
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
    for name, (op, file) in OPS.items():
        op.implementations[DEVICE] = watched(name, ops.launcher(file, name))


@pytest.fixture(scope="session")
def implementation() -> str:
    return "triton" if TRITON else "cpu"


@pytest.fixture
def reached():
    """Poisons the implementation under test, and fails where the test did not run it."""
    on_cpu = {} if TRITON else {name: (op, getattr(getattr(cpu, file), name)) for name, (op, file) in OPS.items()}
    for name, (op, function) in on_cpu.items():
        op.implementations["cpu"] = watched(name, function)
    calls.clear()
    yield
    for op, function in on_cpu.values():
        op.implementations["cpu"] = function
    assert calls, "no kernel was called"


@pytest.fixture
def cpu_only(implementation):
    if implementation != "cpu":
        pytest.skip("the CPU path's own")
