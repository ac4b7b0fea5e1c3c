"""The user's own code that a recipe names."""

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lasnn.errors import UserError
from lasnn.registry import PLUGIN, Entry, Registry, recorded

# Nothing runs a recipe's code unseen: each plugin is named before it is loaded.
log = logging.getLogger("lasnn")

# What each version of a plugin registered, by the digest of its content: several may be used in one process, as those
# in the folders of two runs.
_loaded_plugins: dict[str, list[tuple[Registry, Entry]]] = {}
# The version of each module that was imported last.
_imported: dict[str, str] = {}


def is_file(plugin: str) -> bool:
    """Whether a recipe's plugin is a file, not a module."""
    return plugin.endswith(".py") or "/" in plugin


def load_plugins(plugins: Iterable[str], folder: Path) -> Iterator[tuple[int, str]]:
    """Import the plugins; yields (number, message) for those that fail.

    Args:
        plugins: file names or modules.
        folder: where the files lie, beside the recipe.
    """
    for number, plugin in enumerate(plugins):
        try:
            if not is_file(plugin):
                _import_module(plugin)
                continue
            path = folder / plugin
            if Path(plugin).name != plugin:
                yield number, f"{plugin!r} must lie beside the recipe, in {folder.resolve()}"
            elif not path.is_file():
                yield number, f"no file {path}; a plugin is a Python file beside the recipe, or a module's name"
            else:
                _import_once(path)
        except UserError as error:
            yield number, f"{plugin}: {error}"
        except Exception as error:
            # Whatever the user's code raises is the user's to mend; the line says where it was raised.
            if isinstance(error, ModuleNotFoundError) and not is_file(plugin) and plugin.startswith(error.name or "-"):
                yield number, f"no module {error.name!r}; install it, or name its folder in PYTHONPATH"
                continue
            yield number, f"{plugin} cannot be imported: {type(error).__name__}: {error}{_place_in(plugin, error)}"


def _place_in(plugin: str, error: BaseException) -> str:
    place, traceback = "", error.__traceback__
    while traceback:
        if Path(traceback.tb_frame.f_code.co_filename).name == Path(plugin).name:
            place = f" (line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


def version_of(file: Path) -> str:
    """What tells a version of a plugin from others: a digest of its content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def module_version(file: Path) -> str:
    """The same of a module; of one in a package its place there and all modules, which it may be made of."""
    top = file
    while (top.parent / "__init__.py").is_file():
        top = top.parent
    if top == file:
        return version_of(file)
    parts = [(str(part.relative_to(top)), version_of(part)) for part in sorted(top.rglob("*.py"))]
    return hashlib.sha256(repr((str(file.relative_to(top)), parts)).encode()).hexdigest()


def use_version(version: str) -> None:
    """Let what a version of a plugin registered count under its names, whatever other versions were loaded since."""
    for registry, entry in _loaded_plugins.get(version, ()):
        registry.put(entry)


def module_file(name: str) -> Path | None:
    """Where a module lies; None where it is not to be found, or is no file. It need not be imported: of two with the
    same content one is.
    """
    seen = sys.modules.get(name)
    spec = seen.__spec__ if seen else importlib.util.find_spec(name)
    return Path(spec.origin) if spec and spec.has_location else None


def _import_module(name: str) -> None:
    """Import a module, again where its file was edited since, and say where it lies."""
    seen, file = sys.modules.get(name), module_file(name)
    version = module_version(file) if file else name
    if version in _loaded_plugins or (seen and _imported.get(name, version) == version):
        use_version(version)
    else:
        log.info("plugin: %s", file or name)
        with _recorded(version):
            if seen:
                _forget_siblings(name)
                importlib.reload(seen)
            else:
                importlib.import_module(name)
    _imported[name] = version


def _forget_siblings(name: str) -> None:
    """Let the other modules of a module's package be read again too, but for those that it lies in."""
    top = name.partition(".")[0]
    for other in [
        other for other in sys.modules if other.startswith(f"{top}.") and not f"{name}.".startswith(f"{other}.")
    ]:
        module = sys.modules.pop(other)
        parent, _, child = other.rpartition(".")
        # Or `from . import` would find it there.
        if parent in sys.modules and getattr(sys.modules[parent], child, None) is module:
            delattr(sys.modules[parent], child)


def _import_once(path: Path) -> None:
    """Import a file; the copy of a file that is already loaded (a run folder's) is not run again."""
    version = version_of(path)
    if version in _loaded_plugins:
        use_version(version)
        return
    log.info("plugin: %s", path.resolve())
    name = f"{PLUGIN}{path.stem}_{version[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _recorded(version):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


@contextmanager
def _recorded(version: str) -> Iterator[None]:
    """Keep what is registered within the block as that of a plugin's version."""
    with recorded() as parts:
        yield
    _loaded_plugins[version] = parts
