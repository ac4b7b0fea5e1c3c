"""safetensors: the weights, and the recipe that they belong to."""

from collections.abc import Sequence
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from lasnn import weights
from lasnn.export.exporter import Exporter, Reader, Sample
from lasnn.export.verification import observe
from lasnn.loaded_run import load_student_file
from lasnn.registry import exporters


@exporters.register("safetensors")
class SafetensorsExporter(Exporter):
    """The weights, with the recipe in the metadata; `lasnn.load_run(FILE)` gives the student back."""

    suffix = ".safetensors"

    def write(self, path: Path) -> None:
        weights.save_weights(path, self.student.network.state_dict(), self.description())

    @property
    def needs(self) -> list[str]:
        return [plugin.name for plugin in self.run.recipe.plugin_sources()]

    def readers(self, path: Path) -> Sequence[Reader]:
        # The plugins are where the run has them, whatever lies beside the file.
        loaded = load_student_file(path, self.run.recipe.folder).student
        # As a program would that has never heard of lasnn.
        loaded.network.load_state_dict(load_file(path))

        def run(sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
            encoder = loaded.encoder
            return observe(loaded, sample.encoded if encoder.random else encoder(sample.images, loaded.timesteps))

        return [Reader(f"safetensors {safetensors.__version__}", run, exact=True)]
