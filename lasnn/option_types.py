"""The types of options, in words."""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin


def describe_type(annotation: Any) -> str:
    """A type as the user of a recipe would say it: `one of "hard", "soft"`, `a number`, `a list of text`."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "anything"}
    if annotation in words:
        return words[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(value) for value in inner)
    if origin in (list, tuple):
        return f"a list ({describe_type(inner[0])} each)" if inner else "a list"
    if origin is dict:
        return f"a table ({describe_type(inner[1])} each)"
    if origin is Annotated:
        said = describe_type(inner[0])
        if length := exact_length(annotation.__metadata__):
            said = said.replace("a list", f"a list of {length}", 1)
        return said + describe_limits(annotation.__metadata__)
    if inner:  # a union
        return " or ".join(describe_type(part) for part in inner if part is not type(None))
    return "a table" if hasattr(annotation, "model_fields") else getattr(annotation, "__name__", str(annotation))


def exact_length(metadata: Iterable[Any]) -> int | None:
    """How many values a list must have, None where pydantic's metadata leaves it open."""
    bounds = [bound for item in metadata for bound in (getattr(item, "metadata", None) or [item])]
    least, most = (
        next((getattr(bound, name) for bound in bounds if hasattr(bound, name)), None)
        for name in ("min_length", "max_length")
    )
    return least if least == most else None


def describe_limits(metadata: Iterable[Any]) -> str:
    """The bounds that pydantic's metadata puts on a value: ` (>= 0 and < 1)`, or nothing."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [bound for item in metadata for bound in (getattr(item, "metadata", None) or [item])]
    parts = [
        f"{sign} {getattr(bound, name):g}"
        for bound in bounds
        for name, sign in signs.items()
        if getattr(bound, name, None) is not None
    ]
    return f" ({' and '.join(parts)})" if parts else ""
