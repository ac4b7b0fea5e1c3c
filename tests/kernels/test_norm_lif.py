import copy
import math

import pytest
import torch
from torch import nn

from kernel_cases import (
    NORM_LIF_FULL,
    NORM_LIF_OPTIONS,
    assert_close,
    batch_norm,
    check_norm_lif,
    full,
    grid,
    images,
    name,
    norm_lif_results,
    pairwise,
)
from lasnn.kernels import lif, norm_lif, ops, reference, update_running_statistics
from lasnn.kernels.layout import memory_format

pytestmark = pytest.mark.usefixtures("reached")


@pytest.mark.parametrize("case", pairwise(NORM_LIF_OPTIONS), ids=name)
def test_equals_the_reference(case):
    check_norm_lif(norm_lif, case)


@pytest.mark.full
@pytest.mark.parametrize("surrogate", ["atan", "rectangle"])
@pytest.mark.parametrize("image", NORM_LIF_FULL["image"], ids=str)
def test_equals_the_reference_on_the_full_grid(image, surrogate):
    rest = {"threshold": 0.6, "surrogate": surrogate, "detach_reset": False}
    for case in full({**NORM_LIF_FULL, "image": (image,)}):
        check_norm_lif(norm_lif, {**case, **rest})


@pytest.mark.parametrize("last", [False, True])
def test_dyadic_inputs_are_exact(last):
    """With a deviation of 1 and multiples of 1/64 there is nothing to round: fp32 has one right answer."""
    torch.manual_seed(0)

    def dyadic(*shape):
        memory = torch.channels_last if last else torch.contiguous_format
        return (torch.randint(-128, 129, shape) / 64).contiguous(memory_format=memory)

    norm = nn.BatchNorm2d(5, eps=0.0).eval()
    norm.running_mean.copy_(torch.arange(5) / 4)
    norm.bias.data.copy_(torch.arange(5) / 8)
    norm.weight.data.fill_(0.5)
    shape = (8, 5, 7, 9)
    arguments = (dyadic(*shape), norm, dyadic(*shape), 2.0, dyadic(*shape))
    got = norm_lif_results(norm_lif, *arguments, timesteps=4)
    wanted = norm_lif_results(reference.norm_lif, *arguments, timesteps=4)
    assert torch.equal(got["spikes"], wanted["spikes"])
    for key in ("gradient of y", "gradient of residual", "gradient of weight", "gradient of bias"):
        assert_close(got[key], wanted[key], 1e-6, key)


