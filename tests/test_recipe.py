import tomllib

import pytest

from common import TINY
from lasnn.errors import UserError
from lasnn.recipe.load import dump_toml, shipped
from lasnn.recipe.messages import fields
from lasnn.recipe.schema import Recipe, Training


def problems(path, *overrides):
    with pytest.raises(UserError) as caught:
        Recipe.load(path, overrides)
    return list(caught.value.problems)


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text(TINY.replace("tiny-clothes", "fashion-mnist-mini"))
    return path


def test_defaults_are_written_down(plain):
    recipe = Recipe.load(plain)
    assert [(loss.name, loss.weight) for loss in recipe.losses] == [("cross-entropy", 1.0)]
    assert recipe.data.augment == ["flip"]
    assert recipe.student.options == {"width": 4}
    assert recipe.student.neuron.name == "lif"
    assert recipe.name == "plain"


def test_without_a_teacher_the_objective_is_cross_entropy(plain):
    text = plain.read_text()
    plain.write_text(text[: text.index("[teacher]")] + text[text.index("[student]") :])
    recipe = Recipe.load(plain)
    assert recipe.teacher is None
    assert [loss.name for loss in recipe.losses] == ["cross-entropy"]


def test_resolved_recipe_reads_back(plain, tmp_path):
    settings = [
        "student.neuron.tau=3",
        'student.encoder={name="poisson"}',
        "losses.attention.pair_weights=[1,2,0.5]",
    ]
    plain.write_text(plain.read_text() + '[[losses]]\nname = "cross-entropy"\n[[losses]]\nname = "attention"\n')
    recipe = Recipe.load(plain, settings)
    copy = tmp_path / "copy.toml"
    copy.write_text(recipe.to_toml())
    again = Recipe.load(copy)
    assert again.to_toml() == recipe.to_toml()
    assert again.losses[1].options == {"pair_weights": [1, 2, 0.5]}


def test_toml_writer_round_trips():
    tables = {
        "text": 'quote " back \\ line \n é €',
        "number": 1e-05,
        "inf": float("inf"),
        "flag": True,
        "list": [1, "two", [3.0]],
        "table": {"deep": {"x": 1}, "empty": []},
        "tables": [{"name": "a", "inner": {"y": 2}}, {"name": "b", "in line": [[{"a b": 1}]]}],
        "a key of.its own é": {"layer 1": "c1", "c1.a": {"": 8}},
    }
    assert tomllib.loads(dump_toml(tables)) == tables


def test_overrides(plain):
    settings = [
        "seed=7",
        "student.timesteps=2",
        "student.neuron.name=plif",
        "losses.0.weight=0.5",
        "losses.attention.power=1",
        "data.augment=[]",
    ]
    plain.write_text(plain.read_text() + '[[losses]]\nname = "cross-entropy"\n[[losses]]\nname = "attention"\n')
    recipe = Recipe.load(plain, settings)
    assert recipe.seed == 7
    assert recipe.student.neuron.name == "plif"
    assert recipe.losses[0].weight == 0.5
    assert recipe.losses[1].options == {"power": 1}
    assert recipe.data.augment == []


