import os
import signal

# Before torch is imported: networks this small run fastest on one thread, and a shared machine does not stretch the
# tests tenfold.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell's background job ignores Ctrl-C, and what it starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from common import TINY, TINY_DATA, Command


@pytest.fixture(autouse=True)
def registries_as_they_were():
    """What a test registers, itself or by a plugin, is forgotten after it."""
    from lasnn.recipe import plugins
    from lasnn.registry import REGISTRIES

    kept = {registry: dict(registry._entries) for registry in REGISTRIES.values() if registry.names()}
    loaded = dict(plugins._loaded_plugins)
    yield
    for registry, entries in kept.items():
        registry._entries = entries
    plugins._loaded_plugins.clear()
    plugins._loaded_plugins.update(loaded)


@pytest.fixture(scope="session")
def trained_teachers(tmp_path_factory):
    """A cache of trained teachers that tests share: what defines a teacher is its key."""
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def cached_teachers(tmp_path, trained_teachers):
    """Let runs in the test's folder take their teachers from the shared cache, and add to it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "teachers").symlink_to(trained_teachers)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a tiny recipe and its plugin, made the working directory; returns the recipe's path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_clothes.py").write_text(TINY_DATA)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text('plugins = ["tiny_clothes.py"]\n' + TINY)
    return recipe


@pytest.fixture
def lasnn(tmp_path):
    return Command(tmp_path)
