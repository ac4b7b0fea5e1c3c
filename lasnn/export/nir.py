"""NIR: the student as a graph that simulators and neuromorphic toolchains read (`nir_graph` builds it)."""

import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lasnn.errors import MachineError, UserError
from lasnn.export.exporter import Exporter, Reader, Sample
from lasnn.registry import exporters, reason


@exporters.register("nir")
class NirExporter(Exporter):
    """A NIR graph of one time step; encoder, T, mean and deviation are in its metadata, not in the graph."""

    suffix = ".nir"
    extra = "nir"
    packages = ("nir", "nirtorch")

    def check(self) -> None:
        import nir

        from lasnn.export import nir_graph

        data = self.run.description
        with self.translate_part_errors():
            self.graph, self.units = nir_graph.build(self.student.network, (data.channels, data.height, data.width))
        self.suited = list(READERS)
        if any(isinstance(node, nir.IF) for node in self.graph.nodes.values()):
            # It reads IF as a leaky neuron.
            self.suited.remove("snntorch")
        if not any(map(find_spec, self.suited)):
            raise UserError(
                f"format 'nir' is verified in a program that reads it, and none that reads this student is installed "
                f"here: pip install {' or '.join(self.suited)}"
            )

    def write(self, path: Path) -> None:
        import nir

        from lasnn.export.nir_graph import DT

        self.graph.metadata = {
            **{key: _plain(value) for key, value in self.description().items()},
            "dt": DT,
            "gives": self.gives,
        }
        nir.write(path, self.graph)

    def readers(self, path: Path) -> Sequence[Reader]:
        return [self.reader(name, path) for name in self.suited if find_spec(name)]

    def reader(self, name: str, path: Path) -> Reader:
        """The file, loaded in the program of `READERS` of this name."""
        shown = f"{name} {version(name)}"
        try:
            # snnTorch prints the parameters of each neuron.
            with redirect_stdout(io.StringIO()):
                module = READERS[name](path)
        except Exception as error:
            raise MachineError(f"{shown} cannot read the file: {reason(error)}") from error

        def run(sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
            encoded = sample.encoded.expand(self.timesteps, *sample.encoded.shape[1:])
            logits, spikes = run_steps(module, encoded, list(self.units))
            return logits.mean(0), {self.units[node]: value for node, value in spikes.items()}

        return Reader(shown, run)

    @property
    def takes(self) -> str:
        data, encoder = self.run.description, self.student.encoder
        name = self.run.recipe.student.encoder_table.name
        shape = f"[C, H, W] = [{data.channels}, {data.height}, {data.width}]"
        if name == "direct":
            what = "the image in [0, 1], less mean, over std, the same at each step"
        elif encoder.spiking:
            what = f"the spikes of the {name} encoder, 0 or 1, at each step others; mean and std are not applied"
        else:
            what = f"what the {name} encoder gives for this step"
        return f"at each of {self.timesteps} steps {shape}: {what}"

    @property
    def gives(self) -> str:
        return f"logits [K] = [{len(self.run.description.classes)}] at each step; the student's are their mean"


@torch.no_grad()
def run_steps(module: nn.Module, x: Tensor, nodes: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run what a reader made of a graph, step by step from rest.

    Args:
        module: (input [B, C, H, W], state) -> (logits [B, K], state), with a submodule for each node.
        x: [T, B, C, H, W].
        nodes: those whose outputs are wanted.

    Returns:
        Logits [T, B, K], and the outputs of the nodes [T, B, ...].
    """
    kept: dict[str, list[Tensor]] = {node: [] for node in nodes}
    hooks = []
    for node in nodes:

        def keep(_module, _inputs, output, node=node):
            kept[node].append(output[0] if isinstance(output, tuple) else output)

        hooks.append(module.get_submodule(node).register_forward_hook(keep))
    for neuron in module.modules():
        # snnTorch's hold their voltage themselves.
        getattr(neuron, "reset_mem", lambda: None)()
    logits, state = [], None
    try:
        for step in x:
            out, state = module(step, state)
            logits.append(out)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(logits), {node: torch.stack(steps) for node, steps in kept.items()}


def read_in_spikingjelly(path: Path) -> nn.Module:
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    from lasnn.export.nir_graph import DT

    return import_from_nir(path, dt=DT)


def read_in_snntorch(path: Path) -> nn.Module:
    import nir
    from snntorch.import_nir import import_from_nir

    return import_from_nir(nir.read(path))


# norse is not among them: its executor runs a projection shortcut after the neuron that it should reach.
READERS: dict[str, Callable[[Path], nn.Module]] = {
    "spikingjelly": read_in_spikingjelly,
    "snntorch": read_in_snntorch,
}


def _plain(value: Any) -> Any:
    """As NIR's metadata hold it: numbers, text, arrays of numbers; anything else as JSON."""
    import numpy as np

    if isinstance(value, list) and all(isinstance(each, float) for each in value):
        return np.array(value)
    return value if isinstance(value, (str, int, float)) else json.dumps(value)
