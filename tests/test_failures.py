"""A run that a user's own code ends in the middle of an epoch: a line, and the state after the last whole step."""

import pytest
from test_distillation import digest, without_times

from lasnn import Callback, distill
from lasnn.errors import UserError

pytestmark = pytest.mark.usefixtures("cached_teachers")

# Each part fails at its third call after a file has appeared.
PLUGIN = """
from pathlib import Path
import torch
from torch import nn
from lasnn import Staged, architectures, augmentations, losses, neurons
from lasnn.neuron import LIF

FOLDER = Path({folder!r})
calls = 0

def count(file):
    global calls
    if (FOLDER / file).exists():
        calls += 1
        if calls == 3:
            raise KeyError("left")

@losses.register("own")
def own_loss(logits, targets):
    \"\"\"Cross-entropy.\"\"\"
    count("broken")
    return nn.functional.cross_entropy(logits.mean(0), targets)

@augmentations.register("own")
def own_augmentation(images):
    \"\"\"Nothing.\"\"\"
    count("broken")
    return images

class Gradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        count("broken_backward")
        return gradient

class Fragile(nn.Module):
    def forward(self, x):
        count("broken" if self.training else "broken_in_evaluation")
        return Gradient.apply(x)

@architectures.register("own")
def own_network(act, *, in_channels: int, num_classes: int) -> Staged:
    \"\"\"Two stages with batch norm.\"\"\"
    first = nn.Sequential(nn.Conv2d(in_channels, 4, 3, stride=2), act(4))
    second = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), Fragile(), act(4))
    return Staged({{"stage1": first, "stage2": second}}, nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, num_classes)))
"""


class Breaks(Callback):
    """Makes a file when the student's second epoch begins."""

    def __init__(self, file):
        self.file = file

    def epoch(self, phase, epoch, epochs, steps):
        if (phase, epoch) == ("student", 1):
            self.file.touch()


class Fails(Callback):
    def step(self, step, rate, sums, weights):
        raise LookupError("mine")


OWN_NETWORK = "student={architecture='own',timesteps=2}"
LEFT = r"KeyError: 'left' \(.*own.py:\d+\)"
PARTS = {
    "loss": ("broken", ['losses=[{name="own"}]'], r"loss 'own' \(.*own.py:\d+\) failed: " + LEFT),
    "augmentation": ("broken", ['data.augment=["own"]'], r"augmentation 'own' .*failed: " + LEFT),
    "network": ("broken", [OWN_NETWORK], "student epoch 2, step 3: " + LEFT),
    "backward": ("broken_backward", [OWN_NETWORK], "student epoch 2, step 3: " + LEFT),
    "evaluation": ("broken_in_evaluation", [OWN_NETWORK, "data.batch_size=40"], "student epoch 2, evaluation: " + LEFT),
}


@pytest.mark.parametrize("part", PARTS)
def test_own_code_that_fails_costs_no_step(part, tiny):
    file, settings, message = PARTS[part]
    (tiny.parent / "own.py").write_text(PLUGIN.format(folder=str(tiny.parent)))
    settings = ["distill.epochs=2", "teacher.epochs=1", 'plugins=["tiny_clothes.py","own.py"]', *settings]
    if part != "loss":
        settings.append('losses=[{name="cross-entropy"}]')
    whole = distill(tiny, "whole", overrides=settings)

    with pytest.raises(UserError, match=message) as failed:
        distill(tiny, "out", overrides=settings, progress=Breaks(tiny.parent / file))
    assert "\n" not in str(failed.value)
    (tiny.parent / file).unlink()

    notes = []
    told = Callback()
    told.note = notes.append
    run = distill(tiny, "out", overrides=settings, resume=True, progress=told)
    where = "the evaluation of epoch 2" if part == "evaluation" else "epoch 2, step 3"
    assert f"resuming the student at {where}" in notes
    assert digest(run / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(run.metrics()) == without_times(whole.metrics())


def test_what_a_callback_in_python_raises_is_its_callers(tiny):
    """It may be how a program ends a run."""
    with pytest.raises(LookupError, match="mine"):
        distill(tiny, "out", overrides=["teacher.epochs=1"], progress=Fails())
