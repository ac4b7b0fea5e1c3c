"""The CPU path's own: its threads, its compilation and its cache."""

import math
import os
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernel_cases import batch_norm, images, lif_results, norm_lif_results
from lasnn.kernels import SURROGATES, attention_map, lif, norm_lif, ops
from lasnn.kernels.cpu import neuron, threads

pytestmark = pytest.mark.usefixtures("cpu_only")

# Large enough for several threads.
SHAPE = (8, 12, 65, 63)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def unit_results(last: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    y, residual, grad = (images(SHAPE[0], SHAPE[1:], dtype, last) for _ in range(3))
    return norm_lif_results(norm_lif, y, batch_norm(SHAPE[1]), residual, torch.tensor(2.5), grad, timesteps=4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_threads_are_as_many_as_pytorch_s(count, set_threads):
    set_threads(count)
    together, calls = threading.Barrier(count), []

    def work(first, last):
        together.wait(60)
        calls.append((first, last, threading.get_ident()))

    threads.run(work, 7, 7 * threads.SHARE)
    assert sorted(part for first, last, _ in calls for part in range(first, last)) == list(range(7))
    assert len({thread for *_, thread in calls}) == len(calls) == count
    assert threading.get_ident() in {thread for *_, thread in calls}


def test_little_work_wakes_nobody(set_threads):
    set_threads(4)
    calls = []
    threads.run(lambda first, last: calls.append((first, last, threading.get_ident())), 7, threads.SHARE)
    assert calls == [(0, 7, threading.get_ident())]


def test_an_error_of_any_thread_is_raised(set_threads):
    set_threads(3)
    for failing in range(3):

        def work(first, last, failing=failing):
            if first == failing:
                raise ValueError(f"part {first}")

        with pytest.raises(ValueError, match=f"part {failing}"):
            threads.run(work, 3, 3 * threads.SHARE)


@pytest.mark.parametrize("last", [False, True])
def test_results_are_the_same_for_every_number_of_threads(last, set_threads):
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(unit_results(last))
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


def test_several_threads_call_at_once(set_threads):
    set_threads(2)
    wanted = unit_results()
    x = torch.randn(4, 100_000)
    wanted_lif = lif_results(lif, x, None, 2.0, x, x[0])
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(lif_results, lif, x, None, 2.0, x, x[0]) for _ in range(12)]
        for call in calls:
            for key, value in call.result().items():
                assert torch.equal(value, wanted_lif[key])
    for key, value in unit_results().items():
        assert torch.equal(value, wanted[key])


def run(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


USE = """
import os, sys
import torch
from lasnn.kernels import lif
torch.set_num_threads(2)
x = torch.ones(4, 100_000)
def use():
    # By NumPy: PyTorch's own threads do not outlive a fork.
    assert lif(x)[0].numpy().sum() == 400_000
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch comes with another OpenMP")
def test_the_threads_are_those_of_pytorch():
    """None but the caller's is Python's; and where OpenMP gives fewer than asked for, all parts are done."""
    program = """
import threading
before = threading.active_count()
torch.set_num_threads(2)
from lasnn.kernels.cpu import threads
def team():
    seen = []
    threads.run(lambda first, last: seen.append((first, last)), 7, 100 * threads.SHARE)
    return sorted(seen)
print(threads.openmp() is not None, team(), threading.active_count() - before)
"""
    assert run(USE + program) == "True [(0, 3), (3, 7)] 0\n"
    assert run(USE + program, OMP_THREAD_LIMIT="1") == "True [(0, 7)] 0\n"


def test_a_fork_after_use_has_threads_of_its_own():
    program = """
use()
for _ in range(3):
    child = os.fork()
    if child == 0:
        import faulthandler
        faulthandler.dump_traceback_later(60, exit=True)
        use()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
use()
print("done")
"""
    assert run(USE + program) == "done\n"


def test_a_call_while_the_interpreter_ends():
    program = """
import atexit
atexit.register(lambda: (use(), print("done")))
use()
"""
    assert run(USE + program) == "done\n"


@pytest.mark.full
def test_without_a_place_for_its_cache_it_compiles_anew():
    program = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
use()
from lasnn.kernels.cpu import loops
print(type(loops.forward._cache).__name__)
"""
    assert run(USE + program) == "NullCache\n"


def test_the_cache_is_made_where_it_is_missing(tmp_path):
    program = "use()\nfrom lasnn.kernels.cpu import loops\nprint(sum(loops.forward.stats.cache_hits.values()))"
    folder = tmp_path / "new" / "cache"
    hits = [run(USE + program, NUMBA_CACHE_DIR=str(folder)).strip() for _ in range(2)]
    assert hits == ["0", "1"]
    assert list(folder.rglob("*.nbc"))


def test_numba_is_imported_by_a_cpu_tensor_alone():
    program = """
import sys
import torch
from lasnn.kernels import attention_map, lif, norm_lif
x = torch.zeros(4, 2, 3, 5, 7, device="meta", requires_grad=True)
lif(x)[0].sum().backward()
attention_map(x)
norm_lif(x.flatten(0, 1), torch.nn.BatchNorm2d(3, device="meta"), timesteps=4)
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
lif(torch.zeros(4, 3))
assert "numba" in sys.modules
"""
    run(program)


def test_options_need_no_compilation_of_their_own():
    loops = neuron.loops()
    x = torch.randn(9, 65, requires_grad=True)
    for i, surrogate in enumerate(SURROGATES):
        for v_reset in (0.0, None, -0.25):
            spikes, v_last = lif(x, tau=2.0 + i, threshold=0.5, v_reset=v_reset, surrogate=surrogate, decay_input=i > 2)
            (spikes.sum() + v_last.sum()).backward()
    for last in (False, True):
        unit_results(last)
        y = images(4, (3, 5, 7), torch.float32, last)
        for power in (1, 2, 3):
            attention_map(y.unflatten(0, (2, 2)).requires_grad_(), power).sum().backward()
    for loop in (loops.forward, loops.backward, loops.moments, loops.norm_backward, loops.energy):
        states = [signature[-1].dtype for signature in loop.signatures]
        likes = [signature[-2].dtype for signature in loop.signatures]
        assert len(set(zip(states, likes, strict=True))) == len(loop.signatures) <= 4


def test_nothing_is_fused_or_reordered_before_the_threshold():
    import numba

    loops = neuron.loops()
    lif(torch.zeros(4, 65))
    # Compiled here, since what comes from the cache cannot be looked at.
    forward = numba.njit(error_model="numpy", _nrt=False)(loops.forward.py_func)
    forward.compile(next(s for s in loops.forward.signatures if s[-2].dtype == numba.float32))
    (llvm,), (assembly,) = forward.inspect_llvm().values(), forward.inspect_asm().values()
    arithmetic = re.findall(r"= f(?:add|sub|mul)[^\n]*", llvm)
    assert arithmetic
    assert not [line for line in arithmetic if re.search(r"\b(fast|contract|reassoc|nnan|ninf|arcp|afn)\b", line)]
    assert not re.search(r"\bv?f(n?m(add|sub)|ml[as])\w*", assembly)
    # Steps four at a time and one at a time, each in vectors.
    assert len(re.findall(r"fcmp \w+ <\d+ x float>", llvm)) >= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_as_torch_rounds_them(dtype):
    """The gradient of a flat surrogate is the upstream gradient times its slope: any number, through read and write."""
    torch.manual_seed(0)
    upstream = (torch.randn(1, 60_000) * torch.logspace(-30, 30, 60_000, base=2)).to(dtype)
    upstream[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    x = torch.full((1, 60_000), 1.0, dtype=dtype, requires_grad=True)
    slope = 1 / 3
    (got,) = torch.autograd.grad(lif(x, surrogate="rectangle", alpha=slope, detach_reset=True)[0], x, upstream)
    wanted = (upstream.float() * torch.tensor(slope, dtype=torch.float32)).to(dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("image", [(3, 1, 1), (129, 1, 1), (1200, 1, 2), (2, 40, 41), (64, 4, 4)], ids=str)
def test_lines_of_every_kind(image, last):
    """Several images a line, several lines an image, channels cut in two: sums reach the right channel."""
    torch.manual_seed(0)
    y = images(6, image, torch.float32, last) + torch.arange(image[0])[:, None, None]
    wanted = torch.stack([y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)])
    torch.testing.assert_close(ops.norm_statistics(y).double(), wanted, rtol=1e-5, atol=1e-6)
    options = (1e-5, 3, False, 0.5, 1.0, False, 0.0, "atan", 2.0, False)
    given = (y, None, None, wanted.float(), None, None, None)
    _, _, saved = ops.norm_lif(*given, 0, *options[:3], False, *options[3:])
    sums, g, _, _ = ops.norm_lif_sums(torch.randn_like(y), None, *given, saved, True, *options)
    mean, var = wanted.float().double()[:, :, None, None]
    torch.testing.assert_close(sums[0].double(), g.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    z = (y - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(sums[1].double(), (g * z).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("of", ["values", "gradient"])
def test_what_is_no_number_passes_through_in_silence(value, of):
    """A training that diverges ends with lasnn's own line, not after warnings of NumPy's."""
    y = torch.full((4, 2, 3, 3), value if of == "values" else 1.0).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spikes, _ = norm_lif(y, batch_norm(2), timesteps=2)
        spikes.backward(torch.full_like(spikes, value))
    assert y.grad is not None
