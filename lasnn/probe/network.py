"""Whether a network is what a run needs: its stages, its logits, its spikes, its gradients, its answers.

Shapes: N images times time steps, C channels, H x W pixels, K classes, L tokens.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lasnn.compatibility import Shape
from lasnn.data import Dataset
from lasnn.errors import UserError
from lasnn.memory import NO_VALUES
from lasnn.network.staged import CURRENT, Staged
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import NormSpike
from lasnn.network.whole import WholeView, version_of
from lasnn.probe.answers import IMAGES, kind, random_images, said, same, two_answers
from lasnn.random import generator, keyed
from lasnn.recipe.schema import Recipe
from lasnn.registry import Entry, raised_at, translate_errors


@contextmanager
def on_meta() -> Iterator[None]:
    """Build within the block on the meta device, pretrained weights that a plugin loads as well: those are not copied,
    and PyTorch's line about each of them is kept back.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        yield


# How what has so many dimensions becomes a map.
MAPS = {2: "what comes before it is flattened", 3: "x.transpose(1, 2).unflatten(2, (h, w)) of the patches' tokens"}
Model = TypeVar("Model", bound=nn.Module)


def without_data(model: Model) -> Model:
    """A network that was built on the meta device, whole there: a plugin may have loaded weights of its own."""
    elsewhere = any(not value.is_meta for value in (*model.parameters(), *model.buffers()))
    return model.to("meta") if elsewhere else model


