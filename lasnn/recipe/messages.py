"""What is said of a recipe's mistakes, by the fields of its model alone."""

import types
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lasnn.errors import printable, unknown
from lasnn.option_types import describe_limits, describe_type

# The way to a key: names of tables and keys, and numbers of a list's entries.
Place = tuple[str | int, ...]


def fields(model: type[BaseModel]) -> list[tuple[str, str, Any, str]]:
    """(key, type, default, what it means) of each key of a table; `None` is the default of what may be left out."""
    return [
        (
            name,
            describe_type(info.annotation) + describe_limits(info.metadata),
            "required" if info.is_required() else info.get_default(call_default_factory=True),
            info.description or "",
        )
        for name, info in model.model_fields.items()
    ]


def line(source: str, overridden: Iterable[str], key: str, message: str) -> str:
    """One line about a key; what `--set` brought is blamed on it, not on the file."""
    blamed = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden)
    return f"{'--set' if blamed else source}: {printable(key, 100)}: {printable(message)}"


def title(place: Place) -> str:
    """A table as it stands in the file: `[student.neuron]`, or `[[losses]]` for an entry of a list."""
    if not place:
        return "the recipe"
    names = ".".join(str(part) for part in place if isinstance(part, str))
    return f"[[{names}]]" if isinstance(place[-1], int) else f"[{names}]"


def faults(model: type[BaseModel], error: ValidationError) -> Iterator[tuple[Place, str]]:
    """(place, message) of each of pydantic's errors, in lasnn's words."""
    seen = set()
    for fault in error.errors(include_url=False):
        place, table, info, branch = _resolve(model, fault["loc"])
        if place in seen or (branch is str and isinstance(fault["input"], dict)):
            # A value that is wrong for each type of a union is wrong once; "or text" is no advice for a table.
            continue
        seen.add(place)
        if fault["type"] == "extra_forbidden":
            message = unknown_key(title(place[:-1]), place[-1], table.model_fields)
        elif fault["type"] == "missing":
            message = f"missing; {title(place[:-1])} needs it"
            # Without the name that says which keys there may be, those that are nearly one are all the same a slip.
            for key in fault["input"]:
                if key not in table.model_fields and get_close_matches(key, table.model_fields, cutoff=0.8):
                    yield (*place[:-1], key), unknown_key(title(place[:-1]), key, table.model_fields)
        elif info is not None:
            accepted = describe_type(info.annotation) + describe_limits(info.metadata)
            message = f"{fault['input']!r} is not valid; it takes {accepted}"
            if accepted == "a table" and isinstance(fault["input"], str):
                message += f', as {{ name = "{fault["input"]}" }}'
        else:
            message = f"{fault['input']!r} is not valid: {fault['msg'].lower()}"
        yield place, message


def unknown_key(table: str, key: object, known: Iterable[str]) -> str:
    """The line for a key that a table, by its title, does not have."""
    return unknown("key", key, known).replace(f"{key!r}", f"{key!r} in {table}", 1)


def table_of(model: type[BaseModel], place: Place) -> type[BaseModel]:
    """The model of the table at a place of a recipe, that of an entry for a list's."""
    kind: Any = model
    for part in place:
        [*_, kind] = _branches(get_args(kind)[0] if isinstance(part, int) else kind.model_fields[part].annotation)
    return kind


def _resolve(model: type[BaseModel], location: Place) -> tuple[Place, type[BaseModel], FieldInfo | None, Any]:
    """What pydantic's location means.

    Returns:
        The place, which is the location without the branches of unions; the innermost table's model on the way; the
        last key's field, None for an entry of a list or a key that is not known; the last branch of a union.
    """
    place: list[str | int] = []
    kind: Any = model
    table, info, branch = model, None, None
    for part in location:
        branches = _branches(kind)
        if len(branches) > 1:
            named = {getattr(one, "__name__", str(one)): one for one in branches}
            if part in named:
                kind = branch = named[part]
                continue
        elif branches:
            [kind] = branches
        place.append(part)
        info = None
        if isinstance(part, int):
            kind = (*get_args(kind), Any)[0]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            table, info = kind, kind.model_fields.get(part)
            kind = info.annotation if info else Any
    return tuple(place), table, info, branch


def _branches(kind: Any) -> list[Any]:
    """The types of a union but None, and any other type alone."""
    if get_origin(kind) in (Union, types.UnionType):
        return [one for one in get_args(kind) if one is not type(None)]
    return [kind]
