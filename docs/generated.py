"""Parts of the site that are made from the code when it is built: a Sphinx extension.

A line `<!-- generated: KIND [ARGUMENT] -->` of a page is replaced by Markdown, before the page is parsed: `keys` of a
recipe, `commands`, `parts` of all registries, `recipes`, the cards of `models`, the `api` of a module, and a `file` of
the checkout.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^<!-- generated: (\w+) ?(\S*) -->$", re.MULTILINE)


def generate(kind: str, argument: str = "") -> str:
    """The Markdown that stands for a mark."""
    return {
        "keys": keys,
        "commands": commands,
        "parts": parts,
        "recipes": recipes,
        "models": models,
        "api": lambda: api(argument),
        "file": lambda: file(argument),
    }[kind]()


def keys() -> str:
    """Every key of a recipe, table by table, as the schema's fields and their descriptions say."""
    from lasnn.recipe.messages import fields

    found = []
    for title, model in tables():
        rows = [
            (f"`{key}`", kind, shown(default), re.sub(r"docs/(\w+)\.md", r"[](/\1.md)", meaning))
            for key, kind, default, meaning in fields(model)
            if not is_table(model, key)
        ]
        head = [f"## {title}", first_line(model.__doc__)] if title else ["## The head", "Keys before the first table."]
        found += [*head, table(("key", "allowed values", "default", "meaning"), rows)]
    return "\n\n".join(found)


def tables() -> Iterator[tuple[str, type]]:
    """(title, model) of each table of a recipe, in the order of the file; the head's title is empty."""
    from lasnn.recipe.schema import Recipe

    def walk(title: str, model: type, many: bool = False) -> Iterator[tuple[str, type]]:
        yield (f"[[{title}]]" if many else f"[{title}]") if title else "", model
        for name, info in model.model_fields.items():
            for inner, many in models_in(info.annotation):
                yield from walk(f"{title}.{name}".lstrip("."), inner, many)

    yield from walk("", Recipe)


def models_in(annotation: Any, many: bool = False) -> Iterator[tuple[type, bool]]:
    """The tables that a field may hold, and whether in a list."""
    from typing import get_args, get_origin

    from pydantic import BaseModel

    if inspect.isclass(annotation) and get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            yield annotation, many
        return
    for one in get_args(annotation):
        yield from models_in(one, many or get_origin(annotation) is list)


def is_table(model: type, key: str) -> bool:
    """Whether a key can hold nothing but a table, or tables, of its own."""
    from lasnn.option_types import describe_type

    kind = describe_type(model.model_fields[key].annotation)
    return kind in ("a table", "a list (a table each)")


def shown(default: Any) -> str:
    """A default as a recipe would write it."""
    if default is None or default == "required":
        return default or ""
    text = {True: "true", False: "false"}[default] if isinstance(default, bool) else f"{default!r}".replace("'", '"')
    return f"`{text}`"


def commands() -> str:
    """Every command with its arguments and options."""
    import click
    import typer.main

    from lasnn import cli

    def walk(command: click.Command, name: str) -> Iterator[str]:
        inner = getattr(command, "commands", {})
        if not inner:
            usage = " ".join([name, *command.collect_usage_pieces(click.Context(command, info_name=name))])
            usage = usage.replace("[[", "[").replace("]]", "]").replace("{", "").replace("}", "")
            rows = []
            for parameter in command.params:
                record = parameter.get_help_record(click.Context(command)) or (parameter.name, "")
                rows.append((f"`{' '.join(record[0].split())}`", " ".join(record[1].split())))
            yield f"## {name}"
            yield escape(inspect.cleandoc(command.help or ""))
            yield f"```text\n{usage}\n```"
            yield table(("argument or option", "meaning"), [(given, escape(said)) for given, said in rows])
        for one, below in inner.items():
            yield from walk(below, f"{name} {one}")

    return "\n\n".join(walk(typer.main.get_command(cli.app), "lasnn"))


def parts() -> str:
    """Every registered part with its documentation and its options."""
    from lasnn.registry import REGISTRIES, REQUIRED

    found = []
    for kind, registry in REGISTRIES.items():
        found.append(f"## {kind.capitalize()}")
        for name in registry:
            entry = registry[name]
            options = {
                option: info
                for option, info in entry.options.items()
                if kind not in ("architectures", "teachers") or option not in ("in_channels", "num_classes")
            }
            rows = [
                (f"`{option}`", info.type_name, "required" if info.default is REQUIRED else shown(info.default))
                for option, info in options.items()
            ]
            found += [f"### {name}", docstring(entry.function)]
            if kind == "losses":
                found.append(f"It asks for {', '.join(f'`{one}`' for one in entry.inputs)}.")
            if rows:
                found.append(table(("option", "allowed values", "default"), rows))
    return "\n\n".join(found)


def models() -> str:
    """The cards of the students that ship, their titles below that of the page."""
    from lasnn.run import shipped_models

    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in shipped_models().values()]
    return "\n\n".join(f"#{card}" for card in cards)


def recipes() -> str:
    """Every shipped recipe with its first line."""
    from lasnn.recipe.load import shipped, summary

    rows = [(f"`{name}`", escape(summary(path))) for name, path in shipped().items()]
    return table(("recipe", "what it is"), rows)