@pytest.mark.parametrize(
    ("stateful", "timesteps", "dtype", "last", "constant"),
    grid(
        stateful=(False, True),
        timesteps=(7, 19),
        dtype=(torch.float32, torch.bfloat16),
        last=(False, True),
        constant=(False, True),
    ),
)
def test_a_recomputed_spike_is_the_forward_pass_s(stateful, timesteps, dtype, last, constant):
    """With a surrogate that is flat, a detached hard reset to 0 and a gradient of the last spike alone, g is halved by
    every step back and 0 before the latest spike: it spells out the spikes that the backward pass saw.
    """
    torch.manual_seed(0)
    batch, slope = 3, 2.0**-10
    y, norm = images(batch if constant else timesteps * batch, (5, 9, 11), dtype, last), batch_norm(5)
    v0 = images(batch, (5, 9, 11), torch.float32, last) if stateful else None
    tensors = (y, None, v0, ops.norm_statistics(y), norm.weight.detach(), norm.bias.detach(), None)
    dynamics = (0.5, 1.0, False, 0.0, "rectangle", slope, True)
    options = (norm.eps, timesteps, constant)
    spikes, _, saved_states = ops.norm_lif(*tensors, y.numel() // 5, *options, stateful, *dynamics)
    grad = torch.zeros_like(spikes)
    grad[-batch:] = 1
    _, g, _, _ = ops.norm_lif_sums(grad, None, *tensors, saved_states, True, *options, *dynamics)

    wanted = [torch.full_like(y[:batch], slope, dtype=torch.float32)]
    for silent in reversed(1 - spikes.float().unflatten(0, (timesteps, batch))[:-1]):
        wanted.insert(0, wanted[0] / 2 * silent)
    wanted = torch.stack(wanted)
    assert 0.05 < spikes.float().mean() < 0.5
    wanted = (wanted.sum(0) if constant else wanted.flatten(0, 1)).to(dtype)
    # A sum of such powers of two has more digits than bf16; which spikes they stand for is told by the first of them.
    torch.testing.assert_close(g, wanted, rtol=2**-7 if constant and dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_the_batch_s_statistics_are_returned_and_the_norm_is_left_alone(constant, last):
    torch.manual_seed(0)
    norm = batch_norm(5)
    theirs = copy.deepcopy(norm)
    for _ in range(3):
        y = images(8, (5, 6, 7), torch.float32, last) * 3 + 2
        before = copy.deepcopy(norm.state_dict())
        _, batch = norm_lif(y, norm, timesteps=4, constant=constant)
        for key, value in norm.state_dict().items():
            assert torch.equal(value, before[key])
        assert batch.count == 8 * 42
        update_running_statistics(norm, batch)
        theirs(y)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-6, atol=1e-6)


def test_without_running_statistics_the_batch_s_own_are_used():
    torch.manual_seed(0)
    y = images(8, (5, 6, 7), torch.float32)
    norm = nn.BatchNorm2d(5, track_running_stats=False).eval()
    spikes, batch = norm_lif(y, norm, timesteps=4)
    wanted, wanted_batch = reference.norm_lif(y, norm, timesteps=4)
    assert torch.equal(spikes, wanted)
    torch.testing.assert_close(batch, wanted_batch)
    assert norm_lif(y, nn.BatchNorm2d(5).eval(), timesteps=4)[1] is None


@pytest.mark.parametrize(
    ("timesteps", "last", "dtype"),
    grid(timesteps=((3, 5), (9, 16)), last=(False, True), dtype=(torch.float32, torch.bfloat16)),
    ids=str,
)
def test_state_carries_from_call_to_call(timesteps, last, dtype):
    """In evaluation a run in two halves is the whole run, bit for bit; its gradients go back through the state."""
    torch.manual_seed(0)
    first, second = timesteps
    norm, options = batch_norm(5, training=False), {"tau": 2.7, "v_reset": -0.25, "return_state": True}
    y, r, grad = (images(2 * (first + second), (5, 6, 7), dtype, last) for _ in range(3))
    grad_v = images(2, (5, 6, 7), torch.float32, last)
    y, r = y.requires_grad_(), r.requires_grad_()
    whole, v_whole, _ = norm_lif(y, norm, r, timesteps=first + second, **options)
    cut = 2 * first
    head, v, batch = norm_lif(y[:cut], norm, r[:cut], timesteps=first, **options)
    assert batch is None
    tail, v_last, _ = norm_lif(y[cut:], norm, r[cut:], v0=v, timesteps=second, **options)
    assert torch.equal(torch.cat([head, tail]), whole)
    assert torch.equal(v_last, v_whole)
    leaves = {"y": y, "residual": r, "weight": norm.weight, "bias": norm.bias}
    wanted = torch.autograd.grad((whole, v_whole), list(leaves.values()), (grad, grad_v))
    got = torch.autograd.grad((head, tail, v_last), list(leaves.values()), (grad[:cut], grad[cut:], grad_v))
    for key, a, b in zip(leaves, got, wanted, strict=True):
        assert_close(a, b, 1e-5, key)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_asking_for_the_state_changes_nothing_else(constant, last):
    """Nor does starting from the state that is rest."""
    torch.manual_seed(0)
    y = images(3 if constant else 57, (5, 6, 7), torch.float32, last)
    rest = torch.full((3, 5, 6, 7), -0.25).contiguous(memory_format=memory_format(y))
    arguments = (y, batch_norm(5), None, torch.tensor(2.5), images(57, (5, 6, 7), torch.float32, last))
    options = {"timesteps": 19, "constant": constant, "v_reset": -0.25}
    plain = norm_lif_results(norm_lif, *arguments, **options)
    stateful = norm_lif_results(norm_lif, *arguments, v0=rest, grad_v_last=torch.zeros_like(rest), **options)
    assert stateful.keys() - plain.keys() == {"v_last", "gradient of v0"}
    for key, value in plain.items():
        assert torch.equal(value, stateful[key]), key


@pytest.mark.parametrize(
    ("image", "last", "dtype"),
    grid(image=((3, 1, 1), (40, 7, 7), (3, 33, 35)), last=(False, True), dtype=(torch.float32, torch.float16)),
    ids=str,
)
def test_statistics_of_a_far_away_mean(image, last, dtype):
    torch.manual_seed(0)
    mean = 1000 if dtype == torch.float32 else 100
    y = images(70, image, torch.float32, last)
    y = (y + mean * torch.arange(image[0])[:, None, None]).to(dtype)
    wanted = torch.stack([y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)])
    torch.testing.assert_close(ops.norm_statistics(y).double(), wanted, rtol=1e-4, atol=1e-5)


