"""What to change where a student ends far below its teacher."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lasnn.recipe.schema import Recipe
from lasnn.registry import losses

# Accuracy that a student may end below its teacher before anything is said.
FAR = 0.05
# Of the loss, for a term that leaves little to the labels.
MOST = 0.5
# Spikes per neuron and step below which a network is silent.
SILENT = 0.01


def advice(recipe: Recipe, summary: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """What to try, the likeliest cause first; nothing where the student is near its teacher, or has none.

    Args:
        recipe: the run's.
        summary: its accuracy, teacher_accuracy, firing_rate and the number of test images.
        metrics: of its epochs.
    """
    accuracy, teacher = summary["accuracy"], summary["teacher_accuracy"]
    if teacher is None:
        return []
    # Three standard errors of the teacher's accuracy: a few test images say little.
    noise = 3 * math.sqrt(teacher * (1 - teacher) / summary["images"])
    if teacher - accuracy < max(FAR, noise):
        return []
    epochs = [line for line in metrics if line["phase"] == "student"]
    found = [*drowned_labels(recipe, epochs[-1])] if epochs else []
    if summary["firing_rate"] < SILENT:
        found.append(f"lower student.neuron.threshold: only {summary['firing_rate']:.4f} spikes per neuron and step")
    if recipe.student.init == "random" and recipe.twins:
        found.append('set student.init = "teacher": both have the same architecture')
    found.append(f"raise distill.epochs ({recipe.distill.epochs})")
    found.append(f"raise student.timesteps ({recipe.student.timesteps})")
    return found


def drowned_labels(recipe: Recipe, epoch: Mapping[str, Any]) -> Iterable[str]:
    """Terms without the labels that make up most of the loss."""
    for number, loss in enumerate(recipe.losses):
        if "targets" in losses[loss.name].inputs or not epoch["loss"] > 0:
            continue
        share = loss.weight_in(epoch["epoch"], recipe.distill.epochs) * epoch["losses"][loss.name] / epoch["loss"]
        if share > MOST:
            yield f"lower losses.{number}.weight ({loss.weight:g}): {loss.name!r} makes up {share:.0%} of the loss"
