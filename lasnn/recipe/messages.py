"""What is said of a recipe's mistakes."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from lasnn.errors import printable, unknown
from lasnn.recipe.schema import (
    AugmentTable,
    DataTable,
    DistillTable,
    EncoderTable,
    LossTable,
    NeuronTable,
    Recipe,
    StudentTable,
    TeacherTable,
)
from lasnn.registry import (
    describe_limits,
    describe_type,
)


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


def _line(source: str, overridden: Iterable[str], key: str, message: str) -> str:
    """One line about a key; what `--set` brought is blamed on it, not on the file."""
    blamed = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden)
    return f"{'--set' if blamed else source}: {printable(key, 100)}: {printable(message)}"


def _faults(error: ValidationError):
    """(place, message) of each of pydantic's errors, in lasnn's words."""
    seen = set()
    for fault in error.errors(include_url=False):
        if fault["loc"][-1] == "str" and isinstance(fault["input"], dict):
            continue  # "or text" is no advice for what is written as a table
        place = tuple(part for part in fault["loc"] if part not in ("str", "EncoderTable", "AugmentTable"))
        if place in seen:
            continue
        seen.add(place)
        model, info = _field(place)
        if fault["type"] == "extra_forbidden":
            message = unknown(f"key of {_title(place[:-1])}", place[-1], model.model_fields if model else ())
        elif fault["type"] == "missing":
            message = f"missing; {_title(place[:-1])} needs it"
        elif info is not None:
            kind = describe_type(info.annotation)
            message = f"{fault['input']!r} is not valid; it takes {kind}{describe_limits(info.metadata)}"
        else:
            message = f"{fault['input']!r} is not valid: {fault['msg'].lower()}"
        yield place, message


def _title(place: tuple) -> str:
    if not place:
        return "the recipe"
    return f"[[{place[0]}]]" if place[0] == "losses" else f"[{'.'.join(map(str, place))}]"


def _field(place: tuple):
    """The model that holds the last part of `place` and its field, where there is one."""
    tables = {
        "data": DataTable,
        "teacher": TeacherTable,
        "student": StudentTable,
        "distill": DistillTable,
        "losses": LossTable,
        "neuron": NeuronTable,
        "encoder": EncoderTable,
        "augment": AugmentTable,
    }
    model: type[BaseModel] = Recipe
    for part in place[:-1]:
        if isinstance(part, str):
            model = tables.get(part, model)
    return model, model.model_fields.get(place[-1]) if isinstance(place[-1], str) else None
