"""The mistakes of form in a recipe: keys, types, names, and the options of registered parts.

All of them are found in one pass over the tables as they were written: each table's options are checked against its
part's signature whatever is wrong with the other tables. What follows only once the networks and the data are built
(stages, shapes, weights) is the plan's to find, and only of a recipe that has no mistake of form.
"""

import json
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lasnn.errors import UserError, unknown
from lasnn.recipe import load, messages
from lasnn.recipe.messages import Place, title
from lasnn.recipe.paths import expanded
from lasnn.recipe.plugins import load_plugins
from lasnn.registry import Registry, architectures, augmentations, datasets, encoders, losses, neurons, teachers

Model = TypeVar("Model", bound=BaseModel)
# What `student.init` may be besides a path.
INITS = ("auto", "random", "teacher", "copied", "converted")
# Those that balance the weights for the student's T.
BALANCED = ("auto", "converted")
# Of the schedules of the rate, where the recipe leaves them out.
MILESTONES, GAMMA, DECAY_SHARE = (0.5, 0.75), 0.1, 0.2
# What lasnn passes to an architecture itself.
SUPPLIED = ("in_channels", "num_classes")


def checked(
    model: type[Model], tables: dict[str, Any], source: str, overridden: Set[str], problems: Iterable[str]
) -> Model:
    """A recipe of nested dicts as its model, with everything that was left out written down.

    Args:
        model: the recipe's.
        tables: as `tomllib` returns them.
        source: what messages call the recipe; its plugins are looked for beside it.
        overridden: keys whose mistakes are blamed on `--set`.
        problems: lines found so far, reported with the rest.

    Raises:
        UserError: every mistake of form, a line each.
    """
    found = {load.key_of(place): message for place, message in load.beyond(tables)}
    try:
        # As JSON: strict checking then agrees with what TOML can say (an integer is a valid number, a list a tuple).
        text = json.dumps(tables, default=str)
    except (ValueError, RecursionError):
        # Nested or long without end: nothing else can be said of it.
        raise UserError(*problems, *(messages.line(source, overridden, *item) for item in found.items())) from None
    recipe, wrong = None, []
    try:
        recipe = model.model_validate_json(text, strict=True)
    except ValidationError as error:
        wrong = list(messages.faults(model, error))
    form = Form(model, tables, frozenset(place for place, _ in wrong), overridden)
    missing = form.check_plugins(Path(source).parent)
    wrong += missing
    wrong += form.check_parts(bool(missing) or any(place[:1] == ("plugins",) for place in form.faulty))
    wrong += form.check_together()
    lines = [messages.line(source, overridden, key, message) for key, message in found.items()]
    lines += [
        messages.line(source, overridden, load.key_of(place), message)
        for place, message in wrong
        if load.key_of(place) not in found
    ]
    if problems or lines or recipe is None:
        raise UserError(*dict.fromkeys([*problems, *lines]))
    return filled_in(recipe)


def filled_in(recipe: Model) -> Model:
    """The same recipe with its objective and its augmentations written down where they were left out."""
    changes: dict[str, Any] = {}
    if not recipe.losses:
        # What is safe for a short training on unknown data; attention at the weight of its paper drowns the labels.
        entry = messages.table_of(type(recipe), ("losses", 0))
        changes["losses"] = [entry(name="cross-entropy", weight=1.0)]
    if recipe.data.augment is None:
        try:
            images = datasets.build(recipe.data.name, expanded(recipe.data.root, "data.root"), **recipe.data.options)
            changes["data"] = recipe.data.model_copy(update={"augment": list(images.augment)})
        except (UserError, AttributeError):
            # The plan says that it cannot be built, beside what else does not fit.
            pass
    return recipe.model_copy(update=changes)


def teaches_classes(loss: str) -> bool:
    """Whether a registered loss compares the student's logits with something: labels, or what a teacher knows. One that
    compares time steps teaches no class by itself.
    """
    # Imports PyTorch.
    from lasnn.loss import left_at_one_step

    inputs = losses[loss].inputs
    compared = "logits" in inputs and any(name == "targets" or name.startswith("teacher_") for name in inputs)
    return compared and left_at_one_step(losses[loss].function) is None


