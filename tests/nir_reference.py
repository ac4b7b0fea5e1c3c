"""A NIR file run by NIR's own equations, from the file alone: what the exporter is compared with.

Shapes: T time steps, B batch; the rest is the file's.
"""

import nir
import torch
import torch.nn.functional as F
from torch import Tensor


def run(file, x: Tensor, dt: float = 1e-4) -> tuple[Tensor, dict[str, Tensor]]:
    """Input [T, B, C, H, W] -> output [T, B, K], and the spikes [T, B, ...] of each neuron by name."""
    graph = nir.read(file)
    order = in_order(graph)
    voltages: dict[str, Tensor] = {}
    spikes: dict[str, list[Tensor]] = {}
    outputs = []
    for step in x:
        values = {"input": step}
        for name in order:
            node = graph.nodes[name]
            arriving = sum(values[before] for before, after in graph.edges if after == name)
            if isinstance(node, nir.Output):
                outputs.append(arriving)
            elif isinstance(node, (nir.LIF, nir.IF)):
                values[name], voltages[name] = fire(node, arriving, voltages.get(name), dt)
                spikes.setdefault(name, []).append(values[name])
            else:
                values[name] = LINEAR[type(node)](node, arriving)
    return torch.stack(outputs), {name: torch.stack(steps) for name, steps in spikes.items()}


def fire(node, current: Tensor, v: Tensor | None, dt: float) -> tuple[Tensor, Tensor]:
    """One Euler step of the neuron's equation, then threshold and reset."""
    v_reset, threshold, r = (torch.from_numpy(value) for value in (node.v_reset, node.v_threshold, node.r))
    if v is None:
        v = v_reset.expand_as(current)
    if isinstance(node, nir.IF):
        v = v + dt * r * current
    else:
        tau, v_leak = torch.from_numpy(node.tau), torch.from_numpy(node.v_leak)
        v = v + dt / tau * ((v_leak - v) + r * current)
    spikes = (v > threshold).to(current.dtype)
    return spikes, torch.where(spikes > 0, v_reset, v)


def convolve(node, x: Tensor) -> Tensor:
    weight, bias = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    sizes = (tuple(map(int, value)) for value in (node.stride, node.padding, node.dilation))
    return F.conv2d(x, weight, bias, *sizes, int(node.groups))


def sum_pool(node, x: Tensor) -> Tensor:
    (height, width), (down, right) = node.kernel_size, node.stride
    assert not node.padding.any()
    windows = x.unfold(-2, int(height), int(down)).unfold(-2, int(width), int(right))
    return windows.sum((-2, -1))


LINEAR = {
    nir.Conv2d: convolve,
    nir.Affine: lambda node, x: x @ torch.from_numpy(node.weight).T + torch.from_numpy(node.bias),
    nir.SumPool2d: sum_pool,
    nir.Flatten: lambda node, x: x.flatten(int(node.start_dim), int(node.end_dim)),
}


def in_order(graph) -> list[str]:
    """All nodes but the input, each after those that it reads."""
    done, order, waiting = {"input"}, [], set(graph.nodes) - {"input"}
    while waiting:
        ready = [n for n in sorted(waiting) if all(before in done for before, after in graph.edges if after == n)]
        assert ready, "the graph has a cycle"
        order += ready
        done |= set(ready)
        waiting -= set(ready)
    return order
