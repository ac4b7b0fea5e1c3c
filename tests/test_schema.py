"""The JSON schema of recipes: it takes what lasnn takes, and refuses of the rest what a schema can."""

import json
import subprocess
import sys
import tomllib

import pytest
from test_recipe_mistakes import (
    PARTS,
    PLAIN,
    SHIPPED,
    SUPPLIED,
    VALUES,
    changed,
    part_recipe,
    places,
    problems_of,
    table_of,
)

from common import ROOT
from lasnn.recipe.json_schema import DRAFT, FILE, json_schema
from lasnn.recipe.load import key_of, shipped, summary
from lasnn.recipe.schema import Recipe
from lasnn.registry import REQUIRED, encoders, losses

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    assert schema["$schema"] == DRAFT
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_the_shipped_schema_is_what_the_command_prints(lasnn):
    printed = lasnn("schema").stdout
    made = (ROOT / "recipes" / FILE).read_text(encoding="utf-8")
    assert printed == made, f"make it anew: lasnn schema > recipes/{FILE}"


@pytest.mark.parametrize("name", shipped())
def test_each_shipped_recipe_names_it_and_is_valid(name, validator):
    text = shipped()[name].read_text(encoding="utf-8")
    assert text.startswith(f"#:schema ./{FILE}\n")
    assert not summary(shipped()[name]).startswith("#")
    assert not list(validator.iter_errors(tomllib.loads(text)))


@pytest.mark.parametrize("name", shipped())
def test_a_resolved_recipe_is_valid(name, validator):
    assert not list(validator.iter_errors(tomllib.loads(Recipe.load(name).to_toml())))


def refused(tables: dict, validator) -> bool:
    """Whether the schema refuses a recipe; it never refuses what lasnn takes."""
    wrong = not validator.is_valid(tables)
    if wrong:
        errors = [error.message[:200] for error in validator.iter_errors(tables)]
        assert problems_of(Recipe.from_tables, tables), errors
    return wrong


@pytest.mark.parametrize(
    "name", [name if name == "quickstart" else pytest.param(name, marks=pytest.mark.full) for name in SHIPPED]
)
def test_mutated_recipes(name, validator):
    found = 0
    for place in places(SHIPPED[name]):
        tables = changed(SHIPPED[name], place, remove=True)
        refused(tables, validator)
        at_all = [refused(changed(SHIPPED[name], place, value), validator) for value in VALUES]
        assert any(at_all), f"{key_of(place)} takes everything"
        found += sum(at_all)
        if isinstance(place[-1], str):
            misspelt = changed(changed(SHIPPED[name], place, remove=True), (*place[:-1], f"{place[-1]}x"), 1)
            assert refused(misspelt, validator), place
    assert found > 5 * len(list(places(SHIPPED[name])))


@pytest.mark.parametrize(("registry", "name"), PARTS, ids=lambda value: value if isinstance(value, str) else value.kind)
def test_each_option_of_a_part(registry, name, validator):
    tables, table = part_recipe(registry, name), table_of(registry, name)
    assert validator.is_valid(tables)
    for option, info in registry[name].options.items():
        if option in SUPPLIED:
            continue
        for value in VALUES:
            refused(changed(tables, (*table, option), value), validator)
        assert refused(changed(tables, (*table, option), {"wrong": [{}]}), validator)
        assert refused(changed(tables, (*table, f"{option}x"), 1), validator)
        if info.default is REQUIRED:
            assert refused(changed(tables, (*table, option), remove=True), validator)


def test_what_belongs_to_another_part_is_refused(validator):
    assert refused(changed(PLAIN, ("losses", 0, "power"), 2.0), validator)
    assert refused(changed(PLAIN, ("student", "neuron"), {"name": "if", "tau": 2.0}), validator)
    # Left out, the name is that of the default.
    assert refused(changed(PLAIN, ("student", "neuron"), {"tau": 0.5}), validator)
    assert not refused(changed(PLAIN, ("student", "neuron"), {"tau": 3.0}), validator)
    assert not refused(changed(PLAIN, ("student", "encoder"), "poisson"), validator)
    assert refused(changed(PLAIN, ("student", "encoder"), "poison"), validator)


def test_a_mistake_is_said_of_its_place(validator):
    tables = changed(changed(PLAIN, ("student", "encoder", "gain"), 2), ("teacher", "widht"), 3)
    said = {".".join(map(str, error.path)): error.message for error in validator.iter_errors(tables)}
    assert "'gain' was unexpected" in said["student.encoder"]
    assert "'widht' was unexpected" in said["teacher"]


