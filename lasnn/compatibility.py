"""Whether weights fit a network: by their names, shapes and values, and by what their file says of them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lasnn.description import Description, check_description
from lasnn.errors import UserError
from lasnn.foreign_weights import Checkpoint, read_checkpoint
from lasnn.network.staged import Staged
from lasnn.network.teacher import without_activations

Shape = tuple[int, ...]

# What profilers, averages and metrics leave beside the weights; left out where the network has nothing of the name.
COUNTERS = ("total_ops", "total_params", "n_averaged")
# Parts of names that wrappers put anywhere: torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Files from before PyTorch 0.4.1 do not count batches, nor do other programs; batch norm then starts to count at 0.
BATCHES = "num_batches_tracked"
# What the QCFS activation learns, beyond the weights of its network's student.
LEARNT_THRESHOLD = ".activation.threshold"
# Floating types that convert to fp32; fp8 has scales of its own, which are not in the tensor.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fitted_weights(
    path: Path, network: Staged, expected: Description, table: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's weights under the names and in the types that a network has.

    Args:
        path: of lasnn, torch.save or safetensors.
        network: on any device, the meta device too.
        expected: what the file should say of its network (see `lasnn.description`), as far as it says it.
        table: of the recipe, where what it says is set; None is that of the role.

    Returns:
        The whole state dict, on the CPU, and what was taken off, left out or converted, a line each.

    Raises:
        UserError: it is not a file of weights, or how it differs.
    """
    return _fit(path, read_checkpoint(path), network.state_dict(), expected, table)


def starting_weights(path: Path, student: Staged, expected: Description) -> tuple[dict[str, Tensor], list[str]]:
    """A file's weights as those that a student starts from: a student's, or an ANN's of the same architecture.

    Args, raises: as for `fitted_weights`.

    Returns:
        As `fitted_weights`, but for what the student's neurons learn where the file does not have it.
    """
    file = read_checkpoint(path)
    own = learnt_by_neurons(student)
    thresholds = [name for name in file.weights if name.endswith(LEARNT_THRESHOLD)]
    if thresholds:
        kept = {name: value for name, value in file.weights.items() if name not in thresholds}
        note = f"left out {_count(thresholds)} of what an ANN's activations have learnt"
        file = replace(file, weights=kept, notes=(*file.notes, note))
    return _fit(path, file, student.state_dict(), expected, "student", own)


