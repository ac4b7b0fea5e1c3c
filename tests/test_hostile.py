"""Recipes and checkpoints that are broken, by accident or on purpose: one line that names the fault."""

import copy
import datetime
import json
import os
import re
import signal
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from lasnn import weights
from lasnn.errors import UserError
from lasnn.foreign_weights import read_checkpoint
from lasnn.plan import Plan, read_plan
from lasnn.recipe.load import shipped

# The same examples every time; no shrinking, which would read hundreds of recipes more.
QUIET = settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

# What a recipe may say, and what it may not, in TOML's types.
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e308, 5e-324]),
)
WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["", "..", "../up", "/etc/passwd", "stage1:stage9", "vgg9", "if", "cuda:9", "NaN", "x" * 5000]),
)
PLAIN = st.one_of(NUMBERS, WORDS, st.booleans(), st.just(datetime.datetime(2026, 1, 1)), st.just(datetime.time(1)))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def changed_tables(draw):
    """A shipped recipe whose keys, types or values were changed in one to three places."""
    tables = copy.deepcopy(draw(st.sampled_from(TABLES)))
    for _ in range(draw(st.integers(1, 3))):
        holders = list(holders_of(tables))
        here, place = draw(st.sampled_from(holders))
        what = draw(st.sampled_from(["value", "key", "remove", "add", "wrap"]))
        if what == "value":
            here[place] = draw(VALUES)
        elif what == "remove":
            del here[place]
        elif what == "wrap":
            here[place] = draw(st.sampled_from([[here[place]], {"name": here[place]}, [[here[place]] * 2]]))
        elif isinstance(here, dict):
            value = here.pop(place) if what == "key" else draw(VALUES)
            here[draw(st.one_of(WORDS, st.just(f"{place}s"), st.sampled_from(KEYS)))] = value
        if not list(holders_of(tables)):
            break
    return toml(tables).encode()


def holders_of(value):
    """(table or list, key) of everything in nested tables."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from holders_of(inner)


def toml(tables):
    """Nested tables in TOML, any key and value of it; lasnn's own writer has only a recipe's."""
    return "".join(f"{key_of(key)} = {value_of(value)}\n" for key, value in tables.items())


def key_of(key):
    return json.dumps(key, ensure_ascii=False).replace("\x7f", "\\u007f")


def value_of(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key_of(key)} = {value_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(value_of, value)) + "]"
    if isinstance(value, str):
        return key_of(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) or "." in repr(value) else repr(value).replace("e", ".0e")
    return str(value)


@st.composite
def changed_text(draw):
    """A shipped recipe's bytes with something in, out, over again, cut off, or in another encoding."""
    content = draw(st.sampled_from(TEXTS)).encode()
    at, end = sorted(draw(st.integers(0, len(content))) for _ in range(2))
    how = draw(st.sampled_from(["insert", "remove", "cut", "repeat", "nest", "digits", "encode", "dots"]))
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    if how == "remove":
        return content[:at] + content[end:]
    if how == "cut":
        return content[:at]
    if how == "repeat":
        return content[:end] + content[at:end] * draw(st.sampled_from([1, 100, 5000])) + content[end:]
    if how == "nest":
        return content + b"\nx = " + draw(st.sampled_from([b"[", b"{a="])) * draw(st.sampled_from([20, 5000]))
    if how == "digits":
        return b"seed = " + b"9" * draw(st.sampled_from([30, 5000])) + b"\n" + content
    if how == "dots":
        return b".".join([b"a"] * draw(st.sampled_from([18, 3000]))) + b" = 1\n" + content
    return content.decode().encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])))


TEXTS = [path.read_text(encoding="utf-8") for path in shipped().values()]


def _tables():
    import tomllib

    return [tomllib.loads(text) for text in TEXTS]


TABLES = _tables()
KEYS = sorted({key for tables in TABLES for here, key in holders_of(tables) if isinstance(key, str)})


