import pytest
import torch

from kernel_cases import ATTENTION_OPTIONS, channels_last, check_attention, full, name, pairwise
from lasnn.kernels import attention_map, reference

pytestmark = pytest.mark.usefixtures("reached")


@pytest.mark.parametrize("case", pairwise(ATTENTION_OPTIONS), ids=name)
def test_equals_the_reference(case):
    check_attention(attention_map, case)


@pytest.mark.full
@pytest.mark.parametrize("temporal", ATTENTION_OPTIONS["temporal"])
@pytest.mark.parametrize("power", ATTENTION_OPTIONS["power"])
def test_equals_the_reference_on_the_full_grid(power, temporal):
    for case in full({**ATTENTION_OPTIONS, "power": (power,), "temporal": (temporal,)}):
        check_attention(attention_map, case)


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("temporal", ["rate", "step", "map"])
def test_equals_the_formula(power, temporal):
    """Q(A) = vec(sum_c |A_c|^p) / ||.||_2, written out in loops."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 5, 6)

    def q(energy):
        flat = energy.reshape(-1)
        return flat / sum(value**2 for value in flat) ** 0.5

    def energy(feature):
        return sum(channel.abs() ** power for channel in feature)

    maps = attention_map(x, power, temporal)
    for b in range(2):
        if temporal == "rate":
            torch.testing.assert_close(maps[b], q(energy(sum(x[t, b] for t in range(3)) / 3)))
        elif temporal == "map":
            torch.testing.assert_close(maps[b], q(sum(energy(x[t, b]) for t in range(3)) / 3))
        else:
            for t in range(3):
                torch.testing.assert_close(maps[t, b], q(energy(x[t, b])))


@pytest.mark.parametrize("temporal", ["rate", "step", "map"])
@pytest.mark.parametrize("power", [1, 2, 1.5])
def test_the_gradient_of_a_silent_map_is_bounded(power, temporal):
    x = torch.zeros(2, 3, 4, 5, 6)
    x[:, 1] = 1e-6
    x[:, 2] = 1.0
    x.requires_grad_()
    maps = attention_map(x, power, temporal, eps=1e-3)
    (gradient,) = torch.autograd.grad(maps, x, torch.ones_like(maps))
    assert maps.isfinite().all()
    assert gradient.isfinite().all()
    # df/dx is at most `power` here, Q's derivative at most 1 / eps times the norm of what comes in.
    assert gradient.abs().max() <= power / 1e-3 * 30**0.5


@pytest.mark.parametrize("temporal", ["rate", "step", "map"])
def test_power_1_reaches_silent_neurons_and_power_2_does_not(temporal):
    x = torch.zeros(2, 1, 3, 4, 4, requires_grad=True)
    for power, reached in ((1, True), (2, False)):
        maps = attention_map(x, power, temporal)
        (gradient,) = torch.autograd.grad(maps.sum(), x)
        assert bool((gradient > 0).all()) == reached
        assert bool((gradient == 0).all()) == (not reached)


def test_a_map_has_unit_norm_and_full_precision():
    maps = attention_map(torch.rand(2, 3, 4, 5, 6).bfloat16())
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.norm(dim=-1), torch.ones(3))


def test_the_gradient_keeps_the_layout():
    x = channels_last((3, 2, 4, 5, 6)).requires_grad_()
    (gradient,) = torch.autograd.grad(attention_map(x, 2, "step").square().sum(), x)
    assert gradient.stride() == x.stride()


def test_an_empty_batch():
    x = torch.zeros(2, 0, 3, 4, 4, requires_grad=True)
    maps = attention_map(x)
    maps.sum().backward()
    assert maps.shape == (0, 16)
    assert x.grad.shape == x.shape


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("function", [attention_map, reference.attention_map])
@pytest.mark.parametrize("temporal", ["rate", "step", "map"])
@pytest.mark.parametrize("power", [1, 2, 1.5, 3])
def test_the_gradient_is_the_derivative(power, temporal, function):
    torch.manual_seed(0)
    x = torch.rand(2, 2, 3, 2, 3, dtype=torch.float64) + 0.2
    x[:, 1] *= -1
    attention_map(x)
    assert torch.autograd.gradcheck(
        lambda leaf: function(leaf, power, temporal, eps=1e-3), x.requires_grad_(), atol=1e-7
    )