def _fit(
    path: Path,
    file: Checkpoint,
    wanted: Mapping[str, Tensor],
    expected: Description,
    table: str | None,
    own: set[str] = frozenset(),
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a file that has been read; those named `own` may be missing, and are missing then."""
    check_description(path, file.description, expected, table)
    weights, notes = match_names(file.weights, wanted)
    optional = {name for name in wanted if name.rpartition(".")[2] == BATCHES}
    _check_classes(path, weights, wanted, expected.get("num_classes"))
    _compare(f"{path} has", _shapes(weights), _shapes(wanted), optional | own)
    values, converted = _values(path, weights, wanted)
    missing = {name: torch.zeros(wanted[name].shape, dtype=wanted[name].dtype) for name in optional - values.keys()}
    return values | missing, [*file.notes, *notes, *converted]


def check_same_weights(student: Staged, ann: Staged, init: str = "teacher", name: str = "teacher") -> None:
    """Check that the weights of a teacher, or of the start, can start a student.

    Args:
        init: what asks for them.
        name: "teacher" or "start".

    Raises:
        UserError: which weights do not fit.
    """
    found = _shapes(without_activations(ann))
    what = f'"{init}" needs the same architecture and options: the {name} has'
    _compare(what, found, _shapes(student.state_dict()), learnt_by_neurons(student))


def learnt_by_neurons(student: Staged) -> set[str]:
    """The names of the neurons' own parameters: what a student's state has beyond its teacher's."""
    return {name for name, _ in student.named_parameters() if ".neuron." in name}


def match_names(found: Mapping[str, Tensor], wanted: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under a network's names, without what wrappers, profilers and scripts put beside and before them.

    A prefix is taken off only where every name has it, and as far as the most names fit.

    Returns:
        The weights, and a line for each thing that was taken off or left out.
    """
    wanted, notes = set(wanted), []
    extra = [name for name in found if name.rpartition(".")[2] in COUNTERS and name not in wanted]
    kept = {name: value for name, value in found.items() if name not in extra}
    if extra:
        kinds = ", ".join(sorted({repr(name.rpartition(".")[2]) for name in extra}))
        notes.append(f"left out {_count(extra)} that no network has ({kinds})")
    for wrapper in WRAPPERS:
        parts = {name: [part for part in name.split(".") if part != wrapper] for name in kept}
        changed = [name for name in kept if len(parts[name]) <= name.count(".") and name not in wanted]
        plain = {".".join(parts[name]): value for name, value in kept.items()}
        if changed and len(plain) == len(kept):
            kept = plain
            notes.append(f"{wrapper + '.'!r} taken out of {_count(changed)}")
    best, prefix, names = _overlap(kept, wanted, ""), "", list(kept)
    before = ""
    while names and all("." in name[len(before) :] for name in names):
        before += names[0][len(before) :].partition(".")[0] + "."
        if not all(name.startswith(before) for name in names):
            break
        if (overlap := _overlap(kept, wanted, before)) > best:
            best, prefix = overlap, before
    if prefix:
        kept = {name.removeprefix(prefix): value for name, value in kept.items()}
        notes.append(f"prefix {prefix!r} taken off {_count(names)}")
    return kept, notes


def _overlap(names: Iterable[str], wanted: set[str], prefix: str) -> int:
    return sum(name.removeprefix(prefix) in wanted for name in names)


def _count(names: list[str]) -> str:
    return f"{len(names)} name{'s' * (len(names) != 1)}"


def _values(path: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]):
    """The weights in the network's types, and a line on those that were converted.

    Raises:
        UserError: some are no finite numbers, or are quantised.
    """
    values, converted, wrong, not_finite = {}, {}, {}, []
    for name, value in weights.items():
        kind = wanted[name].dtype
        if kind.is_floating_point and value.layout == torch.strided and value.dtype in FLOATS:
            if value.dtype != kind:
                converted.setdefault(str(value.dtype).removeprefix("torch."), []).append(name)
            values[name] = value.to(kind)
            if not values[name].isfinite().all():
                not_finite.append(name)
        elif kind.is_floating_point or value.layout != torch.strided or value.is_quantized:
            what = "sparse" if value.layout != torch.strided else str(value.dtype).removeprefix("torch.")
            wrong.setdefault(what, []).append(name)
        else:
            values[name] = value.to(kind)
    if wrong:
        said = "; ".join(f"{what}: {_some(map(repr, names))}" for what, names in wrong.items())
        fix = "give those from before they were quantised or packed, in fp32"
        raise UserError(f"{path} has weights that are no floating-point numbers ({said}): {fix}")
    if not_finite:
        fix = "its training diverged, or the file is damaged; give an earlier one"
        raise UserError(f"{path} has weights that are NaN or infinite: {_some(map(repr, not_finite))}: {fix}")
    return values, [f"{len(names)} {kind} weights converted to fp32" for kind, names in converted.items()]


def _check_classes(
    path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], num_classes: int | None
) -> None:
    """Check that a file without a description is of as many classes as the data set has: the shape of its last layer
    says it, if that is all that differs.

    Raises:
        UserError: it is of others.
    """
    last = next(reversed(wanted)).rpartition(".")[0]
    other = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    counted = all(name in found or name.endswith(BATCHES) for name in wanted)
    if num_classes is None or not other or not counted or any(name.rpartition(".")[0] != last for name in other):
        return
    classes = next(iter(found[other[0]].shape), num_classes)
    if classes != num_classes:
        fix = f"train its last layer ({last}) anew with {num_classes} outputs, and give that file"
        raise UserError(f"{path} was trained for {classes} classes; the data set has {num_classes}: {fix}")


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def _compare(what: str, found: dict[str, Shape], wanted: dict[str, Shape], extra: set[str] = frozenset()) -> None:
    misfits = sorted((set(found) ^ set(wanted)) - extra)
    if misfits and all(name.endswith(LEARNT_THRESHOLD) for name in misfits):
        has = "has" if misfits[0] in found else "has no"
        what = what.removesuffix(" has")
        raise UserError(f"{what} {has} {misfits[0]!r}; was it trained on another teacher.activation?")
    differences = {
        "missing keys": [repr(name) for name in wanted if name not in found and name not in extra],
        "unexpected keys": [repr(name) for name in found if name not in wanted],
        "other shapes": [
            f"{name!r} {list(found[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if shape != found.get(name, shape)
        ],
    }
    said = [f"{kind}: {_some(names)}" for kind, names in differences.items() if names]
    if said:
        hint = _prefix_of_some(found, wanted, extra) or "is it another architecture?"
        raise UserError(f"{what} {'; '.join(said)}; {hint}")


def _prefix_of_some(found: dict[str, Shape], wanted: dict[str, Shape], extra: set[str]) -> str | None:
    """The way out where a part of the names fits without its prefix, as in a file of two networks."""
    heads = {name[: at + 1] for name in found for at, letter in enumerate(name) if letter == "."}
    fit = []
    for head in sorted(heads):
        inner = {name.removeprefix(head) for name in found if name.startswith(head)}
        if inner <= wanted.keys() and wanted.keys() - inner <= extra:
            fit.append(repr(head))
    return f"those under {' or '.join(fit)} fit: save them alone, without it before their names" if fit else None


def _some(names: Iterable[str], most: int = 3) -> str:
    """The names, or the first few and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
