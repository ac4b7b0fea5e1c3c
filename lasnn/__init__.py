"""lasnn: layer-wise knowledge distillation from a trained ANN into a spiking neural network.

The public names below are the map of the library. They are resolved on first use (PEP 562), so that
`import lasnn` and the command line's `--help` do not pay for importing PyTorch.
"""

from importlib import import_module

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
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lasnn' has no attribute {name!r}; it has: {', '.join(sorted(_HOMES))}")


def __dir__():
    return sorted({*globals(), *__all__})