@dataclass(frozen=True)
class Named:
    """A registered part that a table names.

    Args:
        table: the place of the table that holds its options.
        key: the place of its name.
        registry: where it is looked up.
        options: the further keys of the table.
        supplied: the options that lasnn passes itself.
    """

    table: Place
    key: Place
    registry: Registry
    name: str
    options: dict[str, Any]
    supplied: tuple[str, ...] = ()


class Form:
    """The checks of a recipe's tables as they were written.

    Args:
        model: the recipe's.
        tables: as `tomllib` returns them, of any form.
        faulty: the places that the model refused.
        overridden: the keys that `--set` brought.
    """

    def __init__(self, model: type[BaseModel], tables: dict[str, Any], faulty: frozenset[Place], overridden: Set[str]):
        self.model = model
        self.tables = tables
        self.faulty = faulty
        self.overridden = overridden

    def at(self, place: Place) -> Any:
        """The value at a place, None where there is none."""
        here: Any = self.tables
        for part in place:
            if isinstance(here, dict):
                here = here.get(part)
            else:
                here = here[part] if isinstance(here, list) and isinstance(part, int) and part < len(here) else None
        return here

    def values(self, place: Place) -> dict[str, Any]:
        """The keys of a table that are right, with the defaults of those that are left out."""
        given = self.at(place)
        given = given if isinstance(given, dict) else {}
        wrong = {fault[len(place)] for fault in self.faulty if fault[: len(place)] == place and len(fault) > len(place)}
        found = {}
        for key, info in messages.table_of(self.model, place).model_fields.items():
            if key in given:
                found[key] = given[key]
            elif not info.is_required():
                found[key] = info.get_default(call_default_factory=True)
        return {key: value for key, value in found.items() if key not in wrong}

    def check_plugins(self, folder: Path) -> list[tuple[Place, str]]:
        """Import the plugins; what they register is known to the checks that follow."""
        plugins = self.at(("plugins",))
        if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
            return []
        return [(("plugins", number), message) for number, message in load_plugins(plugins, folder)]

    def parts(self) -> Iterator[Named]:
        """The registered parts that the tables name, as far as they name any."""

        def named(table: Place, key: str, registry: Registry, supplied: tuple[str, ...] = ()):
            given = self.at(table)
            if table and given is None and table[-1] not in ("teacher", "start"):
                given = {}
            fields = messages.table_of(self.model, table).model_fields
            if isinstance(given, dict):
                name = given.get(key, None if fields[key].is_required() else fields[key].get_default())
                options = {option: value for option, value in given.items() if option not in fields}
                if isinstance(name, str):
                    yield Named(table, (*table, key), registry, name, options, supplied)

        def by_name(place: Place, registry: Registry):
            """A part that stands there as a name or as a table."""
            given = self.at(place)
            if isinstance(given, str):
                yield Named(place, place, registry, given, {})
            elif given is not None:
                yield from named(place, "name", registry)

        yield from named(("data",), "name", datasets)
        teaches = teacher_registry(self.at(("teacher", "architecture")))
        yield from named(("teacher",), "architecture", teaches, SUPPLIED)
        yield from named(("start",), "architecture", architectures, SUPPLIED)
        yield from named(("student",), "architecture", architectures, SUPPLIED)
        if isinstance(self.at(("student",)), dict):
            yield from named(("student", "neuron"), "name", neurons)
            yield from by_name(("student", "encoder"), encoders)
        for table, registry in ((("losses",), losses), (("data", "augment"), augmentations)):
            entries = self.at(table)
            for number in range(len(entries) if isinstance(entries, list) else 0):
                yield from by_name((*table, number), registry)

    def check_parts(self, plugins_missing: bool) -> list[tuple[Place, str]]:
        """(place, message) for each name that is not known and each option that its part does not take.

        Where a plugin is missing, a name that is not known may be the plugin's: one that is no slip is left alone.
        """
        found = []
        for part in self.parts():
            model = messages.table_of(self.model, part.table)
            if part.name not in part.registry:
                known = {*architectures, *teachers} if part.table == ("teacher",) else part.registry
                message = unknown(part.registry.kind, part.name, known)
                if not self.at(("plugins",)) and not get_close_matches(part.name, known, cutoff=0.5):
                    # As in the folder of a run that a notebook made.
                    message += "; if it is your own, list the file that registers it in plugins"
                if plugins_missing:
                    message += "; or it is of a plugin that could not be loaded"
                if not plugins_missing or get_close_matches(part.name, known, cutoff=0.8):
                    found.append((part.key, message))
                # Its options are not known either, but a key that is nearly one of the table's is a slip all the same.
                for option in part.options:
                    if get_close_matches(option, model.model_fields, cutoff=0.8):
                        message = messages.unknown_key(title(part.table), option, model.model_fields)
                        found.append(((*part.table, option), message))
                continue
            entry = part.registry[part.name]
            takes = set(entry.options) - set(part.supplied)
            for option, message in entry.problems(part.options, part.supplied):
                if option in part.options and option not in takes:
                    # The key may be a misspelt key of the table just as well as of the part's options.
                    known = {*(model.model_fields if part.table != part.key else ()), *takes}
                    message = messages.unknown_key(f"{title(part.table)} ({part.name})", option, known)
                    key = load.key_of((*part.table, option))
                    if load.key_of(part.key) in self.overridden and key not in self.overridden:
                        # The option may have been right for the part that the file names.
                        message += f"; remove the recipe's with --set {key}="
                found.append(((*part.table, option), message))
        return found

    def check_together(self) -> list[tuple[Place, str]]:
        """(place, message) for keys that contradict each other."""
        found = [*self._check_losses(), *self._check_teacher("teacher"), *self._check_teacher("start")]
        found += self._check_start()
        for table in ("teacher", "start", "distill"):
            if table != "distill" and self.at((table,)) is None:
                continue
            training = self.values((table,))
            warmup, epochs = training.get("warmup_epochs"), training.get("epochs")
            if None not in (warmup, epochs) and warmup > epochs:
                found.append(((table, "warmup_epochs"), f"{warmup:g} is longer than the {epochs} epochs"))
            lowest, highest = training.get("min_lr"), training.get("lr")
            if None not in (lowest, highest) and lowest > highest:
                found.append(((table, "min_lr"), f"{lowest:g} is above lr = {highest:g}"))
            found += _check_schedule(table, training)
        return found

    def _check_start(self) -> Iterator[tuple[Place, str]]:
        student, start, teacher = (self.at((table,)) for table in ("student", "start", "teacher"))
        init = student.get("init", "auto") if isinstance(student, dict) else None
        place = ("student", "init")
        if not isinstance(init, str):
            return
        if init not in INITS and not set("/\\") & set(init):
            message = f"{unknown('start', init, INITS)}; a path has a slash, as ./{init}"
            yield place, message if init else f"is empty; it takes {', '.join(INITS)}, or a path with a slash"
            return
        if init == "teacher" and teacher is None:
            yield place, "there is no [teacher] to start from"
        elif init in ("copied", "converted") and teacher is None and start is None:
            yield place, "there is no [start] and no [teacher] to start from"
        if init not in ("auto", "copied", "converted") and isinstance(start, dict):
            yield ("start",), f'has no effect with student.init = "{init}"; leave one of the two out'
        if init not in BALANCED and "calibration" in student:
            message = f'has no effect with student.init = "{init}"; leave it out, or set init = "converted"'
            yield ("student", "calibration"), message

    def _check_losses(self) -> Iterator[tuple[Place, str]]:
        entries = self.at(("losses",))
        entries = entries if isinstance(entries, list) else []
        names = [self.values(("losses", number)).get("name") for number in range(len(entries))]
        known = [name for name in names if isinstance(name, str) and name in losses]
        terms = [self.values(("losses", number)) for number in range(len(entries))]
        to_the_end = [
            name
            for name, term in zip(names, terms, strict=True)
            if name in known and term.get("weight", 1.0) > 0 and term.get("schedule", "constant") == "constant"
        ]
        if names and len(known) == len(names) and not any(map(teaches_classes, to_the_end)):
            choices = ", ".join(filter(teaches_classes, losses))
            scheduled = any(term.get("schedule", "constant") != "constant" for term in terms)
            above = "above 0 to the end" if scheduled else "above 0"
            message = f"no loss that teaches the student's logits (with a weight {above}); add one of: {choices}"
            yield ("losses",), message
        for number, term in enumerate(terms):
            # What is wrong by itself is not there.
            if "schedule" not in term or "until" not in term:
                continue
            schedule, until, place = term["schedule"], term["until"], ("losses", number, "until")
            if schedule == "until" and until is None:
                yield place, 'missing; schedule = "until" needs the share of the training after which the weight is 0'
            elif schedule != "until" and until is not None:
                yield place, f'has no effect with schedule = "{schedule}"; leave it out, or set schedule = "until"'
        for number, name in enumerate(names):
            needs_teacher = name in known and any("teacher" in needed for needed in losses[name].inputs)
            if needs_teacher and self.at(("teacher",)) is None:
                yield ("losses", number, "name"), f"{name!r} needs a teacher; add a [teacher] section"
        for name in sorted({name for name in known if known.count(name) > 1}):
            yield (
                ("losses",),
                f"{name!r} is listed {known.count(name)} times; list it once: terms are logged by their names",
            )

    def _check_teacher(self, name: str) -> Iterator[tuple[Place, str]]:
        given = self.at((name,))
        if not isinstance(given, dict):
            return
        whole = "stages" in given and teacher_registry(given.get("architecture")) is teachers
        if whole and "checkpoint" not in given:
            for key in sorted(messages.table_of(self.model, (name,)).training_keys & given.keys()):
                message = f"has no effect with {name}.stages: lasnn does not train such a network; load its weights in "
                yield (name, key), f"{message}the plugin, or give {name}.checkpoint, and leave {name}.{key} out"
        if "checkpoint" in given:
            for key in sorted(messages.table_of(self.model, (name,)).training_keys & given.keys()):
                yield (name, key), f"has no effect with {name}.checkpoint; leave one of the two out"
            if given.get("pretrained") is True:
                message = f"brings weights of its own, beside {name}.checkpoint; leave one of the two out"
                yield (name, "pretrained"), message
        activation = self.values((name,)).get("activation")
        if activation not in (None, "qcfs") and "levels" in given:
            message = f'has no effect with activation = "{activation}"; leave it out, or set activation = "qcfs"'
            yield (name, "levels"), message
        architecture = given.get("architecture")
        if activation not in (None, "relu") and teacher_registry(architecture) is teachers:
            message = f"{architecture!r} brings activations of its own; leave it out, or name an architecture"
            yield (name, "activation"), message