def test_statistics_of_many_elements():
    torch.manual_seed(0)
    for last in (False, True):
        y = images(40, (3, 41, 43), torch.float32, last)
        wanted = torch.stack([y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)])
        torch.testing.assert_close(ops.norm_statistics(y).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["y", "residual"])
@pytest.mark.parametrize("last", [False, True])
def test_one_constant_and_one_not(which, last):
    torch.manual_seed(0)
    tensors = {"y": images(12, (5, 6, 7), torch.float32, last), "residual": images(12, (5, 6, 7), torch.float32, last)}
    tensors[which] = tensors[which][:3]
    arguments = (tensors["y"], batch_norm(5), tensors["residual"], 2.0, images(12, (5, 6, 7), torch.float32, last))
    options = {"timesteps": 4, "constant": which == "y"}
    got = norm_lif_results(norm_lif, *arguments, **options)
    wanted = norm_lif_results(reference.norm_lif, *arguments, **options)
    assert torch.equal(got["spikes"], wanted["spikes"])
    for key in got:
        assert_close(got[key], wanted[key], 1e-5, key, 1e-6)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(dtype, last, residual):
    norm = batch_norm(3, training=False)
    y = images(8, (3, 4, 5), dtype, last)
    r = images(8, (3, 4, 5), dtype, last) if residual else None
    (y if r is None else r)[2, 1, 0, 0] = math.nan
    spikes, _ = norm_lif(y.requires_grad_(), norm, r, timesteps=4)
    found = spikes.detach().unflatten(0, (4, 2)).isnan()
    assert found[:, 0, 1, 0, 0].tolist() == [False, True, True, True]
    assert found.sum() == 3
    spikes.sum().backward()
    assert y.grad.unflatten(0, (4, 2))[:, 0, 1, 0, 0].isnan().any()
    assert y.grad[:, [0, 2]].isfinite().all()


