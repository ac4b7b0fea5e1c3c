"""A recipe as text: TOML, `--set`, the shipped recipes, and writing one. What its keys mean is not known here."""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasnn.errors import UserError, printable, unknown
from lasnn.recipe.paths import expanded

# Bytes of a recipe's file, and levels of its tables and lists: what is beyond is no recipe.
LARGEST, DEEPEST = 2**20, 16
# The lists of tables, and what one looks like.
LISTS = {
    "losses": '[{name="cross-entropy"}, {name="attention"}]',
    "data.augment": '["flip", {name="cutout"}]',
}
LARGEST_INTEGER, LARGEST_SEED = 2**31 - 1, 2**63 - 1


def parse(content: bytes, source: str) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: it is no TOML; one line that names the line of the file.
    """
    if len(content) > LARGEST:
        lines = content.count(b"\n")
        raise UserError(f"{source}: line {lines}: it goes on after {LARGEST:,} bytes; that is no recipe")
    try:
        # Editors on Windows put a byte-order mark first, and end lines by a carriage return and a line feed.
        text = content.decode("utf-8-sig")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        at = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}: line {at}: not valid TOML: it is not UTF-8 ({error.reason})") from error
    except RecursionError as error:
        at = max(enumerate(text.splitlines(), 1), key=lambda line: line[1].count("[") + line[1].count("{"))[0]
        raise UserError(f"{source}: line {at}: not valid TOML: nested too deeply") from error
    except ValueError as error:
        if str(error).startswith("Cannot ") and (said := _given_twice(text, str(error))):
            raise UserError(f"{source}: {said}") from error
        # TOML's own errors name their line; Python's limit on the digits of a number does not.
        long = re.search(r"\d[\d_]{4000}", text) if not isinstance(error, tomllib.TOMLDecodeError) else None
        where = f"line {text.count(chr(10), 0, long.start()) + 1}: " if long else ""
        raise UserError(f"{source}: {where}not valid TOML: {str(error).partition(';')[0]}") from error


def _given_twice(text: str, reason: str) -> str | None:
    """The line for a key or a table that stands in a TOML file for the second time; None where it is not found.

    tomllib says where the second definition ends, by its line or as the end of the document, and not of what it is.
    """
    lines = text.split("\n")
    named = re.search(r"\(at line (\d+)", reason)
    last = int(named.group(1)) if named else len(lines)
    # It begins behind the longest part of the file that is TOML; a value may go over several lines.
    for start in range(last - 1, max(-1, last - 200), -1):
        try:
            tomllib.loads("\n".join(lines[:start]))
        except ValueError:
            continue
        # Blank lines and comments may come before it.
        while start < last - 1 and (not lines[start].strip() or lines[start].lstrip().startswith("#")):
            start += 1
        table = next((line.strip() for line in reversed(lines[:start]) if re.match(r"\s*\[[^=]*\]\s*(#|$)", line)), "")
        if lines[start].lstrip().startswith("["):
            return f"line {start + 1}: not valid TOML: the table {lines[start].strip()} is given twice"
        key = lines[start].partition("=")[0].strip()
        return f"line {start + 1}: not valid TOML: {key!r} is given twice{f' in {table}' if table else ''}"
    return None


def beyond(tables: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(place, message) of values that no recipe has: tables in tables without end, numbers that no size can be."""
    inner: list[tuple[tuple[str | int, ...], Any]] = [((), tables)]
    while inner:
        place, value = inner.pop()
        if len(place) > DEEPEST:
            yield place, "is nested deeper than any key of a recipe"
            continue
        largest = LARGEST_SEED if place == ("seed",) else LARGEST_INTEGER
        if isinstance(value, int) and abs(value) > largest:
            yield place, f"{value if abs(value) < 1e40 else 'a number of very many digits'} is too large"
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        inner += [((*place, name), item) for name, item in pairs]


def key_of(place: tuple[str | int, ...]) -> str:
    """A place as a recipe's user writes it: `losses.0.weight`."""
    return ".".join(map(str, place))


