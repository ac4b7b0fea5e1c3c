"""Weights that users bring: files of `torch.save` or safetensors from any program, read without running code in them.

A training script saves its weights within other things, under a name of its choice. They are looked for two levels
deep, under the usual names first; what is left out is said, never guessed.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lasnn.errors import UserError, printable
from lasnn.file_kind import SAFETENSORS, ZIP, kind_of
from lasnn.numpy_pickle import STAND_INS, PickledArray
from lasnn.weights import load_weights, translate_file_errors

SAVE_WEIGHTS = "save the weights alone: torch.save(network.state_dict(), file)"
# Where training scripts keep the weights, the most usual first. DeepSpeed's is "module", basicsr's "params".
USUAL_NAMES = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "model_state",
    "net_state_dict",
    "model_weights",
)
# Of an average over the training: timm's state_dict_ema, torchvision's model_ema, YOLO's ema, SWA's.
AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?|avg)(_|$)")
QUANTISED = ("_packed_params", "zero_point")


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Args:
        weights: name -> tensor on the CPU, as the file has them.
        description: what lasnn wrote of the network; {} in a file of others.
        notes: what was chosen or left out, a line each.
    """

    weights: dict[str, Tensor]
    description: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the weights in a file of any ending, by its content.

    Raises:
        UserError: it holds none, is damaged, or could be read only by running code that is in it.
    """
    with translate_file_errors(path, "a whole file of weights"):
        kind = kind_of(path)
    if kind == SAFETENSORS:
        return Checkpoint(*load_weights(path))
    with translate_file_errors(path, "a whole file of weights"):
        if kind == ZIP:
            # Old files are no archives, and have no checksums.
            _check_archive(path)
        try:
            # As an open file: a path that ends in .safetensors is taken for one by torch.load.
            with torch.serialization.safe_globals(STAND_INS), path.open("rb") as file:
                saved = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f" ({named[1]})" if named else ""
            raise UserError(f"{path} holds more than weights{what}, or is damaged; {SAVE_WEIGHTS}") from error
    found, notes = _choose(path, saved)
    return Checkpoint(*_tensors(found, notes))


def _check_archive(path: Path) -> None:
    """Find a flipped bit, which torch.load takes for a weight, by the archive's checksums."""
    with zipfile.ZipFile(path) as archive:
        # What is marked as a folder is not read by torch.load, which then takes what lies in memory for the weight.
        folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
        damaged = archive.testzip() or next(folders, None)
    if damaged is not None:
        raise UserError(f"{path} is damaged (checksum of {damaged})")


def _is_state(value: Any) -> bool:
    """Whether it is a state dict: names and tensors, at least one with a dimension, and perhaps plain values."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    plain = (Tensor, PickledArray, int, float, str, bytes, type(None))
    return all(isinstance(item, plain) for item in value.values()) and any(map(_is_weight, value.values()))


def _is_weight(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.ndim > 0) or (
        isinstance(value, PickledArray) and value.value is not None and value.value.ndim > 0
    )


def _states(saved: Any, deepest: int = 2) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """(names that lead there, state dict) of every state dict in nested mappings."""
    if _is_state(saved):
        yield (), saved
    elif isinstance(saved, Mapping) and deepest:
        for name, inner in saved.items():
            for place, state in _states(inner, deepest - 1):
                yield (str(name), *place), state


def _choose(path: Path, saved: Any) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict that is meant, with a note where it was a choice.

    Raises:
        UserError: there is none, or several without a usual name.
    """
    states = dict(_states(saved))
    if not states:
        if isinstance(saved, Mapping) and any(str(name).rpartition(".")[2] in QUANTISED for name in saved):
            raise UserError(f"{path} holds quantised weights; give those from before the quantisation, in fp32")
        keys = f"its keys: {_named(saved, 6, quote=False)}" if isinstance(saved, Mapping) else type(saved).__name__
        raise UserError(f"{path} holds no state_dict ({keys}); {SAVE_WEIGHTS}")
    usual = [place for place in states if place and any(name in USUAL_NAMES for name in place)]
    averaged = [place for place in states if any(AVERAGED.search(name) for name in place)]
    raw = sorted((place for place in usual if place not in averaged), key=_rank)
    places = raw or averaged or list(states)
    if not raw and len(places) > 1:
        these = _named([".".join(place) for place in places], 6)
        fix = "save the one that is meant: torch.save(torch.load(FILE)[NAME], NEW)"
        raise UserError(f"{path} holds several state dicts ({these}): {fix}")
    chosen, notes = places[0], []
    others = [".".join(place) for place in states if place != chosen and place in (*raw, *averaged)]
    if others:
        kind = "averaged" if chosen in averaged else "raw" if set(averaged) & set(states) else "usual"
        fix = "to take others, save them in a file of their own"
        notes.append(f"{path.name}: the {kind} weights, {'.'.join(chosen)!r}, are taken, not {_named(others)}; {fix}")
    elif chosen in averaged:
        notes.append(f"{path.name}: the weights are averaged ones, {'.'.join(chosen)!r}; there are no others")
    elif chosen and chosen not in usual:
        notes.append(f"{path.name}: the weights are those under {'.'.join(chosen)!r}; there are no others")
    return states[chosen], notes


def _rank(place: tuple[str, ...]) -> tuple[int, int]:
    """What comes first of several: the shallowest, then the most usual name."""
    return len(place), min(USUAL_NAMES.index(name) for name in place if name in USUAL_NAMES)


def _tensors(state: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Tensor], dict, tuple[str, ...]]:
    """The tensors of a state dict; arrays become tensors, plain values beside them are left out."""
    weights, plain, arrays = {}, [], []
    for name, value in state.items():
        if isinstance(value, PickledArray) and value.value is not None:
            weights[name] = torch.from_numpy(value.value)
            arrays.append(name)
        elif isinstance(value, Tensor):
            weights[name] = value.detach()
        else:
            plain.append(name)
    if arrays:
        notes.append(f"{len(arrays)} NumPy arrays read as weights")
    if plain:
        notes.append(f"left out what is no tensor: {_named(plain)}")
    return weights, {}, tuple(notes)


def _named(names: Any, most: int = 3, quote: bool = True) -> str:
    """The first few names and how many more there are, as part of a line."""
    names = list(names)
    said = [printable(repr(name) if quote else str(name), 60) for name in names[:most]]
    return ", ".join(said) + (f" and {len(names) - most} more" if len(names) > most else "")