def test_a_nan_reaches_the_statistics_of_its_channel_alone():
    y = images(8, (3, 4, 5), torch.float32)
    y[0, 1, 0, 0] = math.nan
    assert norm_lif(y, batch_norm(3), timesteps=4)[0].isnan().all(-1).all(-1).all(0).tolist() == [False, True, False]
    assert ops.norm_statistics(y).isnan().all(0).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (8, 3, 0, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_to_do_is_done(shape, training):
    y, norm = torch.randn(shape, requires_grad=True), batch_norm(3, training)
    v0 = torch.randn(shape[0] // 4, *shape[1:], requires_grad=True)
    spikes, v_last, batch = norm_lif(y, norm, y, v0=v0, return_state=True, timesteps=4)
    assert (spikes.shape, v_last.shape) == (shape, v0.shape)
    assert batch is None
    gradients = torch.autograd.grad(spikes.sum() + v_last.sum(), (y, v0, norm.weight, norm.bias))
    assert [tuple(g.shape) for g in gradients] == [shape, v0.shape, (3,), (3,)]
    assert gradients[2].tolist() == gradients[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("last", [False, True])
def test_results_repeat(last):
    torch.manual_seed(0)
    y = images(8, (5, 17, 19), torch.float32, last)
    arguments = (y, batch_norm(5), None, torch.tensor(2.5), torch.randn_like(y))
    first, second = (norm_lif_results(norm_lif, *arguments, timesteps=4) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_memory_order_of_upstream_gradients_changes_nothing(batch, last):
    torch.manual_seed(0)
    y, grad_spikes = (images(4 * batch, (5, 6, 7), torch.float32, last) for _ in range(2))
    v0, grad_v_last = (images(batch, (5, 6, 7), torch.float32, last) for _ in range(2))
    norm, other = batch_norm(5), torch.contiguous_format if last else torch.channels_last
    found = [
        norm_lif_results(
            norm_lif,
            y,
            norm,
            None,
            2.0,
            grad_spikes.contiguous(memory_format=memory),
            v0,
            grad_v_last.contiguous(memory_format=memory),
            timesteps=4,
        )
        for memory in (memory_format(y), other)
    ]
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("timesteps", [4, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass(dtype, timesteps, residual):
    """y, the residual, one state a segment of time, and things of the size of a channel."""
    y = images(timesteps * 2, (5, 6, 7), dtype).requires_grad_()
    r = images(timesteps * 2, (5, 6, 7), dtype) if residual else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm_lif(y, batch_norm(5), r, timesteps=timesteps)
    large = {tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor.numel() > 10}
    saved_states = 4 * y[:2].numel() * (math.ceil(timesteps / 8) - 1)
    assert sum(large.values()) == y.nbytes * (2 if residual else 1) + saved_states


def test_the_second_pass_agrees_with_itself():
    """Written or computed again, g leads to the same gradient of y."""
    torch.manual_seed(0)
    for last in (False, True):
        y, norm = images(38, (5, 6, 7), torch.float32, last), batch_norm(5)
        tensors = (ops.norm_statistics(y), norm.weight.detach(), norm.bias.detach(), None)
        dynamics = (0.5, 1.0, False, 0.0, "atan", 2.0, False)
        v0 = images(2, (5, 6, 7), torch.float32, last)
        spikes, v_last, saved_states = ops.norm_lif(y, None, v0, *tensors, 1, norm.eps, 19, False, True, *dynamics)
        given = (torch.randn_like(spikes), torch.randn_like(v_last), y)
        options = (norm.eps, 19, False, *dynamics)
        sums, g, _, _ = ops.norm_lif_sums(*given, None, v0, *tensors, saved_states, True, *options)
        means = sums / (y.numel() / 5)
        written = ops.norm_grad(g, y, *tensors[:2], means, norm.eps)
        again = ops.norm_lif_grad(*given, v0, *tensors, saved_states, means, norm.eps, 19, *dynamics)
        assert_close(again, written, 1e-6)
        ops.norm_grad_(g, y, *tensors[:2], means, norm.eps)
        assert torch.equal(g, written)


def test_two_parts_of_a_batch_can_be_merged():
    """What synchronised batch norm needs: statistics and sums of halves make those of the whole."""
    torch.manual_seed(0)
    y = images(8, (5, 6, 7), torch.float32)
    parts = [ops.norm_statistics(part.contiguous()) for part in (y[:2], y[2:])]
    n = torch.tensor([2.0, 6.0]) / 8
    mean = sum(weight * part[0] for weight, part in zip(n, parts, strict=True))
    var = sum(weight * (part[1] + (part[0] - mean) ** 2) for weight, part in zip(n, parts, strict=True))
    torch.testing.assert_close(torch.stack([mean, var]), ops.norm_statistics(y))


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("case", pairwise({**NORM_LIF_OPTIONS, "dtype": (torch.float64,)})[::3], ids=name)
def test_double_precision(case):
    check_norm_lif(norm_lif, case)


@pytest.mark.usefixtures("cpu_only")
def test_gradcheck_of_the_normalisation():
    """The smooth part, numerically differentiated in fp64: the normalisation through its own statistics."""

    class Normalise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, weight):
            statistics = ops.norm_statistics(y)
            ctx.save_for_backward(y, weight, statistics)
            mean, var = (value[:, None, None] for value in statistics)
            return (y - mean) / (var + 1e-5).sqrt() * weight[:, None, None]

        @staticmethod
        def backward(ctx, g):
            y, weight, statistics = ctx.saved_tensors
            mean, var = (value[:, None, None] for value in statistics)
            z = (y - mean) / (var + 1e-5).sqrt()
            means = torch.stack([g.mean((0, 2, 3)), (g * z).mean((0, 2, 3))])
            return ops.norm_grad(g.contiguous(), y, statistics, weight, means, 1e-5), (g * z).sum((0, 2, 3))

    torch.manual_seed(0)
    y, weight = torch.randn(3, 2, 4, 5).double().requires_grad_(), torch.randn(2).double().requires_grad_()
    assert torch.autograd.gradcheck(Normalise.apply, (y, weight))


@pytest.mark.usefixtures("cpu_only")
def test_gradcheck_below_the_threshold():
    """Where nothing fires v_last is smooth in all that leads to it."""
    torch.manual_seed(0)
    x, v0 = torch.randn(5, 7).double().requires_grad_(), torch.randn(7).double().requires_grad_()
    tau = torch.tensor(2.5).double().requires_grad_()
    for v_reset in (0.0, None, -0.25):
        assert torch.autograd.gradcheck(
            lambda x, v0, tau, v_reset=v_reset: lif(
                x, v0, tau=tau, threshold=100, v_reset=v_reset, decay_input=True, surrogate="rectangle"
            )[1],
            (x, v0, tau),
        )
