"""The reference beside SpikingJelly 2.0, where it is installed: the same neuron, spike for spike."""

import pytest
import torch

from lasnn.kernels import reference

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
        lambda x: reference.lif(
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
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=7e-7 * max(1, theirs[2].abs().max().item()))
