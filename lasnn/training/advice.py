"""What to change where a student ends far below its teacher, and where a loss does nothing or drowns the labels."""

import math
from collections.abc import Iterable, Iterator, Mapping
from statistics import mean
from typing import Any

from lasnn.recipe.schema import Recipe
from lasnn.registry import losses

# Accuracy that a student may end below its teacher before anything is said.
FAR = 0.05
# Of the loss, for a term that leaves little to the labels.
MOST = 0.5
# Spikes per neuron and step below which a network is silent.
SILENT = 0.01
# Of the norm of cross-entropy's gradient: a term below the first does nothing, one above the second drowns the labels.
NOTHING, DROWNS = 0.01, 3.0
# What a term's share is raised to where it is to do something.
A_TENTH = 0.1


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
        found.append("leave student.init out: both have the same architecture, so that it starts from its teacher")
    found.append(f"raise distill.epochs ({recipe.distill.epochs})")
    found.append(f"raise student.timesteps ({recipe.student.timesteps})")
    return found


def drowned_labels(recipe: Recipe, epoch: Mapping[str, Any]) -> Iterable[str]:
    """Terms that say nothing of the class and make up most of the loss."""
    for number, loss in enumerate(recipe.losses):
        if not epoch["loss"] > 0 or says_the_class(losses[loss.name].inputs):
            continue
        share = loss.weight_in(epoch["epoch"], recipe.distill.epochs) * epoch["losses"][loss.name] / epoch["loss"]
        if share > MOST:
            yield f"lower losses.{number}.weight ({loss.weight:g}): {loss.name!r} makes up {share:.0%} of the loss"


def says_the_class(inputs: Iterable[str]) -> bool:
    """Whether a loss has these among its inputs: labels, or a teacher's logits that the student's are to learn."""
    return "targets" in inputs or {"logits", "teacher_logits"} <= set(inputs)


def term_notes(recipe: Recipe, metrics: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each term without the labels whose gradient, in the mean of the epochs that it is felt in, is next to
    nothing beside cross-entropy's, or drowns it. Learning a teacher's logits, which say the class too, drowns nothing.

    Args:
        recipe: the run's.
        metrics: of its epochs; those without diagnostics say nothing.
    """
    epochs = [line for line in metrics if line["phase"] == "student"]
    measured = {line["epoch"]: line.get("diagnostics", {}).get("gradient", {}) for line in epochs}
    for number, loss in enumerate(recipe.losses):
        inputs = losses[loss.name].inputs
        # They are of each epoch's first step.
        ratios = [
            found[loss.name]
            for epoch, found in measured.items()
            if found.get(loss.name) is not None and loss.weight_at((epoch - 1) / recipe.distill.epochs)
        ]
        if not ratios or "targets" in inputs:
            continue
        share, key = mean(ratios), f"losses.{number}.weight"
        if share == 0:
            yield f"{loss.name!r} does nothing: it has no gradient; leave it out, or compare other stages"
        elif share < NOTHING:
            fix = f"raise {key} from {loss.weight:g} to about {loss.weight * A_TENTH / share:.2g} for a tenth of that"
            yield f"{loss.name!r} does next to nothing: its gradient is {share:.2g} of cross-entropy's; {fix}"
        elif share > DROWNS and not says_the_class(inputs):
            fix = f"lower {key} from {loss.weight:g} to about {loss.weight / share:.2g}, to make them equal"
            yield f"{loss.name!r} drowns the labels: its gradient is {share:.2g} times cross-entropy's; {fix}"
