"""The JSON schema of recipes, for editors: the tables of `schema.py` and the options of every registered part.

It is draft 7, which editors' TOML servers read. A table's name decides its options, as in lasnn; the options of all
parts stand among the table's properties as well, where an editor looks for what it can offer. What a schema cannot say
(which keys contradict each other, what fits the images) remains lasnn's to find.
"""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import PydanticUserError, TypeAdapter

from lasnn.recipe.check import SUPPLIED
from lasnn.recipe.schema import (
    AugmentTable,
    DataTable,
    EncoderTable,
    LossTable,
    NeuronTable,
    Recipe,
    Section,
    StartTable,
    StudentTable,
    TeacherTable,
)
from lasnn.registry import (
    REQUIRED,
    Entry,
    Registry,
    architectures,
    augmentations,
    datasets,
    encoders,
    losses,
    neurons,
    teachers,
)

DRAFT = "http://json-schema.org/draft-07/schema#"
# The schema that is shipped beside the recipes.
FILE = "recipe.schema.json"
Schema = dict[str, Any]


@dataclass(frozen=True)
class NamedTable:
    """A table of a recipe that names a registered part.

    Args:
        model: the table's own keys.
        key: that of the name.
        parts: those that can be named.
        supplied: options that lasnn passes itself.
    """

    model: type[Section]
    key: str
    parts: Mapping[str, Entry]
    supplied: tuple[str, ...] = ()


def tables() -> dict[str, NamedTable]:
    """The tables that name a part, by their place in the recipe."""

    def entries(*registries: Registry) -> dict[str, Entry]:
        return {name: registry[name] for registry in reversed(registries) for name in registry}

    return {
        "data": NamedTable(DataTable, "name", entries(datasets)),
        "augment": NamedTable(AugmentTable, "name", entries(augmentations)),
        "teacher": NamedTable(TeacherTable, "architecture", entries(architectures, teachers), SUPPLIED),
        "start": NamedTable(StartTable, "architecture", entries(architectures), SUPPLIED),
        "student": NamedTable(StudentTable, "architecture", entries(architectures), SUPPLIED),
        "neuron": NamedTable(NeuronTable, "name", entries(neurons)),
        "encoder": NamedTable(EncoderTable, "name", entries(encoders)),
        "losses": NamedTable(LossTable, "name", entries(losses)),
    }


def json_schema() -> Schema:
    """The schema of a recipe that names the parts which are registered now.

    A recipe without `plugins` names no others. With them a name that is not known is taken for one of theirs, and its
    options may be anything.
    """
    found = tables()
    named = {place: table_schema(table) for place, table in found.items()}
    names = {place: {"enum": sorted(table.parts)} for place, table in found.items()}
    # Inner tables are written into the properties of the outer.
    properties = {place: first(schema) for place, schema in named.items()}
    by_name = {place: name_or_table(found[place], named[place]) for place in ("encoder", "augment")}
    properties["data"]["augment"] = {
        **described(properties["data"]["augment"]),
        "type": "array",
        "items": by_name["augment"],
    }
    properties["student"]["encoder"] = {**described(properties["student"]["encoder"]), **by_name["encoder"]}
    properties["student"]["neuron"] = named["neuron"]
    root = own_properties(Recipe)
    for key, info in Recipe.model_fields.items():
        union = get_origin(info.annotation) in (Union, UnionType)
        for kind in get_args(info.annotation) if union else (info.annotation,):
            if inspect.isclass(kind) and issubclass(kind, Section):
                root[key] = named[key] if key in named else plain_table(kind)
    root["losses"] = {**described(root["losses"]), "type": "array", "items": named["losses"]}

    def of(place: str) -> Schema:
        return {"properties": {found[place].key: names[place]}}

    def either(place: str) -> Schema:
        return {"if": {"type": "string"}, "then": names[place], "else": of(place)}

    student = of("student")
    student["properties"] |= {"encoder": either("encoder"), "neuron": of("neuron")}
    data = of("data")
    data["properties"]["augment"] = {"items": either("augment")}
    made = {
        "$schema": DRAFT,
        "title": "lasnn recipe",
        "description": "An experiment of lasnn. Made by `lasnn schema`.",
        "type": "object",
        "properties": root,
        "required": [key for key, info in Recipe.model_fields.items() if info.is_required()],
        "additionalProperties": False,
        "if": {"properties": {"plugins": {"maxItems": 0}}},
        "then": {
            "properties": {
                "data": data,
                "teacher": of("teacher"),
                "start": of("start"),
                "student": student,
                "losses": {"items": of("losses")},
            }
        },
    }
    return said_open(made)


