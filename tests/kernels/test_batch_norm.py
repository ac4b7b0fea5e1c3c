"""Batch norm over several processes is that of one process with all their images."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kernel_cases import batch_norm, images
from lasnn.kernels import BatchNorm2d, BatchStatistics, ops, pool_statistics, update_running_statistics
from norm_processes import CASES, SHARES, TIMESTEPS, results


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process of `SHARES` has found."""
    folder = tmp_path_factory.mktemp("norm")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(SHARES))]
    script = Path(__file__).with_name("norm_processes.py")
    environment = {**os.environ, "PYTHONPATH": f"{script.parents[1]}{os.pathsep}{script.parent}"}
    done = subprocess.run(
        [*torchrun, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(SHARES))]


@pytest.mark.parametrize("case", [*CASES, "no affine"], ids=str)
def test_processes_equal_one(processes, case):
    whole = results("plain", 0.1, False, affine=False) if case == "no affine" else results(*case)
    for number, wanted in whole.items():
        parts = [found[case][number] for found in processes]
        for part in parts:
            assert part.keys() == wanted.keys()
        for name, value in wanted.items():
            got = [part[name] for part in parts]
            if name in ("gradient of weight", "gradient of bias"):
                # Each is its own images' share; it is DistributedDataParallel that adds them up.
                joined = sum(got)
            elif name in ("running_mean", "running_var", "num_batches_tracked"):
                assert all(torch.equal(got[0], other) for other in got)
                joined = got[0]
            else:
                steps = len(value) // sum(SHARES)
                assert steps in (1, TIMESTEPS)
                shares = [part.unflatten(0, (steps, share)) for part, share in zip(got, SHARES, strict=True)]
                joined = torch.cat(shares, 1).flatten(0, 1)
            torch.testing.assert_close(joined, value, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: name + text)


def test_alone_it_is_torch_s():
    torch.manual_seed(0)
    theirs = batch_norm(3)
    ours = BatchNorm2d(3)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    y = images(4, (3, 5, 5), torch.float32)
    assert torch.equal(ours(y), theirs(y))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(y), theirs.eval()(y))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_are_updated_as_torch_does(momentum):
    torch.manual_seed(0)
    theirs = batch_norm(5, momentum=momentum)
    ours = copy.deepcopy(theirs)
    for _ in range(3):
        y = images(8, (5, 6, 7), torch.float32) * 3 + 2
        update_running_statistics(ours, BatchStatistics(*ops.norm_statistics(y), y.numel() // 5))
        theirs(y)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], rtol=1e-6, atol=1e-6)


def test_where_there_is_nothing_to_update_nothing_is():
    norm = batch_norm(3)
    before = copy.deepcopy(norm.state_dict())
    update_running_statistics(norm, None)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])
    statistics = BatchStatistics(torch.zeros(3), torch.ones(3), 8)
    update_running_statistics(nn.BatchNorm2d(3, track_running_stats=False), statistics)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_pooled_statistics_are_those_of_all_elements(as_tensor):
    """Of batches of different size and one of none, far from 0, where a sum of squares would lose all digits."""
    torch.manual_seed(0)
    parts = [images(count, (5, 6, 7), torch.float32) + 1000 * count for count in (2, 5, 1)]
    counts = [len(part) * 42 for part in parts]
    batches = [
        BatchStatistics(*ops.norm_statistics(part), torch.tensor(count) if as_tensor else count)
        for part, count in zip(parts, counts, strict=True)
    ]
    nothing = BatchStatistics(torch.full((5,), torch.nan), torch.full((5,), torch.nan), 0)
    mean, variance, count = pool_statistics([*batches, nothing])
    together = torch.cat(parts).double()
    assert count == sum(counts)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), together.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), together.var((0, 2, 3), correction=0), rtol=1e-6, atol=0)
