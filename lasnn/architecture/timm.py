"""timm's networks as teachers (the extra `lasnn[timm]`).

A weights file keeps timm's keys. The stages are what timm's `forward_intermediates` gives: maps [B, C, H, W], the
patches of transformers too. Size, interpolation, mean and deviation of the images are those of timm's data
configuration, on the whole picture: timm's evaluation crops the middle of a larger one. From version 1.0.24 on
transformers are built without data, as a plan needs them.
"""

import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lasnn.architecture.images import Colour, Deviation, Fit, Pixels, check_normalisation
from lasnn.errors import UserError
from lasnn.network.whole import WholeView
from lasnn.registry import teachers

# Of so many intermediates at most the last are the stages: a stem may be the first. Of more, as of a transformer's
# blocks, as many evenly spaced ones.
FEW, STAGES = 6, 4


class IntermediatesView(WholeView):
    """A network of timm with the stages that `forward_intermediates` gives.

    Args:
        network: of timm, with that method.
        stages: name -> the path of the module, as timm's `feature_info` has it.
        indices: which intermediates the stages are.
        fit: what resizes the images.
        mean, std: as for `WholeView`.
    """

    def __init__(
        self, network: nn.Module, stages: dict[str, str], indices: Sequence[int], fit: Fit, **normalisation: Any
    ):
        super().__init__(network, stages, **normalisation)
        self.indices = dict(zip(stages, indices, strict=True))
        object.__setattr__(self, "fit", fit)

    def outputs(self, x: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = sorted({self.indices[name] for name in taps if name in self.indices})
        if not wanted:
            return self.network(self.fit(x)), {}
        last, found = self.network.forward_intermediates(self.fit(x), indices=wanted, output_fmt="NCHW")
        features = dict(zip(wanted, found, strict=True))
        named = {name: features[self.indices[name]] for name in self.stage_names if name in taps}
        return self.network.forward_head(last), named


@teachers.register("timm")
def timm(
    *,
    in_channels: int,
    num_classes: int,
    model: str,
    pretrained: bool = False,
    indices: list[int] | None = None,
    resize: Pixels | None = None,
    repeat_grey: bool = True,
    mean: Colour = None,
    std: Deviation = None,
) -> IntermediatesView:
    """A network of timm, by the name of its `model`; weights files keep timm's keys.

    `pretrained` fetches timm's weights for that name, where there is a network, and freezes them; they must know the
    data's classes. `indices` says which of timm's intermediates are stage1, stage2, ...; left out, the last four, or
    four evenly spaced ones where there are more than six. Images are resized to timm's size for the model, or to
    `resize` pixels, and normalised as timm does, or by `mean` and `std`. Those of one channel are repeated to three,
    unless `repeat_grey` is false; the first layer takes as many channels as the images have then.

    Raises:
        UserError: timm is not installed or does not know the model, an option does not suit it, its weights cannot be
            had, or its family does not give intermediates.
    """
    try:
        import timm as library
    except ImportError as error:
        raise UserError(f"'timm' is not installed here ({error}): pip install 'lasnn[timm]'") from None

    channels = 3 if in_channels == 1 and repeat_grey else in_channels
    check_normalisation(mean, std, (in_channels, channels))
    if not library.is_model(model):
        raise UserError(_unknown_model(library, model))
    given = {"num_classes": num_classes, "in_chans": channels}
    config = _config(library, model)
    size = (resize, resize) if resize else tuple(config["input_size"][1:])
    if config["fixed_input_size"] and size != tuple(config["input_size"][1:]):
        given["img_size"] = size
    if pretrained and config["num_classes"] != num_classes:
        raise UserError(
            f"model = {model!r}: its weights were trained for {config['num_classes']} classes; the data set has "
            f"{num_classes}: train its last layer anew with {num_classes} outputs, and give that file as checkpoint"
        )
    network = _create(library, model, pretrained, given)
    if not hasattr(network, "forward_intermediates"):
        raise UserError(
            f"model = {model!r}: {type(network).__name__} has no forward_intermediates in timm {library.__version__}, "
            "which its stages are taken by; a plugin that returns the network can name them in teacher.stages"
        )
    paths = [info["module"] for info in network.feature_info]
    chosen = _indices(model, indices, paths)
    if mean is None and channels == len(config["mean"]):
        mean, std = config["mean"], config["std"]
    stages = {f"stage{number}": paths[index] for number, index in enumerate(chosen, start=1)}
    mode = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
    view = IntermediatesView(network, stages, chosen, Fit(channels, size, mode), mean=mean, std=std)
    return view.requires_grad_(False) if pretrained else view


def _config(library: Any, model: str) -> dict[str, Any]:
    """timm's data configuration of a model, with its number of classes and whether its size is fixed."""
    from timm.data import resolve_data_config

    try:
        known = library.get_pretrained_cfg(model, allow_unregistered=False).to_dict()
    except RuntimeError as error:
        raise UserError(_unknown_model(library, model)) from error
    found = resolve_data_config(pretrained_cfg=known)
    return {**found, **{key: known.get(key) for key in ("num_classes", "fixed_input_size")}}


def _create(library: Any, model: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    if not pretrained:
        try:
            return library.create_model(model, **given)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            asked = ", ".join(f"{name} = {value}" for name, value in given.items())
            raise UserError(f"model = {model!r} cannot be built with {asked}: {_first_line(error)}") from error
    # What is fetched is read on the CPU, wherever the network is wanted: timm reshapes some of it.
    device = torch.get_default_device()
    try:
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = library.create_model(model, pretrained=True, **given)
    except Exception as error:
        raise UserError(
            f"pretrained = true: the weights of {model!r} cannot be had here ({_first_line(error)}); fetch them where "
            "there is a network, and give their file as checkpoint"
        ) from error
    return network.to(device)


def _indices(model: str, indices: list[int] | None, paths: list[str]) -> list[int]:
    """Which of a model's intermediates are its stages."""
    count = len(paths)
    if indices is None:
        if count <= FEW:
            return list(range(count))[-STAGES:]
        return [(number + 1) * count // STAGES - 1 for number in range(STAGES)]
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong or not indices or len(set(indices)) < len(indices):
        known = ", ".join(f"{index} {path}" for index, path in enumerate(paths))
        raise UserError(f"indices = {indices}: give numbers of {model!r}'s intermediates, each once: {known}")
    return indices


def _unknown_model(library: Any, model: str) -> str:
    """The line for a name that timm does not know: the nearest ones."""
    arch = model.partition(".")[0]
    tags = library.list_pretrained(f"{arch}.*") if library.is_model(arch) else []
    known = tags or library.list_models()
    near = get_close_matches(model, known, n=3, cutoff=0.5) or tags[:3]
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ";"
    every = f"timm.list_models() has all {len(library.list_models()):,}"
    return f"unknown model {model!r} of timm {library.__version__}{hint} {every}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
