"""What a file of weights says of its network, so that weights that fit are never taken for another network's.

Pooling, an activation's levels, the images' normalisation and the order of the classes leave no trace in the shapes.
A file of another program, or of an earlier lasnn, says less; what it does not say is not compared.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lasnn.data import Dataset, DatasetDescription
from lasnn.errors import UserError, printable
from lasnn.network.staged import Staged
from lasnn.recipe.check import teacher_registry
from lasnn.recipe.load import dump_toml, toml_value
from lasnn.recipe.schema import Recipe, StudentTable, TeacherTable
from lasnn.registry import REQUIRED, architectures, datasets, teachers

Description = Mapping[str, Any]

# Of a data set's description, what a student's file says of its images beside their shape and classes.
IMAGES = ("train_size", "test_size", "decoding", "fingerprints")


def describe_teacher(
    recipe: Recipe, data: Dataset | DatasetDescription, network: Staged, name: str = "teacher"
) -> dict[str, Any]:
    """What a teacher's file says: `role`, architecture with all options, activation, classes, normalisation.

    Args:
        name: "teacher", or "start" for the student's ANN twin, whose file is a teacher's as well.
    """
    table = recipe.start if name == "start" else recipe.teacher
    normalisation = getattr(network, "normalisation", None) or (data.mean, data.std)
    levels = {"levels": table.levels} if table.activation == "qcfs" else {}
    activation = {"activation": table.activation, **levels}
    return {"role": "teacher", **_network(table, recipe, data, normalisation), **activation}


def describe_student(recipe: Recipe, data: DatasetDescription) -> dict[str, Any]:
    """What a student's file says: as a teacher's, with T, encoder, neuron and the recipe, which make it a student, and
    with what `data_described` knows its images by.
    """
    table = recipe.student
    return {
        "role": "student",
        **_network(table, recipe, data, (data.mean, data.std)),
        **{key: value for key, value in data.as_json().items() if key in IMAGES},
        "timesteps": table.timesteps,
        "encoder": table.encoder_table.name,
        "neuron": table.neuron.name,
        "recipe": without_paths(recipe),
    }


def describe_start(recipe: Recipe, data: Dataset | DatasetDescription) -> dict[str, Any]:
    """What is wanted of a file that a student starts from, a student's or a teacher's: as far as both have it."""
    return _network(recipe.student, recipe, data, (data.mean, data.std))


def data_described(description: Description, where: str) -> DatasetDescription | None:
    """The data set that a student's file tells of, without what tells its single files from others; None where the file
    is of an earlier lasnn and does not tell.

    Raises:
        UserError: it is damaged; `where` names it.
    """
    names = {"name": "data", "channels": "in_channels"}
    keys = ("name", "channels", "height", "width", "classes", "mean", "std", *IMAGES)
    try:
        found = {key: description[names.get(key, key)] for key in keys}
    except KeyError:
        return None
    return DatasetDescription.from_json({**found, "keys": []}, where)


def _network(
    table: TeacherTable | StudentTable, recipe: Recipe, data: Dataset | DatasetDescription, normalisation
) -> dict[str, Any]:
    mean, std = normalisation
    return {
        "architecture": table.architecture,
        "options": _options(table.architecture, table.options),
        "in_channels": data.channels,
        "height": data.height,
        "width": data.width,
        "num_classes": len(data.classes),
        "data": recipe.data.name,
        # Nothing is compared with none: what is loaded is compared again.
        "classes": list(data.classes) if data.classes_known else [],
        "mean": list(mean),
        "std": list(std),
    }


def _options(architecture: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture's options with the defaults of what is left out, as JSON has them."""
    known = teacher_registry(architecture)
    options = known[architecture].options if architecture in known else {}
    left_out = {
        name: option.default
        for name, option in options.items()
        if option.default is not REQUIRED and name not in ("in_channels", "num_classes")
    }
    found = {}
    for name, value in {**left_out, **given}.items():
        try:
            found[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            # A default of the user's own that no recipe could say.
            continue
    return found


def without_paths(recipe: Recipe) -> str:
    """The recipe's text for a file that travels: without `data.root`, a checkpoint by its file's name alone."""
    tables = tomllib.loads(recipe.to_toml())
    tables["data"].pop("root", None)
    for name, table in (("teacher", recipe.teacher), ("start", recipe.start)):
        if table and table.checkpoint is not None:
            tables[name]["checkpoint"] = Path(table.checkpoint).name
    if recipe.student.init_is_path:
        # With a slash it stays a path.
        tables["student"]["init"] = f"./{Path(recipe.student.init).name}"
    return dump_toml(tables)


def check_description(path: Path, found: Description, wanted: Description, table: str | None = None) -> None:
    """Compare what a file says of its network with the recipe's, as far as both say it.

    Args:
        path: the file.
        found: its description.
        wanted: what `describe_teacher` or `describe_student` say; {} compares nothing.
        table: of the recipe, where the settings lie; None is the role's.

    Raises:
        UserError: every difference, a line each, with what to set.
    """
    # A student's file of before there were roles has its recipe in it; a teacher's never had.
    role = found.get("role") or ("student" if "recipe" in found else None)
    if role is not None and role != wanted.get("role", role):
        if role == "student":
            fix = "give the teacher.safetensors of its run, or the run folder"
            raise UserError(f"{path} is a student's, a spiking network, and cannot be the ANN teacher: {fix}")
        raise UserError(f"{path} is a {role}'s; a student's file is wanted: give its run's student.safetensors")
    table = table or wanted.get("role")
    problems = [
        *_option_differences(found, wanted, table),
        *_data_differences(found, wanted, table),
    ]
    if problems:
        raise UserError(*(f"{path} was trained {problem}" for problem in problems))


def _option_differences(found: Description, wanted: Description, table: str | None) -> list[str]:
    if found.get("architecture", ours := wanted.get("architecture")) != ours:
        return [_setting(table, "architecture", found["architecture"], ours)]
    pairs = []
    if isinstance(found.get("options"), dict) and "options" in wanted:
        theirs = _options(ours, found["options"])
        # What the images were normalised with is compared as such, wherever it was set.
        names = [name for name in {**theirs, **wanted["options"]} if name not in ("mean", "std")]
        pairs += [(name, theirs.get(name), wanted["options"].get(name)) for name in names]
    if "activation" in found and "activation" in wanted:
        pairs.append(("activation", found["activation"], wanted["activation"]))
        if found["activation"] == wanted["activation"]:
            pairs.append(("levels", found.get("levels"), wanted.get("levels")))
    return [_setting(table, name, theirs, ours) for name, theirs, ours in pairs if theirs != ours]


def _setting(table: str | None, key: str, theirs: Any, ours: Any) -> str:
    said = [printable(toml_value(value), 80) if value is not None else "none" for value in (theirs, ours)]
    fix = f"leave {table}.{key} out" if theirs is None else f"set {table}.{key} = {said[0]}"
    return f"with {key} = {said[0]}; the recipe has {said[1]}: {fix}"


def _data_differences(found: Description, wanted: Description, table: str | None) -> list[str]:
    """What differs in the images: channels, classes, normalisation."""
    again = f"train the {table} on this data set"
    problems = []
    theirs, ours = found.get("in_channels"), wanted.get("in_channels")
    if None not in (theirs, ours) and theirs != ours:
        problems.append(f"on images of {theirs} channels; the data set's have {ours}: {again}")
    theirs, ours = found.get("num_classes"), wanted.get("num_classes")
    if None not in (theirs, ours) and theirs != ours:
        fix = f"train its last layer anew with {ours} outputs, and give that file, or {again}"
        problems.append(f"for {theirs} classes; the data set has {ours}: {fix}")
    theirs, ours = found.get("classes"), wanted.get("classes")
    if isinstance(theirs, list) and ours and len(theirs) == len(ours) and theirs != ours:
        if sorted(map(str, theirs)) == sorted(ours):
            problems.append(
                f"on these classes in another order, {_some(theirs)}; the data set has {_some(ours)}: "
                f"number the data set's classes in the file's order, or {again}"
            )
        else:
            gone, new = ([name for name in one if name not in other] for one, other in ((theirs, ours), (ours, theirs)))
            problems.append(
                f"on other classes: {_some(gone)} where the data set has {_some(new)}: name the data set's classes "
                f"as the file does, or {again}"
            )
    values = [one.get(name) for name in ("mean", "std") for one in (found, wanted)]
    if all(isinstance(value, list) for value in values) and not (_near(*values[:2]) and _near(*values[2:])):
        place = _normalised_by(wanted)
        mean, std = (toml_value(found[name]) for name in ("mean", "std"))
        fix = f"set {place}.mean = {mean} and {place}.std = {std}" if place else again
        ours = " and ".join(f"{name} = {toml_value(wanted[name])}" for name in ("mean", "std"))
        problems.append(f"on images normalised with mean = {mean} and std = {std}; the recipe has {ours}: {fix}")
    return problems


def _near(one: list, other: list) -> bool:
    """Whether they normalise alike; a grey image's one value may be written for each of its copies."""
    if len(one) != len(other) and 1 in (len(one), len(other)):
        one, other = (values * max(len(one), len(other)) if len(values) == 1 else values for values in (one, other))
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(one, other, strict=True))


def _normalised_by(wanted: Description) -> str | None:
    """The table of the recipe that can set mean and std; None where the data set has its own."""
    name, data = wanted.get("architecture"), wanted.get("data")
    borrowed = wanted.get("role") == "teacher" and name not in architectures and name in teachers
    if borrowed and "mean" in teachers[name].options:
        return "teacher"
    return "data" if data in datasets and "mean" in datasets[data].options else None


def _some(names: list, most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(repr(name), 60) for name in names[:most]) + more