@contextmanager
def in_time(seconds):
    """A hang is a failure, not a wait."""

    def late(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(path):
    """Read a recipe: the lines that refuse it, none where it is good."""
    with in_time(60):
        try:
            assert isinstance(read_plan(str(path)), Plan)
            return ()
        except UserError as error:
            return error.problems or ("nothing at all",)


def check(tmp_path, content):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    for problem in refused(path):
        assert "\n" not in problem
        assert len(problem) < 2000
        # The key comes after the file's name; TOML's own errors have a line, or are about the end of the file.
        named = re.match(rf"{re.escape(str(path))}: (line \d+|[^ ].*?): ", problem, re.DOTALL)
        assert named or re.search(r"\(at (line \d+, column \d+|end of document)\)$", problem), problem
    assert os.listdir(tmp_path) == ["recipe.toml"]


def test_changed_recipes_are_refused_in_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings(QUIET, max_examples=40)(given(changed_tables())(lambda content: check(tmp_path, content)))()


def test_changed_text_is_refused_in_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings(QUIET, max_examples=25)(given(changed_text())(lambda content: check(tmp_path, content)))()


@pytest.mark.full
def test_five_hundred_changed_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings(QUIET, max_examples=350)(given(changed_tables())(lambda content: check(tmp_path, content)))()
    settings(QUIET, max_examples=150)(given(changed_text())(lambda content: check(tmp_path, content)))()


def test_the_command_refuses_them_alike(lasnn, tmp_path):
    """As a process: exit code 2, lines on standard error, no run folder."""
    path = tmp_path / "recipe.toml"
    for content in (
        TEXTS[0].encode("utf-16"),
        TEXTS[0].encode() + b"\nx = " + b"[" * 5000,
        b"seed = " + b"9" * 5000 + b"\n" + TEXTS[0].encode(),
        TEXTS[0].encode() + b"#" * 2**20,
        b"student = 3\n[data]\nname = {}\n\n[teacher]\narchitecture = []\n",
    ):
        path.write_bytes(content)
        lines = lasnn("distill", "recipe.toml", code=2).stderr.splitlines()
        assert lines
        assert all(re.match(r"lasnn: recipe.toml: (line \d+|student|data|teacher)", line) for line in lines)
        assert os.listdir(tmp_path) == ["recipe.toml"]


def a_state():
    """The state of a small training, with all that a run's has: tensors of several types, numbers, text, None."""
    draws = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    for value in module.parameters():
        value.data = torch.rand(value.shape, generator=draws)
    optimizer = torch.optim.AdamW(module.parameters())
    module[2](torch.rand(3, 4, generator=draws)).sum().backward()
    optimizer.step()
    return {
        "phase": "student",
        "epoch": 3,
        "step": 7,
        "teacher": None,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sums": {"loss": torch.tensor(0.5, dtype=torch.float64)},
        "latest": {"accuracy": 0.25},
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@st.composite
def damage(draw):
    """What befalls a file, as a function of its bytes: bits flipped, bytes overwritten, in, out, cut off."""
    share = st.floats(0, 1, exclude_max=True)
    how = draw(st.sampled_from(["flip", "flip", "overwrite", "insert", "remove", "cut", "zero"]))
    places = draw(st.lists(share, min_size=1, max_size=3))
    bit, some, length = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=16)), draw(st.integers(1, 600))

    def change(content):
        content = bytearray(content)
        at = int(places[0] * len(content))
        if how == "flip":
            for place in places:
                content[int(place * len(content))] ^= 1 << bit
        elif how == "overwrite":
            content[at : at + len(some)] = some[: len(content) - at]
        elif how == "insert":
            content[at:at] = some
        elif how == "remove":
            del content[at : at + length]
        elif how == "zero":
            content[at : at + length] = bytes(len(content[at : at + length]))
        else:
            del content[at:]
        return bytes(content)

    return change


def damaged(path, load, examples):
    """Damage a file again and again: it loads as it was, or is refused in a line that names it."""
    whole, wanted, found = path.read_bytes(), load(path), []

    def check_damaged(change):
        path.write_bytes(change(whole))
        try:
            with in_time(60):
                loaded = load(path)
        except UserError as error:
            [problem] = error.problems
            assert str(path) in problem
            assert "\n" not in problem
            found.append(problem)
            return
        now = path.read_bytes()
        changed = [at for at, pair in enumerate(zip(whole, now, strict=False)) if pair[0] != pair[1]]
        assert same(loaded, wanted), f"{len(whole)} -> {len(now)} bytes, changed at {changed[:20]}"

    settings(QUIET, max_examples=examples)(given(damage())(check_damaged))()
    # Padding and a zip's dates may change unnoticed, and nothing else: most damage is found.
    assert len(found) > examples / 2


FILES = {
    "last.pt": (lambda path: weights.save_state(path, a_state()), weights.load_state),
    "student.safetensors": (
        lambda path: weights.save_weights(path, a_state()["module"], {"architecture": "vgg9", "recipe": TEXTS[0]}),
        weights.load_weights,
    ),
    # A teacher's checkpoint of somebody else.
    "teacher.pth": (lambda path: torch.save(a_state()["module"], path), lambda path: read_checkpoint(path).weights),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_found(tmp_path, name):
    write, load = FILES[name]
    write(tmp_path / name)
    damaged(tmp_path / name, load, 100)


@pytest.mark.full
@pytest.mark.parametrize("name", FILES)
def test_thousands_of_damaged_files_are_found(tmp_path, name):
    write, load = FILES[name]
    write(tmp_path / name)
    damaged(tmp_path / name, load, 3000)


def test_every_bit_of_a_small_file_of_weights(tmp_path):
    """All single flips: none of them is missed, in the header, the description or the weights."""
    path = tmp_path / "w.safetensors"
    weights.save_weights(path, {"a": torch.arange(3.0), "n": torch.tensor(3)}, {"architecture": "vgg9"})
    whole, wanted = path.read_bytes(), weights.load_weights(path)
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert same(weights.load_weights(path), wanted), f"bit {bit}"
        except UserError as error:
            problem = str(error)
        else:
            continue
        assert str(path) in problem
