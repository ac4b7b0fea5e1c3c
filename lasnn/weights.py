"""Files of tensors, without pickled code: weights (safetensors, or what `torch.save` wrote) and states of trainings."""

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lasnn.errors import UserError
from lasnn.files import write

DIGEST_SIZE = hashlib.sha256().digest_size
TORCH_SAVED = (".pth", ".pt")
STATE_DICT_NAMES = ("state_dict", "model_state_dict", "model", "net")
SAVE_WEIGHTS = "save the weights alone: torch.save(network.state_dict(), file)"


def save_weights(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors; the metadata has its description as JSON (`lasnn`) and a digest of both."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    text = json.dumps(description)
    write(path, save(tensors, metadata={"lasnn": text, "digest": digest(tensors, text)}))


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text, then names, types, shapes and bytes, in the order of the names; of tensors on any device."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].cpu().contiguous()
        sha.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        sha.update(value.view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and their description ({} where the file has none), from safetensors or what `torch.save` wrote.

    Raises:
        UserError: it is not a whole file of weights, or it changed since it was saved.
    """
    if path.suffix in TORCH_SAVED:
        return _load_torch_saved(path, "cpu"), {}
    with translate_file_errors(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
        description = _description(metadata)
        # Files of before the digest covered their description have a "sha256", which is not checked any more.
        sealed = {"lasnn", "digest"} & metadata.keys() and "sha256" not in metadata
        if sealed and metadata.get("digest") != digest(weights, metadata.get("lasnn", "")):
            raise UserError(f"{path} is damaged: it is not what was saved")
    return weights, description


def weight_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The shape of each weight in a file, without reading the weights, and the file's description.

    Raises:
        UserError: it is not a file of weights.
    """
    if path.suffix in TORCH_SAVED:
        return {name: tuple(value.shape) for name, value in _load_torch_saved(path, "meta").items()}, {}
    with translate_file_errors(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes, _description(file.metadata() or {})


def _description(metadata: Mapping[str, str]) -> dict[str, Any]:
    description = json.loads(metadata.get("lasnn", "{}"))
    if not isinstance(description, dict):
        raise ValueError("its description is no JSON object")
    return description


@contextmanager
def translate_file_errors(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a parser raises within the block into a line that names the file: a broken or hostile one can make
    it raise anything.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds code, and is not {what}") from error
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not {what}: {reason}") from error


def _load_torch_saved(path: Path, device: str) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`: alone, or within a training state under one of the usual names."""
    with translate_file_errors(path, "a whole file of weights"):
        # Old files are no archives, and have no checksums.
        if device != "meta" and zipfile.is_zipfile(path):
            _check_archive(path)
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} holds more than weights, or is damaged; {SAVE_WEIGHTS}") from error
    outer = state
    if isinstance(state, Mapping):
        state = next((state[name] for name in STATE_DICT_NAMES if isinstance(state.get(name), Mapping)), state)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f" (its keys: {', '.join(map(str, list(outer)[:6]))})" if isinstance(outer, Mapping) else ""
        raise UserError(f"{path} holds no state_dict{keys}; {SAVE_WEIGHTS}")
    # What DataParallel puts before every name.
    parallel = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if parallel else name: value for name, value in state.items()}


def _check_archive(path: Path) -> None:
    """Find a flipped bit, which torch.load takes for a weight, by the archive's checksums."""
    with zipfile.ZipFile(path) as archive:
        # What is marked as a folder is not read by torch.load, which then takes what lies in memory for the weight.
        folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
        damaged = archive.testzip() or next(folders, None)
    if damaged is not None:
        raise UserError(f"{path} is damaged (checksum of {damaged})")


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the full state of a run: tensors and plain values only, with a digest of the whole file as its archive's
    comment, where `torch.load` looks past it.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    # The last two bytes of an archive are the length of its comment.
    content = buffer.getvalue()[:-2] + DIGEST_SIZE.to_bytes(2, "little")
    write(path, content + hashlib.sha256(content).digest())


def check_state(path: Path) -> None:
    """Check that a file is, to the last bit, what `save_state` wrote.

    Raises:
        UserError: it is not.
    """
    with translate_file_errors(path, "a whole checkpoint"):
        content = path.read_bytes()
        if hashlib.sha256(content[:-DIGEST_SIZE]).digest() != content[-DIGEST_SIZE:]:
            raise ValueError("it is damaged, or lasnn did not write it")


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        UserError: the file is damaged or holds code.
    """
    check_state(path)
    with translate_file_errors(path, "a whole checkpoint"):
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or not {"phase", "epoch", "step", "module"} <= state.keys():
            raise UserError(f"{path} is not the state of a run")
        return state