def test_every_mistake_is_reported_at_once(plain):
    plain.write_text(
        """
sed = 1
plugins = ["gone.py"]
[data]
name = "fashion-mnist-mni"
batchsize = 3
[teacher]
architecture = "vgg99"
epochs = "6"
[student]
architecture = "vgg9"
widht = 3
timesteps = 0
encoder = "dirct"
[student.neuron]
name = "lif"
tau = 0.5
surrogate = "atn"
[distil]
[distill]
lr = -1.0
[[losses]]
name = "attention"
power = 0
"""
    )
    found = problems(plain, "student.timestep=4", "losses.nothing.weight=1", "nonsense")
    text = "\n".join(found)
    for key, hint in {
        "sed": "did you mean 'seed'?",
        "plugins.0": "no file",
        "data.name": "did you mean 'fashion-mnist-mini'?",
        "data.batchsize": "did you mean 'batch_size'?",
        "teacher.architecture": "did you mean 'vgg9'?",
        "teacher.epochs": "it takes a whole number (>= 1)",
        "student.widht": "did you mean 'width'?",
        "student.timesteps": "0 is not valid; it takes a whole number (>= 1)",
        "student.encoder": "did you mean 'direct'?",
        "student.neuron.tau": "it takes a number (> 1)",
        "student.neuron.surrogate": 'one of "atan", "sigmoid", "triangle", "rectangle", "fast-sigmoid"',
        "distil": "did you mean 'distill'?",
        "distill.lr": "it takes a number (> 0)",
        "losses": "no loss that teaches the student's logits (with a weight above 0); add one of: cross-entropy",
    }.items():
        lines = [line for line in found if line.startswith(f"{plain}: {key}: ")]
        assert lines, f"nothing about {key} in\n{text}"
        assert any(hint in line for line in lines), lines
    assert any(line.startswith("--set: student.timestep: ") and "'timesteps'" in line for line in found)
    assert any(line.startswith("--set losses.nothing.weight=1: unknown entry") for line in found)
    assert any(line.startswith("--set nonsense: write it as key=value") for line in found)
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize(
    ("setting", "key", "message"),
    [
        ("student.neuron.tau=1e400", "student.neuron.tau", "it takes a number"),
        ("student.timesteps=2.5", "student.timesteps", "it takes a whole number (>= 1)"),
        ("student.timesteps=true", "student.timesteps", "it takes a whole number (>= 1)"),
        ("data.batch_size=0", "data.batch_size", "it takes a whole number (>= 1)"),
        ("student.encoder={}", "student.encoder.name", "needs it"),
        (
            'student.encoder={name="poisson",gain=2}',
            "student.encoder.gain",
            "unknown key 'gain' in [student.encoder] (poisson); known: name",
        ),
        ('data.augment=["crop","flp"]', "data.augment.1", "did you mean 'flip'?"),
        ('data.augment=["crop",{name="cutut"}]', "data.augment.1.name", "did you mean 'cutout'?"),
        ('data.augment=["crop",{name="cutout",sise=8}]', "data.augment.1.sise", "did you mean 'size'?"),
        ('data.augment=[{name="cutout",size=0}]', "data.augment.0.size", "it takes a whole number (>= 1)"),
        ("data.augment=[{size=3}]", "data.augment.0.name", "missing"),
        ("data.augment=[3]", "data.augment.0", "3 is not valid"),
        ("seed=-1", "seed", "(>= 0)"),
        ("precision=fp8", "precision", 'it takes one of "auto", "fp32", "bf16", "fp16"'),
        ('losses=[{name="attention"}]', "losses", "no loss that teaches the student's logits"),
        ('losses=[{name="cross-entropy"},{name="cross-entropy"}]', "losses", "is listed 2 times"),
        ("teacher.architecture=torchvison", "teacher.architecture", "did you mean 'torchvision'?"),
        ("distill.warmup_epochs=9", "distill.warmup_epochs", "longer than the 2 epochs"),
        ("distill.min_lr=9", "distill.min_lr", "above lr"),
        ('losses=[{name="cross-entropy",weight=0}]', "losses", "no loss that teaches the student's logits"),
        ('losses=[{name="cross-entropy",schedule="until",until=0.5}]', "losses", "(with a weight above 0 to the end)"),
        ('losses=[{name="cross-entropy",schedule="cosine"}]', "losses", "(with a weight above 0 to the end)"),
        ('losses=[{name="entropy"}]', "losses", "no loss that teaches the student's logits"),
        (
            'losses=[{name="cross-entropy"},{name="tet",schedule="until"}]',
            "losses.1.until",
            'missing; schedule = "until"',
        ),
        ('losses=[{name="cross-entropy",until=0.5}]', "losses.0.until", 'has no effect with schedule = "constant"'),
        ('losses=[{name="cross-entropy"},{name="tet",schedule="until",until=1}]', "losses.1.until", "(> 0 and < 1)"),
        (
            'losses=[{name="cross-entropy",schedule="cosin"}]',
            "losses.0.schedule",
            'one of "constant", "cosine", "until"',
        ),
        ("student.in_channels=3", "student.in_channels", "unknown key"),
    ],
)
def test_one_mistake(plain, setting, key, message):
    found = problems(plain, setting)
    assert len(found) == 1, found
    assert found[0].startswith(f"--set: {key}: ")
    assert message in found[0]


def test_losses_that_need_a_teacher(plain):
    text = plain.read_text()
    plain.write_text(text[: text.index("[teacher]")] + text[text.index("[student]") :])
    found = problems(
        plain, 'losses=[{name="cross-entropy"},{name="attention"},{name="logit-kd"}]', "student.init=teacher"
    )
    assert "--set: losses.1.name: 'attention' needs a teacher; add a [teacher] section" in found
    assert "--set: losses.2.name: 'logit-kd' needs a teacher; add a [teacher] section" in found
    assert "--set: student.init: there is no [teacher] to start from" in found


def test_a_checkpoint_and_training_settings_exclude_each_other(plain):
    plain.write_text(plain.read_text().replace("epochs = 2", 'epochs = 2\ncheckpoint = "x.safetensors"', 1))
    assert problems(plain) == [
        f"{plain}: teacher.epochs: has no effect with teacher.checkpoint; leave one of the two out"
    ]


