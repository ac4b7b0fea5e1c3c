"""The user's own code that a recipe names."""

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lasnn.errors import UserError

# Nothing runs a recipe's code unseen: each plugin is named before it is loaded.
log = logging.getLogger("lasnn")


_loaded_plugins: dict[str, str] = {}


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


def _import_module(name: str) -> None:
    """Import a module, and say where it lies the first time."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        log.info("plugin: %s", spec.origin or name if spec else name)
    importlib.import_module(name)


def _import_once(path: Path) -> None:
    """Import a file; the copy of a file that is already loaded (a run folder's) registers nothing twice."""
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    if content in _loaded_plugins:
        return
    log.info("plugin: %s", path.resolve())
    name = f"lasnn_plugin_{path.stem}_{content[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded_plugins[content] = name
