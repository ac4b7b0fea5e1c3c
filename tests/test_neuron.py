import math

import pytest
import torch

from lasnn import neurons
from lasnn.errors import UserError
from lasnn.kernels.reference import lif as reference


@pytest.mark.parametrize("name", neurons.names())
def test_every_neuron_runs_and_holds_no_state(name):
    neuron = neurons.build(name)
    current = torch.randn(5, 3, 4)
    spikes, v_last = neuron(current)
    assert spikes.shape == current.shape
    assert v_last.shape == (3, 4)
    assert torch.equal(neuron(current)[0], spikes)
    assert not list(neuron.buffers())


@pytest.mark.parametrize("name", neurons.names())
def test_a_sequence_in_pieces_equals_the_whole(name):
    neuron = neurons.build(name, reset="soft")
    current = torch.randn(6, 7)
    whole, v_end = neuron(current)
    voltage, pieces = None, []
    for start in (0, 1, 4):
        end = {0: 1, 1: 4, 4: 6}[start]
        spikes, voltage = neuron(current[start:end], voltage)
        pieces.append(spikes)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(voltage, v_end)


@pytest.mark.parametrize("name", neurons.names())
def test_constant_current(name):
    neuron = neurons.build(name)
    current = torch.randn(1, 9)
    assert torch.equal(neuron(current, timesteps=4)[0], neuron(current.expand(4, -1))[0])


@pytest.mark.parametrize(
    ("name", "options", "kernel"),
    [
        ("lif", {"tau": 4.0, "decay_input": True}, {"tau": 4.0, "decay_input": True}),
        ("lif", {"reset": "soft", "threshold": 0.5}, {"v_reset": None, "threshold": 0.5}),
        ("lif", {"v_reset": -0.5}, {"v_reset": -0.5}),
        ("if", {}, {"tau": math.inf}),
    ],
)
def test_options_reach_the_kernel(name, options, kernel):
    current = torch.randint(-8, 9, (6, 50)) / 4
    spikes, v_last = neurons.build(name, **options)(current)
    expected, v_expected = reference(current, **kernel)
    assert torch.equal(spikes, expected)
    assert torch.equal(v_last, v_expected)


def test_if_does_not_leak():
    spikes, _ = neurons.build("if")(torch.full((8, 1), 0.25))
    assert spikes.flatten().tolist() == [0, 0, 0, 1, 0, 0, 0, 1]


def test_plif_starts_at_tau_and_learns_it():
    neuron = neurons.build("plif", tau=3.0)
    assert neuron.time_constant.item() == pytest.approx(3.0)
    assert list(neuron.state_dict()) == ["w"]
    current = torch.rand(4, 20) * 2
    torch.testing.assert_close(neuron(current)[0], neurons.build("lif", tau=3.0)(current)[0])
    # Not the spikes' plain sum: with a surrogate that is symmetric it can vanish.
    (neuron(current)[0] * torch.rand(4, 20)).sum().backward()
    assert neuron.w.grad.abs() > 0


def test_soft_reset_takes_no_v_reset():
    with pytest.raises(UserError, match="no meaning under a soft reset"):
        neurons.build("lif", reset="soft", v_reset=0.5)
