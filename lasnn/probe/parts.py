"""Whether a user's own neuron, encoder and augmentation do what a run asks of them, on small random inputs."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lasnn.data import Augmentation, Dataset
from lasnn.errors import UserError
from lasnn.factory import make_encoder
from lasnn.probe.answers import IMAGES, STEPS, random_images, said, same, two_answers
from lasnn.random import generator, keyed
from lasnn.recipe.schema import Recipe
from lasnn.registry import Entry, encoders, neurons, translate_errors

# Numbers that a part is tried on at the run's batch size; where it would be more, two images must do.
LARGEST = 2**22


def check_neuron(recipe: Recipe, constant: bool) -> None:
    """Run a user's own neuron: twice, and in two stretches of time; on a `constant` current where the encoder gives it.

    Raises:
        UserError: it is not what a student needs.
    """
    table = recipe.student.neuron
    entry = neurons[table.name]
    if not entry.own:
        return
    # Of a convolution's shape; around the usual thresholds.
    shape = (STEPS, IMAGES, 3, 4, 4)
    current = (2 * torch.rand(shape, generator=generator("probe", "current"))).requires_grad_()
    with keyed(recipe.seed, "probe"), translate_errors(entry):
        neuron = neurons.build(table.name, **table.options)
        takes = inspect.signature(neuron.forward).parameters if isinstance(neuron, nn.Module) else ()
        if "timesteps" not in takes:
            what = "takes no timesteps" if takes else "is no nn.Module with one"
            raise UserError(f"{entry.said} {what}; its forward() is forward(current, v0=None, timesteps=None)")
        neuron.eval()

        def run(current: Tensor, steps: int, **state: Any) -> tuple[Tensor, Any]:
            wanted = (steps, *current.shape[1:])
            return _neuron_output(entry, neuron(current, timesteps=steps, **state), wanted)

        spikes, last = run(current, STEPS)
        again, _ = run(current, STEPS)
        if not same(spikes, again):
            raise UserError(f"{entry.said} {two_answers(lambda: run(current, STEPS)[0])}")
        if not spikes.requires_grad:
            fix = "give the spikes a surrogate derivative, as lasnn.kernels.lif does"
            raise UserError(f"{entry.said} lets no gradient through: {fix}")
        if constant:
            run(current[:1], STEPS)
        if "v0" not in takes:
            return
        if last is None:
            raise UserError(f"{entry.said} takes v0 and returns nothing as the voltage after the last step")
        first, voltage = run(current[:2], 2)
        then, _ = run(current[2:], STEPS - 2, v0=voltage)
        if not same(torch.cat([first, then]), spikes):
            fix = "return all its state as the last voltage, or leave v0 out of forward()"
            raise UserError(f"{entry.said} does not go on from v0 as a run in one would: {fix}")


def _neuron_output(entry: Entry, returned: Any, wanted: Sequence[int]) -> tuple[Tensor, Any]:
    """Spikes and last voltage, as a neuron must return them."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        what = f"a tensor {list(returned.shape)}" if isinstance(returned, Tensor) else said(returned)
        raise UserError(f"{entry.said} returns {what}; return two: spikes [T, ...] and the voltage after the last step")
    spikes, last = returned
    if not isinstance(spikes, Tensor) or tuple(spikes.shape) != tuple(wanted):
        what = list(spikes.shape) if isinstance(spikes, Tensor) else said(spikes)
        fix = "as many steps as `timesteps` says, also where the current is constant, [1, ...]"
        raise UserError(f"{entry.said} returns spikes {what}; wanted are {list(wanted)}: {fix}")
    return spikes, last


def check_encoder(recipe: Recipe, data: Dataset) -> None:
    """Encode two images with a user's own encoder, twice.

    Raises:
        UserError: it returns another shape, or two answers.
    """
    entry = encoders[recipe.student.encoder_table.name]
    if not entry.own:
        return
    steps, images = min(STEPS, recipe.student.timesteps), random_images(data)
    with keyed(recipe.seed, "probe"), torch.no_grad():
        encoder = make_encoder(recipe, data).eval()
        with translate_errors(entry):

            def run() -> Any:
                return encoder(images, steps, generator("probe", "draws"))

            encoded, again = run(), run()
            wanted = [1 if encoder.constant else steps, *images.shape]
            if not isinstance(encoded, Tensor) or list(encoded.shape) != wanted or not encoded.is_floating_point():
                what = f"{list(encoded.shape)} of {encoded.dtype}" if isinstance(encoded, Tensor) else said(encoded)
                fix = "a float for each step, image, channel and pixel; constant = True says that all steps are one"
                raise UserError(f"{entry.said} returns {what}; wanted are {wanted}: {fix}")
            if not same(encoded, again):
                why = "draw from the generator that encode() is given, and keep nothing"
                raise UserError(f"{entry.said} gives two answers to one question: {why}")


def check_augmentation(augmentation: Augmentation, recipe: Recipe, data: Dataset) -> None:
    """Augment random images of the data's shape: two and, where a step is the user's, a batch.

    Raises:
        UserError: it fails, or returns something of another shape or type.
    """
    draws, classes = generator("try", "augment"), len(data.classes)
    own = any(entry.own for entry, _ in augmentation.steps)
    for count in batches_to_try(recipe, data.channels * data.height * data.width, own):
        images = torch.rand(count, data.channels, data.height, data.width, generator=draws)
        found, targets = augmentation(images, torch.arange(count) % classes, draws)
        for what, tensor, shape in (("images", found, images.shape), ("targets", targets, (count, classes))):
            wanted = [images.dtype, list(shape)]
            if what == "targets" and not augmentation.mixes:
                continue
            if not isinstance(tensor, Tensor):
                raise UserError(f"its {what} are {said(tensor)}; they must be {wanted[0]} {wanted[1]}")
            if [tensor.dtype, list(tensor.shape)] != wanted:
                said_of = f"{tensor.dtype} {list(tensor.shape)}"
                raise UserError(f"its {what} are {said_of}; they must be {wanted[0]} {wanted[1]}")


def batches_to_try(recipe: Recipe, an_image: int, own: bool) -> list[int]:
    """Numbers of images that a part is tried on: two, and those of a whole batch where that is cheap."""
    batch = recipe.data.batch_size
    return [IMAGES, *([batch] if own and batch != IMAGES and batch * an_image <= LARGEST else [])]
