"""Runs to export that no training made: random weights, with batch norms that let neurons fire."""

from pathlib import Path

import torch

from common import TINY_DATA

# Keys of [student.neuron].
NEURONS = {
    "lif": {"name": "lif"},
    "if": {"name": "if"},
    "plif": {"name": "plif", "tau": 1.7},
    "soft": {"name": "lif", "tau": 3.0, "reset": "soft", "threshold": 0.9},
    "decay": {"name": "lif", "tau": 1.5, "decay_input": True, "v_reset": -0.1, "threshold": 0.7},
}
# A ResNet in another residual style than its default is `NAME-STYLE`.
ARCHITECTURES = ("vgg5", "vgg9", "resnet19", "resnet20", "resnet20-sew", "resnet20-membrane", "spikformer")
ENCODERS = ("direct", "rate", "poisson")


def make_run(
    folder: Path, architecture="vgg5", encoder="direct", neuron="lif", timesteps=3, width=4, plugins=(), **student
):
    """A run folder on the tiny data set; returns its path."""
    from lasnn import weights
    from lasnn.factory import make_data, make_student
    from lasnn.recipe.schema import Recipe

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny_clothes.py").write_text(TINY_DATA)
    architecture, _, residual = architecture.partition("-")
    if residual:
        student["residual"] = residual
    # Its stem has an eighth of the width.
    width = 2 * width if architecture == "spikformer" else width
    tables = {
        "plugins": ["tiny_clothes.py", *plugins],
        "data": {"name": "tiny-clothes", "batch_size": 50},
        "student": {
            "architecture": architecture,
            "width": width,
            "encoder": encoder,
            "timesteps": timesteps,
            "neuron": NEURONS[neuron] if isinstance(neuron, str) else neuron,
            **student,
        },
    }
    recipe = Recipe.from_tables(tables, source=str(folder / "recipe.toml"))
    (folder / "recipe.toml").write_text(recipe.to_toml())
    torch.manual_seed(0)
    network = make_student(recipe, make_data(recipe)).network
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.02, 0.2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_(0.5, 0.5)
    weights.save_weights(folder / "student.safetensors", network.state_dict(), {"recipe": recipe.to_toml()})
    return folder