def test_names_of_plugins_are_free_and_the_rest_is_not(validator):
    own = {
        "plugins": ["my_nets.py"],
        "data": {"name": "my-data", "anything": 1},
        "teacher": {"architecture": "my-net", "depth": 3},
        "student": {"architecture": "my-net", "encoder": "mine", "neuron": {"name": "mine", "leak": [1]}},
        "losses": [{"name": "mine", "strength": {}}, {"name": "cross-entropy"}],
    }
    assert validator.is_valid(own)
    assert not validator.is_valid({**own, "plugins": []})
    assert not validator.is_valid(changed(own, ("losses", 1, "strength"), 1))
    assert not validator.is_valid(changed(own, ("student", "timesteps"), 0))
    assert not validator.is_valid(changed(own, ("distill",), {"epoch": 1}))


def test_every_table_says_whether_it_takes_other_keys(validator):
    """Some editors' servers take one that says nothing for one that takes none."""

    def check(schema):
        if isinstance(schema, list):
            return sum(map(check, schema))
        if not isinstance(schema, dict):
            return 0
        of_tables = schema.get("type") == "object" or ("type" not in schema and "then" in schema)
        assert not of_tables or "additionalProperties" in schema, str(schema)[:300]
        return of_tables + sum(map(check, schema.values()))

    assert check(validator.schema) > 50


def test_every_key_and_option_is_described(validator):
    def described(schema, place=""):
        for key, inner in schema.get("properties", {}).items():
            if isinstance(inner, dict) and place != "if":
                says = inner.get("description") or inner.get("allOf", [{}])[0].get("description")
                assert says, f"{place}.{key}"
                described(inner, f"{place}.{key}")
        for inner in schema.get("allOf", [])[:1]:
            described(inner, place)
        if isinstance(schema.get("items"), dict):
            described(schema["items"], f"{place}[]")

    described(validator.schema)
    power = validator.schema["properties"]["losses"]["items"]["allOf"][0]["properties"]["temporal"]
    assert "how spikes become one map" in power["description"]
    assert 'Default: "rate"' in power["description"]


def test_a_recipe_brings_its_own_parts(tiny, lasnn):
    (tiny.parent / "own.py").write_text(
        "from lasnn import losses\n\n\n@losses.register('own-loss')\n"
        'def own_loss(logits, *, strength: float = 1.0):\n    """Mine.\n\n    `strength` is mine."""\n'
        "    return logits.sum()\n\n\nprint('hello')\n"
    )
    tiny.write_text(tiny.read_text().replace("plugins = [", 'plugins = ["own.py", '))
    schema = json.loads(lasnn("schema", "tiny.toml").stdout)
    entry = schema["properties"]["losses"]["items"]["allOf"][0]["properties"]
    assert "own-loss" in entry["name"]["anyOf"][0]["enum"]
    assert entry["strength"] == {"type": "number", "description": "own-loss: `strength` is mine. Default: 1.0."}
    own = jsonschema.Draft7Validator(schema)
    tables = tomllib.loads(tiny.read_text())
    tables["losses"] = [{"name": "own-loss", "strength": 2.0}]
    assert own.is_valid(tables)
    tables["losses"][0]["strenght"] = 1
    assert not own.is_valid(tables)
    assert "own-loss" not in losses
    assert "direct" in encoders


def complete(words: str, folder, shell: str = "bash") -> list[str]:
    """What a shell is offered for a line, as its completion script asks."""
    code = "import sys; sys.argv = ['lasnn']; from lasnn.cli import main; main()"
    asked = {"_LASNN_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "/usr/bin:/bin", **asked}, capture_output=True, text=True, cwd=folder
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_a_shell_completes_commands_options_and_recipes(tmp_path):
    assert complete("lasnn di", tmp_path) == ["distill"]
    assert "--dry-run" in complete("lasnn distill --d", tmp_path)
    assert complete("lasnn distill quick", tmp_path) == ["quickstart"]
    assert "schema" in complete("lasnn ", tmp_path)


def test_completion_is_installed(tmp_path):
    code = "import sys; sys.argv[0] = 'lasnn'; from lasnn.cli import main; main()"
    # The shell is found out from the process that starts the command.
    line = f"'{sys.executable}' -c \"{code}\" --install-completion; exit $?"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    found = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr + found.stdout
    script = next(path for path in tmp_path.rglob("*") if path.is_file() and "_LASNN_COMPLETE" in path.read_text())
    assert str(script) in (tmp_path / ".bashrc").read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