def api(module: str) -> str:
    """The public names of a module: signatures and docstrings."""
    from lasnn.registry import REGISTRIES

    home = import_module(module)
    registered = [registry[name].function for registry in REGISTRIES.values() for name in registry]
    found = [f"```{{py:module}} {module}\n```"]
    for name in home.__all__:
        value = getattr(home, name)
        if value in registered:
            # The reference of parts has the whole of it.
            kind = "class" if inspect.isclass(value) else "function"
            found.append(f"````{{py:{kind}}} {name}{signature(value)}\n\n{escape(first_line(value.__doc__))}\n````")
        elif inspect.isclass(value):
            found.append(described("class", name, value, [*attributes(value), *members(value)]))
        elif callable(value):
            found.append(described("function", name, value))
        else:
            said = (
                f"`{value!r}`"
                if isinstance(value, str | tuple)
                else f"Registered: {', '.join(f'`{one}`' for one in value)}."
            )
            found.append(f"````{{py:data}} {name}\n\n{said}\n````")
    return "\n\n".join(found)


def attributes(value: type) -> list[str]:
    """A list of the attributes that a class asks of the user's own classes."""
    if not for_subclasses(value):
        return []
    found = []
    for name, kind in inspect.get_annotations(value).items():
        default = f", left out `{getattr(value, name)!r}`" if hasattr(value, name) else ""
        found.append(f"- `{name}`: `{inspect.formatannotation(kind).replace('torch.', '')}`{default}")
    return ["**Attributes**", "\n".join(found)] if found else []


def for_subclasses(value: Any) -> bool:
    """Whether a class has no constructor, since classes of the user's own follow it."""
    return getattr(value, "_is_protocol", False) or (inspect.isabstract(value) and value.__init__ is object.__init__)


def members(value: type) -> list[str]:
    """The documented public methods that a class defines itself."""
    return [
        described("method", name, method)
        for name, method in ((name, getattr(value, name)) for name in vars(value) if not name.startswith("_"))
        if (inspect.isfunction(method) or inspect.ismethod(method))
        and method.__module__.startswith("lasnn")
        and method.__doc__
    ]


def described(kind: str, name: str, value: Any, inner: Iterable[str] = ()) -> str:
    fence = "````" if kind == "method" else "``````"
    body = "\n\n".join([docstring(value), *inner])
    return f"{fence}{{py:{kind}}} {name}{signature(value)}\n\n{body}\n{fence}"


def signature(value: Any) -> str:
    """The parameters, without the types, which are long; the docstring has what they take."""
    if hasattr(value, "model_fields") or for_subclasses(value):
        # A recipe's tables are made by reading a file; the reference of keys has their fields.
        return ""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = [
        parameter.replace(annotation=parameter.empty)
        for name, parameter in found.parameters.items()
        if name not in ("self", "cls")
    ]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


SECTION = re.compile(r"^(Args|Returns|Args, returns|Raises|Attributes|Source): *(.*)$")


def docstring(value: Any) -> str:
    """A docstring as Markdown: its sections as lists, what is indented as code."""
    found, code, inside = [], [], False
    for line in [*inspect.cleandoc(value.__doc__ or "").splitlines(), "end"]:
        section = SECTION.match(line)
        if code and (line.strip() and not line.startswith("    ")):
            found += ["", "```python", *inspect.cleandoc("\n".join(code)).splitlines(), "```", ""]
            code = []
        if line == "end":
            break
        if section:
            inside = True
            found += ["", f"**{section[1]}**", "", escape(section[2])]
        elif not inside and (line.startswith("    ") or (code and not line.strip())):
            code.append(line)
        elif inside and line and not line.startswith(" "):
            inside = False
            found += ["", escape(line)]
        elif inside and re.match(r"^ {4}\S", line):
            name, colon, said = line.strip().partition(": ")
            named = colon and re.fullmatch(r"[\w, *]+", name)
            found.append(
                f"- `{name}`: {escape(said)}" if named else f"{'- ' if found[-1] == '' else '  '}{escape(line.strip())}"
            )
        elif inside and line.strip():
            found.append(f"  {escape(line.strip())}")
        else:
            found.append(escape(line))
    return "\n".join(found).strip()


def escape(text: str) -> str:
    """Text in which Markdown's marks outside of backticks stand for themselves."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(one if one.startswith("`") else re.sub(r"([*<>\[\]_|])", r"\\\1", one) for one in pieces)


def file(name: str) -> str:
    """A Markdown file of the checkout, its links as they are from the site's root."""
    text = (ROOT / name).read_text(encoding="utf-8")

    def link(found: re.Match) -> str:
        target = (ROOT / name).parent / found[1]
        inside = target.resolve().relative_to(ROOT)
        return f"](/{SITE.get(str(inside)) or inside.relative_to('docs')}{found[2] or ''})"

    return re.sub(r"\]\(([^)#:]+)(#[^)]*)?\)", lambda found: link(found) if found[1] else found[0], text)


# Where the site has a file that lies outside docs/.
SITE = {
    "kernels/README.md": "reference/kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    rows = [[re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def replace(app: Any, page: str, source: list[str]) -> None:
    """Put what is generated in the place of its marks."""
    source[0] = MARK.sub(lambda found: generate(found[1], found[2]), source[0])


def spread(app: Any, environment: Any, pages: list[str]) -> None:
    """Put executed pages between the others, so that each process that reads has its share of them."""
    executed = [page for page in pages if "file_format: mystnb" in Path(environment.doc2path(page)).read_text()]
    plain = [page for page in pages if page not in executed]
    pages[:] = [page for pair in zip_longest(executed, plain) for page in pair if page]


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", replace)
    app.connect("env-before-read-docs", spread)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
