"""Files of tensors that lasnn writes, without pickled code: weights (safetensors) and states of trainings."""

import hashlib
import io
import json
import pickle
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
# What a description with a digest in it has, whatever the key that it stands under.
SEALED = '"digest": "'


def save_weights(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors, the same bytes for the same weights and description.

    The metadata has one key, `lasnn`: the description as JSON, with a `digest` of it and of the weights. It is one key
    because safetensors writes several in random order. Weights that share memory are written once for each name.
    """
    tensors, seen = {}, set()
    for name, value in weights.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        # safetensors takes no two tensors of one memory.
        tensors[name] = value.clone() if place in seen else value
        seen.add(place)
    sealed = {**description, "digest": digest(tensors, json.dumps(description))}
    write(path, save(tensors, metadata={"lasnn": json.dumps(sealed)}))


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text, then names, types, shapes and bytes, in the order of the names; of tensors on any device."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].cpu().contiguous()
        sha.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        sha.update(value.view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and their description from safetensors ({} where the file has none, as those of other programs).

    Raises:
        UserError: it is not a whole file of weights, or it changed since it was saved.
    """
    with translate_file_errors(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
        description, seal = _description(path, metadata)
        if seal is not None and seal != digest(weights, json.dumps(description)):
            raise _damaged(path)
    return weights, description


def read_description(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its network, {} where that is nothing; the weights are not read.

    Raises:
        UserError: it is not a safetensors file.
    """
    with translate_file_errors(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
        return _description(path, file.metadata() or {})[0]


def _description(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """The description in a file's metadata, and the digest that seals the file, None where it has none.

    Raises:
        UserError: it is not what lasnn wrote.
    """
    if "lasnn" not in metadata:
        # A changed name of the key does not make a file one of others.
        if "digest" in metadata or any(SEALED in value for value in metadata.values()):
            raise _damaged(path)
        return {}, None
    try:
        description = json.loads(metadata["lasnn"])
    except (ValueError, RecursionError):
        description = None
    if not isinstance(description, dict):
        raise UserError(f"{path} is damaged: its metadata have a key 'lasnn' that lasnn did not write; save it again")
    seal = description.pop("digest", None)
    if not isinstance(seal, str):
        raise _damaged(path)
    return description, seal


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: it is not what was saved; copy it again, or train it again")


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
        raise UserError(
            f"{path} is damaged, or holds pickled code, which lasnn does not run; it takes {what}"
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not {what}: {reason}") from error


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


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        UserError: the file is damaged or holds code.
    """
    check_state(path)
    with translate_file_errors(path, "a whole checkpoint"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"phase", "epoch", "step", "module"} <= state.keys():
            raise UserError(f"{path} is not the state of a run")
        return state