def find(recipe: str | Path) -> Path:
    """The file of a recipe given as a path or as a shipped recipe's name.

    Raises:
        UserError: there is neither.
    """
    path = expanded(recipe, "the recipe")
    if path.is_file():
        return path
    known = shipped()
    if str(recipe) in known:
        return known[str(recipe)]
    if path.is_dir() and (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    if path.is_dir():
        raise UserError(
            f"{path} is a folder without a recipe.toml; for a folder of pictures `lasnn init {path}` writes one"
        )
    # A path drops the ./ that it was written with.
    if path.suffix or set("/\\") & set(str(recipe)):
        near = f"; the recipe that ships is called {path.stem}, without folder or ending" if path.stem in known else ""
        raise UserError(f"no file {path}{near}")
    raise UserError(f"no file {path}, and {unknown('recipe', path.stem, known)}")


def shipped() -> dict[str, Path]:
    """The recipes that come with lasnn, name -> file."""
    import lasnn.recipes

    folder = Path(lasnn.recipes.__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def summary(path: Path) -> str:
    """What a recipe file says of itself: the first line of its header comment, behind the line for editors."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if not line.startswith("#:")), "").removeprefix("#").strip()


@dataclass(frozen=True)
class Read:
    """What a file and its overrides say, not yet checked.

    Args:
        tables: nested dicts, as `tomllib` returns them.
        source: the file.
        overridden: keys that `--set` brought.
        problems: a line for each override that cannot be applied.
    """

    tables: dict[str, Any]
    source: str
    overridden: set[str]
    problems: list[str]


def read(recipe: str | Path, overrides: Iterable[str] = ()) -> Read:
    """Read a recipe's file, given as a path or as a shipped recipe's name, and apply the overrides in order; one alone
    may be a text.

    Raises:
        UserError: there is no such file, or it is no TOML.
    """
    path = find(recipe)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    found = Read(parse(content, str(path)), str(path), set(), [])
    for setting in [overrides] if isinstance(overrides, str) else overrides:
        try:
            found.overridden.add(_override(found.tables, setting))
        except ValueError as error:
            found.problems.append(f"--set {printable(setting)}: {error}")
    return found


def _override(tables: dict[str, Any], setting: str) -> str:
    """Apply `a.b=c` to the tables; returns the key. `losses.attention.weight` finds a list's entry by its name, and is
    returned with the entry's number.
    """
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError("write it as key=value, for example student.timesteps=2")
    if not setting.isprintable() and any("\ud800" <= character <= "\udfff" for character in setting):
        raise ValueError("it is not UTF-8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    steps: list[str | int] = []
    here: Any = tables
    for step in key.split("."):
        if steps:
            where = ".".join(map(str, steps))
            if isinstance(here, dict) and steps[-1] not in here:
                if where in LISTS:
                    raise ValueError(f"the recipe leaves {where} out; give the whole list, as {where}={LISTS[where]}")
                if not text.strip():
                    raise ValueError("the recipe has no such key to remove")
                here[steps[-1]] = {}
            here = here[steps[-1]]
            if not isinstance(here, (dict, list)):
                as_table = f'; give the table, as {where}={{name="{here}", ...}}' if isinstance(here, str) else ""
                raise ValueError(f"{where} is a value, not a table{as_table}")
        steps.append(_entry(here, step, ".".join(map(str, steps))) if isinstance(here, list) else step)
    if text.strip():
        here[steps[-1]] = value
    elif isinstance(here, list) or steps[-1] in here:
        del here[steps[-1]]
    else:
        raise ValueError("the recipe has no such key to remove")
    return ".".join(map(str, steps))


def _entry(entries: list, step: str, where: str) -> int:
    """The number of the list's entry that is named `step`, or has that number."""
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("name") == step:
            return number
    if step.isdecimal() and int(step) < len(entries):
        return int(step)
    names = [str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry]
    further = f"; a further one needs the whole list, as {where}={LISTS[where]}" if where in LISTS else ""
    raise ValueError(unknown(f"entry of {where}", step, names) + further)


def dump_toml(tables: dict[str, Any], prefix: str = "") -> str:
    """Nested dicts as TOML: values first, then tables, then lists of tables."""
    values, nested = [], []
    for name, value in tables.items():
        key = toml_key(name)
        if isinstance(value, dict):
            nested.append(f"\n[{prefix}{key}]\n{dump_toml(value, f'{prefix}{key}.')}")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            nested += [f"\n[[{prefix}{key}]]\n{dump_toml(item, f'{prefix}{key}.')}" for item in value]
        else:
            values.append(f"{key} = {toml_value(value)}\n")
    return "".join(values + nested)


def toml_key(key: str) -> str:
    """A key as TOML: bare where it can be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_value(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{toml_key(key)} = {toml_value(item)}' for key, item in value.items())} }}"
    # JSON's text, true, false and finite numbers are TOML's as well; its NaN and Infinity are not, nor a bare DEL.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text, text)