# The keys that go with one schedule of the learning rate alone.
OF_A_SCHEDULE = {"milestones": "step", "gamma": "step", "decay_share": "warmup-stable-decay"}


def _check_schedule(table: str, training: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """Complain of keys that go with another schedule, and of phases that overlap."""
    schedule = training.get("schedule")
    for key, wanted in OF_A_SCHEDULE.items():
        if training.get(key) is not None and schedule not in (None, wanted):
            message = f'has no effect with schedule = "{schedule}"; leave it out, or set schedule = "{wanted}"'
            yield (table, key), message
    milestones = training.get("milestones")
    if milestones and sorted(set(milestones)) != milestones:
        yield (table, "milestones"), "they must rise: each is a share of the training, after the one before"
    warmup, epochs = training.get("warmup_epochs"), training.get("epochs")
    if schedule == "warmup-stable-decay" and None not in (warmup, epochs):
        share = training.get("decay_share") or DECAY_SHARE
        if warmup <= epochs < warmup + share * epochs:
            yield (table, "warmup_epochs"), f"{warmup:g} of {epochs} epochs run into the last {share:.0%}, the decay"


def teacher_registry(name: object) -> Registry:
    """The registry of a teacher's architecture: those that are built as students too, or those that only teach."""
    return teachers if isinstance(name, str) and name in teachers else architectures