def said_open(schema: Any) -> Any:
    """The same schema, in which every table that takes other keys says so: some editors' servers (Tombi) take one that
    says nothing for one that takes none.
    """
    if isinstance(schema, list):
        return [said_open(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: said_open(value) for key, value in schema.items()}
    untyped = "type" not in schema and (isinstance(schema.get("properties"), dict) or "then" in schema)
    if untyped or schema.get("type") == "object":
        found.setdefault("additionalProperties", True)
    return found


def plain_table(model: type[Section]) -> Schema:
    """The schema of a table that names no part."""
    return {
        "type": "object",
        "description": inspect.getdoc(model),
        "properties": own_properties(model),
        "additionalProperties": model.model_config.get("extra") == "allow",
    }


def table_schema(table: NamedTable) -> Schema:
    """The schema of a table: its own keys and every part's options; then, for each name, which of them it has."""
    own = own_properties(table.model)
    options: dict[str, list[tuple[str, Schema]]] = {}
    for name, entry in table.parts.items():
        for option, schema in option_schemas(entry, table.supplied).items():
            if option not in own:
                options.setdefault(option, []).append((name, schema))
    own[table.key] |= name_schema(table)
    required = [key for key, info in table.model.model_fields.items() if info.is_required()]
    default = table.model.model_fields[table.key].get_default()
    everything = {
        "type": "object",
        "description": inspect.getdoc(table.model),
        "properties": own | {option: together(of) for option, of in options.items()},
        "required": required,
    }
    return {"allOf": [everything, *(one_part(table, name, default, set(own)) for name in sorted(table.parts))]}


def one_part(table: NamedTable, name: str, default: Any, own: set[str]) -> Schema:
    """What holds for a table that names one part; of a table that names none, for the default."""
    entry = table.parts[name]
    chosen: Schema = {"properties": {table.key: {"const": name}}}
    if name != default:
        chosen["required"] = [table.key]
    options = {option: schema for option, schema in option_schemas(entry, table.supplied).items() if option not in own}
    needed = [option for option in options if entry.options[option].default is REQUIRED]
    allowed: Schema = {
        "title": name,
        "properties": dict.fromkeys(sorted(own), True) | options,
        "additionalProperties": False,
    }
    return {"if": chosen, "then": allowed | ({"required": needed} if needed else {})}


def name_or_table(table: NamedTable, schema: Schema) -> Schema:
    """A part by its name, or as a table; what is wrong with a table is then said of its key, not of the whole."""
    loose = {"type": "object"}
    return {"anyOf": [name_schema(table), loose], "if": {"type": "object"}, "then": schema}


def first(schema: Schema) -> Schema:
    """The properties of a table's schema."""
    return schema["allOf"][0]["properties"]


def name_schema(table: NamedTable) -> Schema:
    """Text, with the names that are known as what an editor offers."""
    names = sorted(table.parts)
    docs = {"docs": {"enumValues": [table.parts[name].description for name in names]}}
    return {"type": "string", "anyOf": [{"enum": names, "x-taplo": docs}, {"type": "string"}]}


def own_properties(model: type[Section]) -> dict[str, Schema]:
    """The keys of a table's model with types, defaults and descriptions; what they refer to is left out."""
    return {key: cleaned(schema) for key, schema in model.model_json_schema()["properties"].items()}


def described(schema: Schema) -> Schema:
    """What a schema says for people."""
    return {key: schema[key] for key in ("description", "default") if key in schema}


def option_schemas(entry: Entry, supplied: tuple[str, ...]) -> dict[str, Schema]:
    """A part's options with types, defaults and descriptions."""
    found = {}
    for name, option in entry.options.items():
        if name in supplied:
            continue
        try:
            schema = cleaned(TypeAdapter(option.annotation).json_schema())
        except PydanticUserError:
            # A class or a function of the user's own, which a recipe cannot give.
            continue
        if option.default is not REQUIRED and option.default is not None:
            schema["default"] = json.loads(json.dumps(option.default, default=str))
        found[name] = schema | {"description": describe(entry, name)}
    return found


def together(parts: list[tuple[str, Schema]]) -> Schema:
    """An option of several parts: what any of them takes, and what it is in each."""
    kinds: list[Schema] = []
    texts: dict[str, list[str]] = {}
    for name, schema in parts:
        kind = {key: value for key, value in schema.items() if key not in ("description", "default")}
        if kind not in kinds:
            kinds.append(kind)
        default = f" Default: {json.dumps(schema['default'])}." if "default" in schema else ""
        texts.setdefault(schema["description"] + default, []).append(name)
    said = [f"{', '.join(names)}: {text}" for text, names in texts.items()]
    taken = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    return taken | {"description": "\n".join(said)}


def describe(entry: Entry, option: str) -> str:
    """What the docstring says of an option: its line under `Args:`, else the sentences that name it, else its type."""
    classes = entry.function.__mro__ if inspect.isclass(entry.function) else (entry.function,)
    for one in classes:
        text = inspect.cleandoc(one.__doc__ or "")
        if said := re.search(rf"^    (?:\w+, )*{option}(?:, \w+)*: (.+(?:\n      .+)*)", text, re.MULTILINE):
            return " ".join(said.group(1).split())
        sentences = re.split(r"(?<=[.:;])\s+", " ".join(text.partition("\n\n")[2].partition("Args:")[0].split()))
        if named := [sentence for sentence in sentences if f"`{option}`" in sentence]:
            return " ".join(named)
    return f"{entry.options[option].type_name[0].upper()}{entry.options[option].type_name[1:]}."


def cleaned(schema: Any) -> Any:
    """A schema as pydantic makes it without titles, without null, which TOML has not, and without references."""
    if isinstance(schema, list):
        return [cleaned(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: cleaned(value)
        for key, value in schema.items()
        if key not in ("title", "$ref", "$defs") and not (key == "default" and value is None)
    }
    if "anyOf" in found:
        found["anyOf"] = [one for one in found["anyOf"] if one != {"type": "null"}]
        if len(found["anyOf"]) == 1:
            [only] = found.pop("anyOf")
            found = only | found
    return found
