"""ONNX: the student in plain ONNX operators, unrolled over T, verified in onnxruntime."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lasnn.export.exporter import Exporter, Reader, Sample
from lasnn.export.plain import Plain
from lasnn.export.pt2 import trace
from lasnn.registry import exporters

# The value within the graph that holds the spikes of a layer, [T*B, ...], by the layer's name.
SPIKES = "spikes/"
# Spiking layers of a network in which no spike may differ: over so few, rounding flips next to none (docs/export.md).
SHALLOW = 5


@exporters.register("onnx")
class OnnxExporter(Exporter):
    """An ONNX graph of standard operators, unrolled over T, its batch dynamic; verified in onnxruntime."""

    suffix = ".onnx"
    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, path: Path) -> None:
        import onnx

        plain = Plain(self.student, show_spikes=True)
        program = trace(self, plain)
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["spikes" if self.student.encoder.random else "images"],
            output_names=["logits", *(SPIKES + name for name in plain.trace.spikes)],
            external_data=False,
            verbose=False,
        ).model_proto
        # The spikes stay in the graph under their names; what runs it asks for the logits.
        del model.graph.output[1:]
        tidy(model.graph)
        properties = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in self.description().items()
        }
        onnx.helper.set_model_props(model, properties)
        model.producer_name, model.producer_version = "lasnn", properties["lasnn"]
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)

    def readers(self, path: Path) -> Sequence[Reader]:
        import onnx
        import onnxruntime

        model = onnx.load(path)
        given = {value for node in model.graph.node for value in node.output}
        names = [value for value in given if value.startswith(SPIKES)]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        cpu = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, options, providers=cpu)
        # The same graph with more outputs; the logits are still taken from the file as it is.
        watched = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=cpu)
        [feed] = session.get_inputs()

        def run(sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
            fed = {feed.name: self.fed(sample).numpy()}
            [logits] = session.run(["logits"], fed)
            spikes = zip(names, watched.run(names, fed), strict=True)
            return torch.from_numpy(logits), {
                name.removeprefix(SPIKES): torch.from_numpy(value).unflatten(0, (self.timesteps, -1))
                for name, value in spikes
            }

        return [Reader(f"onnxruntime {onnxruntime.__version__}", run, exact_layers=SHALLOW)]


def tidy(graph: Any) -> None:
    """Call the batch `batch`, and drop tracebacks, which name the files of this machine."""
    for node in graph.node:
        del node.metadata_props[:]
    values = (*graph.input, *graph.output, *graph.value_info)
    [symbol] = {dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim if dim.dim_param}
    for value in values:
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace(symbol, "batch")
