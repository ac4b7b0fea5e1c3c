"""pt2: the student as a program of PyTorch's own operators, by torch.export, that runs without lasnn."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode

from lasnn.errors import UserError
from lasnn.export.exporter import Exporter, Reader, Sample
from lasnn.export.plain import Plain
from lasnn.registry import exporters

# The name of the description within the file.
DESCRIPTION = "lasnn.json"


@exporters.register("pt2")
class Pt2Exporter(Exporter):
    """A program for torch.export.load, which runs without lasnn and equals the student bit for bit."""

    suffix = ".pt2"

    def write(self, path: Path) -> None:
        plain = Plain(self.student)
        program = trace(self, plain)
        description = {**self.description(), "spikes": spike_nodes(program, plain)}
        # Tracebacks name the files of this machine.
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, path, extra_files={DESCRIPTION: json.dumps(description)})

    def readers(self, path: Path) -> Sequence[Reader]:
        kept: dict[str, Any] = {DESCRIPTION: ""}
        module = torch.export.load(path, extra_files=kept).module()
        names = {node: layer for layer, node in json.loads(kept[DESCRIPTION])["spikes"].items()}

        @torch.no_grad()
        def run(sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
            watched = Watched(module, names)
            x = self.fed(sample)
            watched.run(x)
            return module(x), {
                layer: spikes.unflatten(0, (self.timesteps, -1)) for layer, spikes in watched.kept.items()
            }

        return [Reader(f"torch.export {torch.__version__}", run, exact=True)]


class Watched(torch.fx.Interpreter):
    """Runs a graph and keeps the values of some nodes.

    Args:
        names: node -> what its value is kept as.
    """

    def __init__(self, module: torch.fx.GraphModule, names: dict[str, str]):
        super().__init__(module)
        self.names, self.kept = names, {}

    def run_node(self, node: torch.fx.Node) -> Any:
        value = super().run_node(node)
        if node.name in self.names:
            self.kept[self.names[node.name]] = value
        return value


def trace(exporter: Exporter, plain: Plain) -> ExportedProgram:
    """The graph of a plain student, its batch dynamic.

    Raises:
        UserError: a part that is not lasnn's own cannot be traced, or uses other operators than PyTorch's.
    """
    x, axis = exporter.example()
    with exporter.translate_part_errors():
        with Operators() as operators, torch.no_grad():
            plain(x)
        if operators.strange:
            raise UserError(
                f"the file would need {', '.join(sorted(operators.strange))}, which is not PyTorch's: a neuron, an "
                "encoder or a layer of your own that is to be exported may use plain PyTorch operators only"
            )
        return torch.export.export(plain, (x,), dynamic_shapes=({axis: torch.export.Dim("batch", min=1)},))


class Operators(TorchDispatchMode):
    """Within the block, notes the operators that are not PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.strange: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace not in ("aten", "prim", "prims"):
            self.strange.add(str(operator))
        return operator(*args, **(kwargs or {}))


def spike_nodes(program: ExportedProgram, plain: Plain) -> dict[str, str]:
    """The node of the graph that each unit returns, by the unit's name."""
    paths = {f"network.{name}": name for name in plain.units}
    found = {}
    for node in program.graph.nodes:
        inner = next(reversed((node.meta.get("nn_module_stack") or {}).values()), ("",))[0]
        if inner in paths:
            found[paths[inner]] = node.name
    return found
