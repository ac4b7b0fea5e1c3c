"""Whether weights fit a network, by the names and shapes alone."""

from pathlib import Path

from lasnn.errors import UserError
from lasnn.network.staged import Staged
from lasnn.network.teacher import without_activations
from lasnn.weights import weight_shapes

Shape = tuple[int, ...]


def check_weights(path: Path, network: Staged, num_classes: int) -> None:
    """Check that a weights file fits a network, by the names and shapes in it alone.

    Raises:
        UserError: it is not a file of weights, or how it differs.
    """
    found, description = weight_shapes(path)
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    classes = description.get("num_classes", num_classes)
    # A file without a description says it by the shape of its last layer, if that is all that differs.
    other = [name for name in wanted if name in found and found[name] != wanted[name]]
    last = next(reversed(wanted)).rpartition(".")[0]
    if other and wanted.keys() == found.keys() and all(name.rpartition(".")[0] == last for name in other):
        classes = (found[other[0]] or (classes,))[0]
    if classes != num_classes:
        fix = f"train its last layer ({last}) anew with {num_classes} outputs, and give that file"
        raise UserError(f"{path} was trained for {classes} classes; the data set has {num_classes}: {fix}")
    # Files from before PyTorch 0.4.1 do not count batches; batch norm then starts to count at 0.
    _compare(str(path), found, wanted, {name for name in wanted if name.endswith(".num_batches_tracked")})


def check_same_weights(student: Staged, teacher: Staged) -> None:
    """Check that a teacher's weights can start its student.

    Raises:
        UserError: which weights do not fit.
    """
    wanted = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    learnt = {name for name, _ in student.named_parameters() if ".neuron." in name}
    found = {name: tuple(value.shape) for name, value in without_activations(teacher).items()}
    _compare('"teacher" needs the same architecture and options: the teacher', found, wanted, learnt)


def _compare(what: str, found: dict[str, Shape], wanted: dict[str, Shape], extra: set[str] = frozenset()) -> None:
    misfits = sorted((set(found) ^ set(wanted)) - extra)
    if misfits and all(name.endswith(".activation.threshold") for name in misfits):
        has = "has" if misfits[0] in found else "has no"
        raise UserError(f"{what} {has} {misfits[0]!r}; was it trained on another teacher.activation?")
    differences = {
        "lacks": [repr(name) for name in wanted if name not in found and name not in extra],
        "has besides": [repr(name) for name in found if name not in wanted],
        "has other shapes:": [
            f"{name!r} {list(found[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if shape != found.get(name, shape)
        ],
    }
    said = [f"{verb} {_some(names)}" for verb, names in differences.items() if names]
    if said:
        raise UserError(f"{what} {'; '.join(said)}; is it another architecture?")


def _some(names: list[str], most: int = 3) -> str:
    """The names, or the first few and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
