"""lif and norm_lif beside the neurons of other libraries, where they are installed: spike for spike the same.

Last run with SpikingJelly 2.0.0, snnTorch 1.0.0, sinabs 3.1.3 and norse 1.1.0.
"""

import math

import pytest
import torch
from torch import nn

from lasnn.kernels import lif, norm_lif, update_running_statistics

pytestmark = pytest.mark.full

T, N = 8, 4096


def results(function, x):
    x = x.detach().requires_grad_()
    spikes, v_last = function(x)
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad((spikes * torch.randn(T, N)).sum(), x)
    return spikes.detach(), v_last.detach(), gradient


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.25])
@pytest.mark.parametrize("node", ["lif", "lif-decay-input", "if", "parametric", "parametric-decay-input"])
@pytest.mark.parametrize("surrogate", ["atan", "sigmoid"])
def test_equals_spikingjelly(node, v_reset, detach_reset, surrogate):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    surrogates = pytest.importorskip("spikingjelly.activation_based.surrogate")
    alpha = {"atan": 2.0, "sigmoid": 4.0}[surrogate]
    options = {
        "v_threshold": 1.0,
        "v_reset": v_reset,
        "detach_reset": detach_reset,
        "step_mode": "m",
        "surrogate_function": {"atan": surrogates.ATan, "sigmoid": surrogates.Sigmoid}[surrogate](alpha=alpha),
    }
    decay_input = node.endswith("decay-input")
    if node == "if":
        peer, tau = neuron.IFNode(**options), float("inf")
    elif node.startswith("lif"):
        peer, tau = neuron.LIFNode(tau=2.0, decay_input=decay_input, **options), 2.0
    else:
        peer = neuron.ParametricLIFNode(init_tau=2.0, decay_input=decay_input, **options)
        tau = torch.tensor(2.0, requires_grad=True)

    torch.manual_seed(0)
    x = torch.randn(T, N) * 1.5
    theirs = results(lambda x: (peer(x), peer.v), x)
    ours = results(
        lambda x: lif(
            x,
            tau=tau,
            v_reset=v_reset,
            surrogate=surrogate,
            alpha=alpha,
            decay_input=decay_input,
            detach_reset=detach_reset,
        ),
        x,
    )
    agree(ours, theirs)


def agree(ours, theirs):
    """No spike differs; gradients within 1e-6 of the largest."""
    assert 0.05 < theirs[0].mean() < 0.95
    assert torch.equal(ours[0], theirs[0])
    if theirs[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=1e-6 * max(1, theirs[2].abs().max().item()))


def current():
    torch.manual_seed(0)
    return torch.randn(T, N) * 1.5


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("surrogate", ["atan", "fast-sigmoid"])
def test_equals_snntorch(surrogate, detach_reset):
    """Its reset to zero, without decay of the input; `reset_delay` detaches the reset from the gradient."""
    snntorch = pytest.importorskip("snntorch")
    slope = {"atan": snntorch.surrogate.atan(alpha=2.0), "fast-sigmoid": snntorch.surrogate.fast_sigmoid(slope=3.0)}
    peer = snntorch.Leaky(beta=0.5, spike_grad=slope[surrogate], reset_mechanism="zero", reset_delay=detach_reset)

    def theirs(x):
        v, spikes = peer.init_leaky(), []
        for x_t in x:
            s, v = peer(x_t, v)
            spikes.append(s)
        return torch.stack(spikes), v

    alpha = {"atan": 2.0, "fast-sigmoid": 3.0}[surrogate]
    options = {"surrogate": surrogate, "alpha": alpha, "detach_reset": detach_reset}
    ours = results(lambda x: lif(x, **options), current())
    found = results(theirs, current())
    # With a delayed reset its voltage is the one before the reset.
    agree(ours, (found[0], None, found[2]) if detach_reset else found)


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("norm_input", [False, True])
def test_equals_sinabs(norm_input, v_reset):
    """Its decay is exp(-1/tau_mem); a soft reset is not detached, a hard one is."""
    sinabs = pytest.importorskip("sinabs")
    layers, activation = pytest.importorskip("sinabs.layers"), sinabs.activation

    def triangle(v, threshold):
        return (1 - (v - threshold).abs()).clamp(min=0)

    def theirs(x):
        peer = layers.LIF(
            tau_mem=-1 / math.log(0.5),
            spike_fn=activation.SingleSpike,
            reset_fn=activation.MembraneSubtract() if v_reset is None else activation.MembraneReset(),
            surrogate_grad_fn=triangle,
            norm_input=norm_input,
        )
        # It takes [B, T, N]; the neuron's own state follows.
        return peer(x.unsqueeze(0))[0], peer.v_mem[0]

    x = current() * (2 if norm_input else 1)
    options = {"decay_input": norm_input, "v_reset": v_reset, "detach_reset": v_reset is not None}
    agree(results(lambda x: lif(x, surrogate="triangle", alpha=1.0, **options), x), results(theirs, x))


@pytest.mark.parametrize("v_reset", [0.0, -0.25])
def test_equals_norse(v_reset):
    box = pytest.importorskip("norse.torch.functional.lif_box")

    def theirs(x):
        given = box.LIFBoxParameters(
            tau_mem_inv=torch.tensor(500.0),
            v_leak=torch.tensor(v_reset),
            v_reset=torch.tensor(v_reset),
            method="triangle",
            alpha=torch.tensor(1.0),
        )
        state, spikes = box.LIFBoxFeedForwardState(v=torch.full((N,), v_reset)), []
        for x_t in x:
            s, state = box.lif_box_feed_forward_step(x_t, state, given, dt=1e-3)
            spikes.append(s)
        return torch.stack(spikes), state.v

    x = current() * 2
    options = {"decay_input": True, "v_reset": v_reset, "surrogate": "triangle", "alpha": 1.0}
    agree(results(lambda x: lif(x, **options), x), results(theirs, x))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_lif_equals_spikingjelly_s_layers(residual, last):
    """Its batch norm over time and batch, then its LIFNode; the running statistics too."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    surrogates = pytest.importorskip("spikingjelly.activation_based.surrogate")
    steps, batch, channels = 4, 5, 6
    theirs_norm = layer.BatchNorm2d(channels, step_mode="m")
    node = neuron.LIFNode(tau=2.0, decay_input=False, step_mode="m", surrogate_function=surrogates.ATan())
    norm = nn.BatchNorm2d(channels)
    torch.manual_seed(0)
    memory = torch.channels_last if last else torch.contiguous_format
    y, r = (torch.randn(steps * batch, channels, 9, 11).contiguous(memory_format=memory) for _ in range(2))
    grad = torch.randn_like(y)
    found = []
    for ours in (True, False):
        leaves = [t.detach().requires_grad_() for t in ((y, r) if residual else (y,))]
        if ours:
            spikes, statistics = norm_lif(leaves[0], norm, leaves[1] if residual else None, timesteps=steps)
            update_running_statistics(norm, statistics)
            parameters = [norm.weight, norm.bias]
        else:
            x = theirs_norm(leaves[0].unflatten(0, (steps, batch)))
            x = x + leaves[1].unflatten(0, (steps, batch)) if residual else x
            spikes, parameters = node(x).flatten(0, 1), list(theirs_norm.parameters())
        found.append((spikes.detach(), *torch.autograd.grad(spikes, leaves + parameters, grad)))
    assert torch.equal(found[0][0], found[1][0])
    # torch's own channels_last batch norm loses more on the CPU: its variance is up to 1e-5 off.
    tolerance = 1e-5 if last else 1e-6
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, key), getattr(theirs_norm, key), rtol=tolerance, atol=1e-7)