def test_a_checkpoint_given_by_set_stands_in_for_the_files_training(plain):
    assert Recipe.load(plain, ["teacher.checkpoint=x.safetensors"]).teacher.checkpoint == "x.safetensors"
    found = problems(plain, "teacher.checkpoint=x.safetensors", "teacher.lr=0.1")
    assert found == ["--set: teacher.lr: has no effect with teacher.checkpoint; leave one of the two out"]


def test_a_checkpoint_taken_away_by_set_leaves_the_training_as_the_file_has_it(plain):
    plain.write_text(plain.read_text().replace("epochs = 2", 'epochs = 2\ncheckpoint = "x.safetensors"', 1))
    found = Recipe.load(plain, ["teacher.checkpoint="]).teacher
    assert (found.checkpoint, found.epochs) == (None, 2)


def test_set_removes_a_key_or_a_table(plain):
    assert Recipe.load(plain, ["teacher="]).teacher is None
    assert Recipe.load(plain, ["student.timesteps="]).student.timesteps == 4
    assert "no such key to remove" in problems(plain, "student.nothing=")[0]


def test_set_is_blamed_for_what_it_brought(plain):
    plain.write_text(plain.read_text() + '[[losses]]\nname = "cross-entropy"\n[[losses]]\nname = "attention"\n')
    for setting in ("losses.attention.weight=-1", "losses.attention.wieght=3", "student.nueron.name=lif", "a.b.c=3"):
        assert all(line.startswith("--set: ") for line in problems(plain, setting)), setting
    [line] = problems(plain, "losses.attention.wieght=3")
    assert "did you mean 'weight'?" in line


@pytest.mark.parametrize(
    ("written", "setting", "key"),
    [
        ("[student.neuron]\ntau = 3.0", "student.neuron.name=if", "student.neuron.tau"),
        ('[teacher]\npool = "max"', "teacher.architecture=resnet20", "teacher.pool"),
        ('[[losses]]\nname = "cross-entropy"\nreadout = "step"', "losses.cross-entropy.name=tet", "losses.0.readout"),
    ],
)
def test_another_part_by_set_says_how_to_be_rid_of_the_files_options(plain, written, setting, key):
    table, _, key_and_value = written.partition("\n")
    text = plain.read_text()
    plain.write_text(text.replace(table, written) if table in text else f"{text}{table}\n{key_and_value}\n")
    [line] = problems(plain, setting)
    assert line.endswith(f"; remove the recipe's with --set {key}=")
    # What is wrong by itself has no such way out.
    assert "remove the" not in problems(plain, f"{key}x=1")[0]
    Recipe.load(plain, [setting, f"{key}="])


def test_paths_of_any_script_survive(plain, tmp_path):
    copy = tmp_path / "copy.toml"
    copy.write_text(Recipe.load(plain, ["data.root='/x/\U0001f600 é \"q\"'"]).to_toml(), encoding="utf-8")
    assert Recipe.load(copy).data.root == '/x/\U0001f600 é "q"'


def test_missing_sections_and_broken_files(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("seed = 1\n")
    assert problems(path) == [f"{path}: student: missing; the recipe needs it"]
    path.write_text("seed = \n")
    [line] = problems(path)
    assert line.startswith(f"{path}: not valid TOML: ")
    assert "line 1" in line
    path.write_bytes(b"\xff\xfe")
    assert "not valid TOML" in problems(path)[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("epochs = 4", "line 7: not valid TOML: 'epochs' is given twice in [distill]"),
        ("# again\nepochs = 4\n", "line 8: not valid TOML: 'epochs' is given twice in [distill]"),
        ('pairs = [\n"a",\n]\npairs = [\n"b",\n]\n', "line 10: not valid TOML: 'pairs' is given twice in [distill]"),
        ("[data]", "line 7: not valid TOML: the table [data] is given twice"),
    ],
)
def test_what_stands_there_twice_is_named_with_its_line(tmp_path, more, message):
    path = tmp_path / "r.toml"
    head = '[data]\nname = "fashion-mnist-mini"\n[student]\narchitecture = "vgg5"\n[distill]\nepochs = 3\n'
    path.write_text(head + more)
    assert problems(path) == [f"{path}: {message}"]


def test_a_byte_order_mark_is_read_over(plain):
    plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert Recipe.load(plain).student.architecture == "vgg5"


def test_options_that_are_left_out_are_found_beside_other_mistakes(plain):
    settings = ["data.name=image-folder", "teacher.architecture=torchvision", "teacher.width=", "distill.lr=-1"]
    found = problems(plain, *settings, "seed=99999999999999999999")
    for start in (
        "teacher.model: missing; 'torchvision' needs it (one of ",
        "distill.lr: -1 is not valid",
        "seed: 99999999999999999999 is too large",
    ):
        assert any(f": {start}" in line for line in found), (start, found)
    assert len(found) == 3


