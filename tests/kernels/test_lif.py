import math

import pytest
import torch

from kernel_cases import (
    LIF_FULL,
    LIF_OPTIONS,
    assert_close,
    check_lif,
    full,
    lif_results,
    make,
    name,
    pairwise,
)
from lasnn.kernels import SURROGATES, lif, reference
from lasnn.kernels.layout import in_order, step_strides

pytestmark = pytest.mark.usefixtures("reached")


@pytest.mark.parametrize("case", pairwise(LIF_OPTIONS), ids=name)
def test_equals_the_reference(case):
    check_lif(lif, case)


@pytest.mark.full
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("x", LIF_FULL["x"])
def test_equals_the_reference_on_the_full_grid(x, surrogate):
    for case in full({**LIF_FULL, "x": (x,), "surrogate": (surrogate,)}):
        check_lif(lif, case)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_dyadic_inputs_are_exact(surrogate, v_reset, detach_reset):
    """Multiples of 1/64 and tau = 2 leave nothing to round in 4 steps: fp32 has one right answer."""
    torch.manual_seed(0)

    def dyadic(*shape):
        return torch.randint(-128, 129, shape) / 64

    for shape in ((1,), (63,), (2, 3, 5, 7)):
        arguments = (dyadic(4, *shape), dyadic(*shape), 2.0, dyadic(4, *shape), dyadic(*shape))
        options = {"surrogate": surrogate, "v_reset": v_reset, "detach_reset": detach_reset}
        got = lif_results(lif, *arguments, **options)
        wanted = lif_results(reference.lif, *arguments, **options)
        assert torch.equal(got["spikes"], wanted["spikes"])
        assert torch.equal(got["v_last"], wanted["v_last"])
        assert_close(got["gradient of x"], wanted["gradient of x"], 1e-6, "gradient of x")
        assert_close(got["gradient of v0"], wanted["gradient of v0"], 1e-6, "gradient of v0")


def test_a_tie_fires():
    spikes, v_last = lif(torch.ones(1, 3))
    assert spikes.tolist() == [[1, 1, 1]]
    assert v_last.tolist() == [0, 0, 0]


def test_rest_is_the_reset_potential_of_a_hard_reset():
    x = torch.zeros(2, 3)
    assert lif(x, v_reset=-0.5)[1].tolist() == [-0.5] * 3
    assert lif(x, v_reset=None)[1].tolist() == [0.0] * 3


@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(dtype, v_reset):
    x = torch.zeros(4, 6, dtype=dtype)
    x[1, 1], x[1, 2], x[2, 3], x[0, 4] = math.nan, math.inf, -math.inf, 2
    spikes, v_last = lif(x, v_reset=v_reset)
    wanted, wanted_v = reference.lif(x, v_reset=v_reset)
    torch.testing.assert_close(spikes, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_last, wanted_v, rtol=0, atol=0, equal_nan=True)
    assert spikes[:, 1].isnan().tolist() == [False, True, True, True]
    assert spikes[:, 4].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_reaches_the_gradient(dtype):
    x = torch.zeros(4, 3, dtype=dtype)
    x[1, 1] = math.nan
    x.requires_grad_()
    lif(x)[0].sum().backward()
    assert x.grad.isnan().any(0).tolist() == [False, True, False]


@pytest.mark.parametrize("timesteps", [(3, 5), (9, 16)], ids=str)
def test_state_carries_from_call_to_call(timesteps):
    torch.manual_seed(0)
    first, second = timesteps
    x = torch.randn(first + second, 63, requires_grad=True)
    grad = torch.randn(first + second, 63)
    whole, v_whole = lif(x, surrogate="triangle")
    head, v = lif(x[:first], surrogate="triangle")
    tail, v_last = lif(x[first:], v, surrogate="triangle")
    assert torch.equal(torch.cat([head, tail]), whole)
    assert torch.equal(v_last, v_whole)
    (wanted,) = torch.autograd.grad(whole, x, grad)
    (got,) = torch.autograd.grad(torch.cat([head, tail]), x, grad)
    assert_close(got, wanted, 1e-6)


@pytest.mark.parametrize("layout", ["image", "channels_last", "every_other_step"])
def test_a_dense_step_is_not_copied_and_its_layout_is_kept(layout):
    x = make(layout, 4)
    assert in_order(x, step_strides(x)) is x
    spikes, v_last = lif(x)
    assert spikes.stride()[1:] == x.stride()[1:] == v_last.stride()
    assert spikes.stride(0) == x[0].numel()


def test_an_expanded_upstream_gradient():
    x = torch.randn(4, 2, 3, 5, 7, requires_grad=True)
    (got,) = torch.autograd.grad(lif(x)[0].mean(0).sum(), x)
    (wanted,) = torch.autograd.grad(reference.lif(x)[0].mean(0).sum(), x)
    assert_close(got, wanted, 1e-6)


def test_nothing_to_do_is_done():
    x = torch.randn(4, 0, 3, requires_grad=True)
    tau = torch.tensor(2.0, requires_grad=True)
    spikes, v_last = lif(x, tau=tau)
    assert spikes.shape == (4, 0, 3)
    assert v_last.shape == (0, 3)
    gradients = torch.autograd.grad(spikes.sum() + v_last.sum(), (x, tau))
    assert gradients[0].shape == x.shape
    assert gradients[1].item() == 0


def test_results_repeat():
    torch.manual_seed(0)
    x, tau = torch.randn(4, 5000), torch.tensor(2.5)
    results = [lif_results(lif, x, None, tau, x, x[0]) for _ in range(2)]
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])


def test_many_blocks(implementation):
    torch.manual_seed(0)
    x = torch.randn(2, 2 * 65536 * torch.get_num_threads() + 7 if implementation == "cpu" else 3007)
    results = [lif_results(f, x, x[1], torch.tensor(2.5), x, x[0]) for f in (lif, reference.lif)]
    for key, value in results[0].items():
        assert_close(value, results[1][key], 0 if key in ("spikes", "v_last") else 2e-5, key)


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("case", pairwise({**LIF_OPTIONS, "dtype": (torch.float64,)})[::3], ids=name)
def test_double_precision(case):
    check_lif(lif, case)
