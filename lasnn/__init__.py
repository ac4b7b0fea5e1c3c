"""lasnn: layer-wise knowledge distillation from a trained ANN into a spiking neural network.

The public names below are the map of the library. They are resolved on first use (PEP 562), so that
`import lasnn` and the command line's `--help` do not pay for importing PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lasnn.callback import Callback
    from lasnn.evaluation.evaluate import evaluate
    from lasnn.loaded_run import load_run
    from lasnn.network.staged import Staged
    from lasnn.recipe.schema import Recipe
    from lasnn.registry import (
        architectures,
        augmentations,
        callbacks,
        datasets,
        encoders,
        exporters,
        losses,
        neurons,
        teachers,
    )
    from lasnn.training.build import build
    from lasnn.training.distill import distill

__version__ = "0.1.0"

_HOMES = {
    "architectures": "lasnn.registry",
    "augmentations": "lasnn.registry",
    "datasets": "lasnn.registry",
    "encoders": "lasnn.registry",
    "callbacks": "lasnn.registry",
    "exporters": "lasnn.registry",
    "losses": "lasnn.registry",
    "neurons": "lasnn.registry",
    "teachers": "lasnn.registry",
    "Callback": "lasnn.callback",
    "Recipe": "lasnn.recipe.schema",
    "Staged": "lasnn.network.staged",
    "build": "lasnn.training.build",
    "distill": "lasnn.training.distill",
    "evaluate": "lasnn.evaluation.evaluate",
    "load_run": "lasnn.loaded_run",
}
# Written out, for type checkers; a test holds them together.
__all__ = [
    "Callback",
    "Recipe",
    "Staged",
    "__version__",
    "architectures",
    "augmentations",
    "build",
    "callbacks",
    "datasets",
    "distill",
    "encoders",
    "evaluate",
    "exporters",
    "load_run",
    "losses",
    "neurons",
    "teachers",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lasnn' has no attribute {name!r}; it has: {', '.join(sorted(_HOMES))}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