def test_unknown_recipe_names_the_shipped_ones():
    [line] = problems("quickstrat")
    assert line.startswith("no file quickstrat, and unknown recipe 'quickstrat'; did you mean 'quickstart'? known: ")


def test_a_path_that_is_no_recipe_is_named_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for given, said in (
        ("./quickstart.toml", "no file quickstart.toml; the recipe that ships is called quickstart, without folder or"),
        ("./quickstart", "no file quickstart; the recipe that ships is called quickstart, without folder or ending"),
        ("sub/foo.toml", "no file sub/foo.toml"),
        (
            "pictures",
            "pictures is a folder without a recipe.toml; for a folder of pictures `lasnn init pictures` writes one",
        ),
    ):
        [line] = problems(given)
        assert line.startswith(said)


def test_a_misspelt_name_of_a_part_hides_no_other_slip(tmp_path):
    """What may stand in the table is not known without it; what is nearly one of its keys is a slip all the same."""
    (tmp_path / "slips.toml").write_text(
        '[data]\nname = "fashion-mnist-mini"\n[teacher]\narchitectur = "vgg5"\nepoch = 3\nwidht = 4\n'
        '[student]\narchitecture = "vgg5"\n[[losses]]\nnam = "cross-entropy"\n'
    )
    found = "\n".join(problems(tmp_path / "slips.toml"))
    for said in (
        "teacher.architecture: missing; [teacher] needs it",
        "teacher.architectur: unknown key 'architectur' in [teacher]; did you mean 'architecture'?",
        "teacher.epoch: unknown key 'epoch' in [teacher]; did you mean 'epochs'?",
        "losses.0.name: missing; [[losses]] needs it",
        "losses.0.nam: unknown key 'nam' in [[losses]]; did you mean 'name'?",
    ):
        assert said in found, found


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("losses.attention.weight=500", "the recipe leaves losses out; give the whole list, as losses=[{name="),
        ("losses.cross-entropy=", "the recipe leaves losses out; give the whole list"),
        (
            "student.encoder.gain=2",
            'student.encoder is a value, not a table; give the table, as student.encoder={name="',
        ),
        ("student.neuron=plif", "'plif' is not valid; it takes a table, as { name = \"plif\" }"),
    ],
)
def test_an_override_of_what_stands_there_otherwise_says_how_to_write_it(setting, said, tmp_path):
    (tmp_path / "short.toml").write_text(
        '[data]\nname = "fashion-mnist-mini"\n[student]\narchitecture = "vgg5"\nencoder = "direct"\n'
    )
    [line] = problems(tmp_path / "short.toml", setting)
    assert said in line
    assert line.startswith("--set")


def test_a_further_loss_needs_the_whole_list():
    [line] = problems("quickstart", "losses.attention.weight=5")
    assert "unknown entry of losses 'attention'" in line
    assert "a further one needs the whole list, as losses=[" in line


def test_recipes_are_immutable(plain):
    recipe = Recipe.load(plain)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_every_key_is_documented():
    for table in (
        Recipe,
        *(info.annotation for name, info in Recipe.model_fields.items() if name == "distill"),
    ):
        for key, kind, _, meaning in fields(table):
            assert meaning.endswith("."), key
            assert kind
    assert {key for key, *_ in fields(Training)} <= {
        key for key, *_ in fields(Recipe.model_fields["distill"].annotation)
    }


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import lasnn\n\n1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero (line 3)"),
        ("def f(:\n", "cannot be imported: SyntaxError"),
        (
            "from lasnn import neurons\n\n@neurons.register('lif')\ndef lif():\n    pass\n",
            "neuron 'lif' is already registered",
        ),
    ],
)
def test_plugins_that_fail(plain, code, message):
    (plain.parent / "mine.py").write_text(code)
    # A name that is not known may be one of the plugin's.
    [line] = problems(plain, 'plugins=["mine.py"]', 'student.neuron={name="of-the-plugin"}')
    assert line.startswith("--set: plugins.0: mine.py cannot be imported: ")
    assert message in line


def test_a_plugin_stays_beside_the_recipe(plain):
    (plain.parent.parent / "outside.py").write_text("")
    [line] = problems(plain, 'plugins=["../outside.py"]')
    assert "must lie beside the recipe" in line


def test_plugins_may_be_modules(plain, monkeypatch):
    package = plain.parent / "some_package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(plain.parent)
    assert Recipe.load(plain, ['plugins=["some_package_of_mine.nets"]']).plugin_files == []
    [line] = problems(plain, 'plugins=["some_package_of_mine.gone"]')
    assert "no module 'some_package_of_mine.gone'; install it" in line


def test_shipped_recipes_have_a_header():
    for path in shipped().values():
        assert path.read_text().startswith("#:schema ./recipe.schema.json\n# ")
