"""A program that uses lasnn as a user does; `make types` checks with mypy, in strict mode, that all of it has types."""

from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

from lasnn import (
    Callback,
    Recipe,
    Staged,
    architectures,
    build,
    callbacks,
    distill,
    encoders,
    evaluate,
    load_run,
    losses,
)
from lasnn.data import Batches
from lasnn.errors import MachineError, UserError
from lasnn.kernels import BatchStatistics, attention_map, lif, norm_lif
from lasnn.loaded_run import Run
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import Act
from lasnn.run import RunFolder


@architectures.register("my-net")
def my_net(act: Act, *, in_channels: int, num_classes: int, width: int = 16) -> Staged:
    """Its decorator leaves the type of the function as it is."""
    stage = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), act(width))
    return Staged({"stage1": stage}, nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes)))


@losses.register("my-loss")
def my_loss(logits: Tensor, *, strength: float = 1.0) -> Tensor:
    """A loss."""
    return strength * logits.square().mean()


@callbacks.register("my-log")
class MyLog(Callback):
    """A callback."""

    def note(self, text: str) -> None:
        """Print it."""
        print(text)


def train() -> RunFolder:
    """Train, as a user does."""
    recipe = Recipe.load("quickstart", ["distill.epochs=1"])
    assert_type(recipe, Recipe)
    assert_type(recipe.student.timesteps, int)
    run = distill(recipe, Path("runs/mine"), overrides=["seed=1"], progress=MyLog(), callbacks=["tensorboard"])
    assert_type(run, RunFolder)
    assert_type(run.path, Path)
    assert_type(my_net(lambda channels=None: nn.ReLU(), in_channels=1, num_classes=2), Staged)
    assert_type(my_loss(torch.zeros(3)), Tensor)
    assert_type(list(encoders), list[str])
    return run


def measure(run: RunFolder) -> list[dict[str, Any]]:
    """Use what was trained."""
    loaded = load_run(run.path, device="auto")
    assert_type(loaded, Run)
    assert_type(loaded.student, Student)
    assert_type(loaded.teacher, Teacher | None)
    try:
        results = evaluate(loaded, timesteps=[1, 4], include_speed=False)
    except (UserError, MachineError) as error:
        raise SystemExit(str(error)) from error
    assert_type(results, list[dict[str, Any]])
    return results


def own_loop() -> None:
    """A training loop of one's own."""
    built = build("quickstart", train_teacher=True)
    optimizer = torch.optim.SGD([*built.student.parameters(), *built.objective.parameters()], lr=0.1)
    assert_type(built.batches(epoch=0), Batches)
    for step, (images, targets) in enumerate(built.batches(epoch=0)):
        optimizer.zero_grad()
        terms = built.objective(images, targets, epoch=0, step=step)
        terms["loss"].backward()
        optimizer.step()


def kernels() -> None:
    """The kernels on their own."""
    spikes, voltage = lif(torch.randn(4, 8, 16), tau=2.0)
    assert_type(spikes, Tensor)
    assert_type(voltage, Tensor)
    assert_type(attention_map(torch.randn(4, 8, 16, 5, 5)), Tensor)
    norm = nn.BatchNorm2d(16)
    fired, batch = norm_lif(torch.randn(32, 16, 5, 5), norm, timesteps=4)
    assert_type(fired, Tensor)
    assert_type(batch, BatchStatistics | None)
    fired, last, batch = norm_lif(torch.randn(32, 16, 5, 5), norm, timesteps=4, return_state=True)
    assert_type(last, Tensor)
