"""What running a recipe's parts once tells of mistakes in a user's own code, before there is data.

The plan calls it. Of every network it checks, on the meta device, where nothing is computed and no memory needed:

- each stage keeps the images apart and returns something, and the head returns logits [N, K] for the data's K classes;
- a stage that is paired gives a map [N, C, H, W], not tokens, a tuple, a dict, or a map with its channels last;
- the student has spiking units, each called once in a pass (it has one voltage).

Where a part is the user's own:

- there is something to learn, and gradients reach every stage that has parameters to train or is compared by a loss;
- on the CPU, two random images get the same answer twice: nothing keeps its state or draws in evaluation;
- a neuron returns spikes [T, ...] and the last voltage, lets gradients through, and goes on from `v0`;
- an encoder returns [T or 1, N, C, H, W];
- a loss returns one finite number that has a gradient, an augmentation images as it got them: of a whole batch, too.
"""

from lasnn.probe.losses import check_currents, check_losses, empty_losses, scheduled_losses, try_losses
from lasnn.probe.network import Probed, check_maps, on_meta, probe, real_values
from lasnn.probe.parts import check_augmentation
from lasnn.probe.recipe_networks import (
    ProbedNetwork,
    build_student,
    build_teacher,
    student_entry,
    teacher_entry,
    try_student,
    try_teacher,
)

__all__ = [
    "Probed",
    "ProbedNetwork",
    "build_student",
    "build_teacher",
    "check_augmentation",
    "check_currents",
    "check_losses",
    "check_maps",
    "empty_losses",
    "on_meta",
    "probe",
    "real_values",
    "scheduled_losses",
    "student_entry",
    "teacher_entry",
    "try_losses",
    "try_student",
    "try_teacher",
]