@dataclass
class Probed:
    """What the stages of a network return.

    Args:
        shapes: (C, H, W) of each that gives a map.
        others: what each other gives, and how it becomes a map, in words.
        silent: those in which no unit spikes.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    others: dict[str, tuple[str, str]] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)


def probe(
    network: Staged,
    image: tuple[int, int, int],
    timesteps: int = 1,
    *,
    classes: int | None = None,
    entry: Entry | None = None,
) -> Probed:
    """Run two images through a network on the meta device.

    Args:
        network: on the meta device.
        image: C, H, W of the input.
        classes: K, where the logits are to be checked.
        entry: the registered part that it was built from, for messages.

    Raises:
        UserError: a stage cannot run or returns something else than a tensor of every image; it is named.
    """
    who = f"{entry.said}: " if entry and entry.own else ""
    mode, calls = network.training, Calls(network)
    network.eval()
    found = Probed()
    with calls:
        for name, x in _walk(network, image, timesteps, who):
            if name == "head":
                _check_logits(x, classes, who)
            elif name != "stem":
                if isinstance(x, Tensor) and x.ndim == 4:
                    found.shapes[name] = tuple(x.shape[1:])
                else:
                    found.others[name] = said(x), MAPS.get(getattr(x, "ndim", 0), "its map alone")
                if not any(unit.startswith(f"{name}.") or unit == name for unit in calls.made):
                    found.silent.append(name)
        if twice := [unit for unit, count in calls.made.items() if count > 1]:
            raise UserError(
                f"{who}its spiking unit {twice[0]} is called {calls.made[twice[0]]} times in a pass, which would share "
                "one voltage: call act() once for each place"
            )
    if who:
        for name in _channels_last(network, image, timesteps, found.shapes):
            height, width, channels = found.shapes.pop(name)
            what = f"a map with its channels last, [N, {height}, {width}, {channels}]"
            found.others[name] = what, "x.permute(0, 3, 1, 2)"
    network.train(mode)
    return found


def _walk(network: Staged, image: tuple[int, int, int], timesteps: int, who: str) -> Iterator[tuple[str, Any]]:
    """(name, what it returns) of stem, stages and head in turn, for two images on the meta device."""
    channels, height, width = image
    network.time.steps, network.time.batch = timesteps, IMAGES
    x: Any = torch.empty(IMAGES, channels, height, width, device="meta")
    if isinstance(network, WholeView):
        with _at_size("", image, x, who):
            logits, features = network.outputs(x, network.stage_names)
        yield from features.items()
        yield "head", logits
        return
    before, version = "", 0
    for name in ("stem", *network.stage_names, "head"):
        given = x
        with _at_size(name, image, x, who):
            x = getattr(network, name)(x)
        if before in network.stage_names and version_of(given) != version:
            raise UserError(
                f"{who}{name} changes in place what {before} returned, which a loss would then be given: set inplace "
                f"to False in what {name} begins with, or count it to {before}"
            )
        if isinstance(x, Tensor) and (x.ndim == 0 or len(x) not in (IMAGES, timesteps * IMAGES)):
            raise UserError(
                f"{who}{name} returns {list(x.shape)} for {IMAGES} images x {timesteps} steps: its first dimension "
                "must stay theirs (nn.Flatten() and x.flatten(1) keep it)"
            )
        if x is None:
            raise UserError(f"{who}{name} returns nothing; does its forward() end in a return?")
        before, version = name, version_of(x)
        yield name, x


@contextmanager
def _at_size(name: str, image: tuple[int, int, int], given: Any, who: str) -> Iterator[None]:
    """Say of what fails within the block that the network cannot run on such images, in which part and why."""
    try:
        with torch.no_grad():
            yield
    except UserError:
        raise
    except Exception as error:
        # What is not the size's fault is a bug, unless it is the user's code.
        of_the_size = isinstance(error, (RuntimeError, ValueError, AssertionError))
        if not who and not of_the_size:
            raise
        reason = str(error).partition("\n")[0]
        reason = reason if of_the_size and reason else f"{type(error).__name__}: {reason}".removesuffix(": ")
        at = f"{f'{name}: ' if name else ''}{reason}{raised_at(error) if who else ''}{_hint(name, given, reason)}"
        raise UserError(f"{who}the network cannot run on {image[1]} x {image[2]} images ({at})") from error


def _hint(name: str, given: Any, reason: str) -> str:
    """The likeliest fix of what PyTorch says of shapes and devices."""
    shape = f"[N, {', '.join(map(str, given.shape[1:]))}]" if isinstance(given, Tensor) else f"a {kind(given)}"
    # The second is what the meta device says.
    if "mat1 and mat2 shapes" in reason or "same reduction dim" in reason:
        who = name or "the network"
        return f"; {who} is given {shape}: is an nn.Flatten() missing, or in_features of an nn.Linear another?"
    if "meta" in reason and ("device" in reason or "Cannot copy" in reason or "item()" in reason):
        return "; make tensors on the input's device, or register them as buffers, and do not read values in forward()"
    return "" if isinstance(given, Tensor) else f"; it is given {shape}"


def _check_logits(x: Any, classes: int | None, who: str) -> None:
    wanted = "logits [N, K] of each image" if classes is None else f"logits [N, {classes}], one of each class"
    if isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point() and classes in (None, x.shape[1]):
        return
    if not isinstance(x, Tensor):
        fix = "return that tensor alone"
    elif x.ndim != 2:
        fix = "end it with nn.Flatten() and nn.Linear(..., num_classes)"
    elif not x.is_floating_point():
        fix = "return what comes before argmax and rounding"
    else:
        fix = "give its last layer num_classes outputs"
    raise UserError(f"{who}head returns {said(x)}; it must return {wanted}: {fix}")


def _channels_last(
    network: Staged, image: tuple[int, int, int], timesteps: int, shapes: Mapping[str, Shape]
) -> list[str]:
    """The stages whose maps are [N, H, W, C]: with a taller image the first of the three grows, not the second.

    Where the network takes no other size, those whose first two sides are the image's and whose last two are not.
    """
    channels, height, width = image
    taller: dict[str, Shape] = {}
    try:
        for name, x in _walk(network, (channels, 2 * height, width), timesteps, "?"):
            if isinstance(x, Tensor) and x.ndim == 4:
                taller[name] = tuple(x.shape[1:])
    except UserError:
        pass

    def alike(sides: Sequence[int]) -> bool:
        return abs(sides[0] * width - sides[1] * height) < max(height, width)

    found = []
    for name, shape in shapes.items():
        if name in taller:
            grows = [one != other for one, other in zip(shape, taller[name], strict=True)]
            last = grows == [True, False, False]
        else:
            last = alike(shape[:2]) and not alike(shape[1:])
        if last:
            found.append(name)
    return found


def check_maps(stages: Iterable[str], probed: Probed, entry: Entry) -> Iterator[str]:
    """A line for each of the paired stages of a network that gives no map."""
    for stage in stages:
        if stage in probed.others:
            what, fix = probed.others[stage]
            yield (
                f"{entry.said}: {stage} returns {what}; a paired stage returns a map [N, C, H, W]: return {fix}, or "
                "leave it out of distill.pairs (pairs = [] compares none)"
            )


def stages_without_current(network: Staged, image: tuple[int, int, int], stages: Iterable[str]) -> Iterator[str]:
    """A line for each of the stages of a network on the meta device that does not end in a unit, and has no current."""
    mode = network.training
    network.eval()
    for stage in dict.fromkeys(stages):
        try:
            with torch.no_grad(), on_meta():
                network(torch.empty(1, IMAGES, *image), taps=[stage + CURRENT])
        except UserError as error:
            yield str(error)
    network.train(mode)


class Calls:
    """Counts how often each spiking unit of a network is called within the block, by its name."""

    def __init__(self, network: Staged):
        self.units = [module for module in network.modules() if isinstance(module, NormSpike)]
        self.made: dict[str, int] = {}

    def __enter__(self) -> "Calls":
        def count(unit: NormSpike, *_: object) -> None:
            self.made[unit.name] = self.made.get(unit.name, 0) + 1

        self.hooks = [unit.register_forward_hook(count) for unit in self.units]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def check_spikes(network: Staged, entry: Entry) -> None:
    """Check that a student spikes at all.

    Raises:
        UserError: it has no spiking unit.
    """
    if not any(isinstance(module, NormSpike) for module in network.modules()):
        left = activations_in(network)
        instead = f" where {left[0]} stands" if left else " behind its convolutions"
        raise UserError(f"{entry.said}: there is no spiking unit in it: put act(channels){instead}")


def activations_in(network: Staged) -> list[str]:
    """The activations of real values in a student, `stage1.1 (ReLU)` each."""
    inner = {id(part) for unit in network.modules() if isinstance(unit, NormSpike) for part in unit.modules()}
    kinds = vars(nn.modules.activation).values()
    return [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if type(module) in kinds and not isinstance(module, nn.MultiheadAttention) and id(module) not in inner
    ]


def real_values(network: Staged, probed: Probed) -> list[str]:
    """The line about what a student passes on that are no spikes, where there is something."""
    parts = activations_in(network)
    for stage in probed.silent:
        learns = any(True for _ in getattr(network, stage).parameters())
        if learns and not any(part.startswith((f"{stage}.", f"{stage} ")) for part in parts):
            parts.append(f"{stage} (no spiking unit)")
    if not parts:
        return []
    return [
        f"real     {', '.join(parts)}: no spikes but real values go on from there; the energy counts multiplications"
    ]


def check_gradients(
    network: Staged, image: tuple[int, int, int], timesteps: int, taps: Iterable[str], entry: Entry
) -> None:
    """Check that there is something to learn, and that gradients reach it.

    Args:
        network: on the meta device.
        image: C, H, W of the input.
        taps: the stages whose features a loss compares.
        entry: the user's part in it, which is blamed.

    Raises:
        UserError: they do not; the stage is named.
    """
    who = entry.said
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        count = sum(1 for _ in network.parameters())
        why = f"all its {count} parameters are frozen; set requires_grad = True" if count else "it has no parameters"
        raise UserError(f"{who}: there is nothing to learn in it: {why}")
    cut = "detach(), torch.no_grad(), .data, or a comparison or rounding without a surrogate derivative cuts it"
    mode = network.training
    reached: set[int] = set()
    unreached: list[str] = []
    # What a pass in training leaves out by chance, as stochastic depth does, one in evaluation has.
    for training in (True, False):
        try:
            with keyed("probe"), translate_errors(entry), on_meta():
                logits, features = network.train(training)(torch.empty(1, IMAGES, *image), timesteps, tuple(taps))
                for name, value in {**features, "head": logits}.items():
                    if not value.requires_grad:
                        fix = f"; where {name} is frozen on purpose, leave it out of distill.pairs"
                        raise UserError(
                            f"{who}: what {name} returns has no gradient: {cut}{'' if name == 'head' else fix}"
                        )
                summed = sum(value.sum() for value in (logits, *features.values()))
                gradients = torch.autograd.grad(summed, parameters, allow_unused=True)
        except UserError as error:
            if training and NO_VALUES in str(error):
                # What it has drawn.
                continue
            raise
        finally:
            network.train(mode)
        reached |= {id(one) for one, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        unreached = []
        for name, modules in network.modules_by_part().items():
            own = {id(one) for module in modules.values() for one in module.parameters() if one.requires_grad}
            if own and not own & reached:
                unreached.append(name)
        if not unreached:
            return
    raise UserError(f"{who}: no gradient reaches {unreached[0]}, which has parameters to train: {cut}")


def check_answers(recipe: Recipe, data: Dataset, model: Student | Teacher, stages: Iterable[str], who: Entry) -> None:
    """Ask a network the same question twice, with the weights that its own code gives it.

    Args:
        model: on the CPU.
        stages: those whose features are compared.
        who: the user's part in it, which is blamed.

    Raises:
        UserError: it fails, or gives two answers; the first stage that does is named.
    """
    images = random_images(data)
    stages = tuple(stages)

    def ask() -> dict[str, Tensor]:
        if isinstance(model, Teacher):
            logits, features = model.taps(images, stages)
        else:
            logits, features = model.steps(images, stages, generator("probe", "draws"))
        return {**features, "head": logits}

    model.eval()
    with keyed(recipe.seed, "probe"), torch.no_grad(), translate_errors(who):
        first, second = ask(), ask()
        for name in (*stages, "head"):
            if not same(first[name], second[name]):
                raise UserError(f"{who.said}: {name} {two_answers(lambda name=name: ask()[name])}")
