import json
import math
import shlex
import signal
import time
from pathlib import Path
from typing import get_args

import pytest

from lasnn.cli import parse_variants
from lasnn.compare import Arm, Comparison, paired_gain, rows, student_t
from lasnn.compare import compare as compare_rows
from lasnn.console import print_comparison, to_stdout
from lasnn.errors import UserError
from lasnn.evaluation.conversion import OF_ONE_T, Method
from lasnn.evaluation.iso_accuracy import accuracy_over_time, match, say_ratio, say_reached
from lasnn.plan import read_plan
from lasnn.recipe.schema import Recipe

SHORT = ("--set", "teacher.epochs=1", "--set", "distill.epochs=1")


@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_student_t_is_that_of_the_tables(freedom, wanted):
    assert student_t(freedom) == pytest.approx(wanted, abs=5e-5)


def test_a_paired_gain_by_hand():
    """Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, and 4.3027 * 0.1 / sqrt(3)."""
    gain = paired_gain("a", "b", 4, {0: 0.6, 1: 0.8, 2: 0.9, 3: 0.5}, {0: 0.5, 1: 0.6, 2: 0.6})
    assert gain["mean"] == pytest.approx(0.2)
    assert gain["half_width"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert gain["seeds"] == 3
    one = paired_gain("a", "b", 4, {0: 0.6}, {0: 0.5})
    assert one["half_width"] is None


def test_differences_that_are_all_equal_have_no_interval(capsys):
    """0.8 - 0.6 and 0.7 - 0.5 differ in their last bits alone."""
    gain = paired_gain("a", "b", 4, {0: 0.8, 1: 0.7}, {0: 0.6, 1: 0.5})
    assert (gain["half_width"], gain["seeds"]) == (None, 2)
    arms = (Arm("distilled", (), 4), Arm("alone", ("teacher=",), 4))
    found = Comparison("x.toml", (0, 1), arms, Path("runs"))
    for arm, value in zip(arms, (0.75, 0.5), strict=True):
        for seed in (0, 1):
            found.summaries[arm, seed] = {"accuracy": value, "firing_rate": 0.1, "energy_uj": 1.0, "seconds": 2.0}
    assert "| +0.2500 | the same in all 2 seeds: no interval |" in found.as_markdown()
    print_comparison(to_stdout(), found.as_json(), [], found.folder)
    assert "distilled over alone, T = 4: +0.2500 (the same in all 2 seeds: no interval)" in capsys.readouterr().out


def test_the_tables_of_a_comparison():
    arms = (Arm("distilled", (), 4), Arm("alone", ("teacher=",), 4))
    found = Comparison("x.toml", (0, 1), arms, "runs")
    for arm, values in zip(arms, ((0.8, 0.9), (0.7, 0.7)), strict=True):
        for seed, value in enumerate(values):
            summary = {"accuracy": value, "firing_rate": 0.1, "energy_uj": 1.0, "seconds": 2.0}
            found.summaries[arm, seed] = summary | ({"teacher_accuracy": 0.95} if arm.name == "distilled" else {})
    distilled, alone = found.as_json()["arms"]
    assert distilled["mean"] == pytest.approx(0.85)
    assert distilled["deviation"] == pytest.approx(0.0707, abs=1e-4)
    assert (distilled["teacher_mean"], alone["teacher_mean"]) == (0.95, None)
    gains = {gain["over"]: gain["mean"] for gain in found.gains()}
    assert gains == {"alone": pytest.approx(0.15), "its teacher": pytest.approx(-0.1)}
    text = found.as_markdown()
    assert "| distilled | 4 | 0.8000 | 0.9000 | **0.8500** | 0.0707 | 0.9500 |" in text
    assert "lasnn distill x.toml --set teacher= --set seed=$seed" in text


def test_runs_of_other_conditions_are_said():
    """Runs that were done before, perhaps with another torch, are taken as they are; the table says so."""
    arms = (Arm("distilled", (), 4), Arm("alone", ("teacher=",), 4))
    found = Comparison("x.toml", (0, 1), arms, "runs", images=100)
    known = {"device": "cpu", "device_name": "x86_64", "threads": 1, "lasnn": "1", "torch": "2.8", "python": "3.11"}
    for arm in arms:
        for seed in (0, 1):
            found.environments[arm, seed] = {**known, "command": [str(seed)]}
    assert found.warnings() == []
    assert (
        "Conditions: cpu, x86_64, 1 threads, lasnn 1, torch 2.8, Python 3.11; 100 test images." in found.as_markdown()
    )
    found.environments[arms[0], 1] = {**known, "torch": "2.9"}
    text, plain = found.as_markdown(), found.as_json()
    assert "torch 2.8 (3 runs) or torch 2.9 (1 runs)" in text
    assert "not made under the same conditions" in text
    assert plain["conditions"]["threads"] == 1
    assert "torch" not in plain["conditions"]
    # A run that was stopped, and went on with something else, is of both.
    found.environments = {key: {**known, "threads": 2, "earlier": [known]} for key in found.environments}
    assert "1, then 2 threads, lasnn 1," in found.as_markdown()
    assert found.warnings()
    assert plain["mixed_conditions"] == {"torch": {"2.8": 3, "2.9": 1}}


@pytest.mark.parametrize(
    ("terms", "alone"),
    [
        ('{name="cross-entropy"}, {name="attention", weight=100}', '[{ name = "cross-entropy" }]'),
        ('{name="cross-entropy", weight=0.1}, {name="logit-kd"}', '[{ name = "cross-entropy", weight = 1.0 }]'),
        ('{name="cross-entropy", weight=2}, {name="logit-kd"}', '[{ name = "cross-entropy", weight = 2.0 }]'),
        ('{name="entropy", weight=0.1}, {name="logit-kd"}',
         '[{ name = "entropy", weight = 0.1 }, { name = "cross-entropy" }]'),
        ('{name="cross-entropy", weight=0.3, schedule="until", until=0.5}, {name="logit-kd"}',
         '[{ name = "cross-entropy" }]'),
        ('{name="logit-kd"}, {name="ensemble-kd", weight=0.5}',
         '[{ name = "ensemble-kd", weight = 0.5 }, { name = "cross-entropy" }]'),
        ('{name="cross-entropy", weight=0.5}, {name="logit-kd"}, {name="ensemble-kd", weight=0.5}',
         '[{ name = "cross-entropy", weight = 1.0 }, { name = "ensemble-kd", weight = 1.0 }]'),
        ('{name="cross-entropy", weight=2, schedule="cosine"}, {name="entropy"}, {name="logit-kd"}',
         '[{ name = "entropy" }, { name = "cross-entropy" }]'),
    ],
)  # fmt: skip
def test_alone_learns_from_labels_at_their_full_weight(tiny, terms, alone):
    """A weight below 1 makes room for the teacher's terms; alone it would be a lower rate, and no fair row."""
    arms = rows(Recipe.load(tiny, [f"losses=[{terms}]"]), [], [], {}, ablation=False)
    settings = next(arm for arm in arms if arm.name == "alone").settings
    assert f"losses={alone}" in settings
    read_plan(Recipe.load(tiny, settings))


def test_an_ablation_keeps_what_teaches_to_the_end(tiny):
    """Without its logits this recipe would teach nothing in its second half."""
    terms = (
        '{name="cross-entropy",schedule="until",until=0.5}, {name="logit-kd"}, {name="feature-mse"}, {name="attention"}'
    )
    arms = rows(Recipe.load(tiny, [f"losses=[{terms}]"]), [], [], {}, ablation=True)
    assert [arm.name for arm in arms[2:]] == ["without feature-mse", "without attention"]
    for arm in arms:
        read_plan(Recipe.load(tiny, arm.settings))


def test_a_table_before_its_rows_are_done_leaves_them_empty():
    arms = (Arm("distilled", (), 1), Arm("alone", ("teacher=",), 1))
    text = Comparison("tiny", (0, 1), arms, "runs", {(arms[0], 0): {"accuracy": 0.5}}).as_markdown()
    assert "| alone | 1 |  |  |  |  |  |  |" in text
    assert "| distilled over alone | 1 |  | no pair yet |" in text


def test_rows_seeds_and_a_second_call(lasnn, tiny):
    arguments = ("compare", tiny, "--seeds", 2, "--timesteps", "1,2", *SHORT, "--variant", "power 2: losses.1.power=2")
    base = ("--set", 'losses=[{name="cross-entropy"}, {name="attention", weight=100, power=1}]')
    found = lasnn.json(*arguments, *base, "--out", "c")
    assert [(row["name"], row["timesteps"]) for row in found["arms"]] == [
        (name, steps) for steps in (1, 2) for name in ("distilled", "alone", "power 2")
    ]
    assert all(list(row["accuracy"]) == ["0", "1"] for row in found["arms"])
    assert {(gain["over"], gain["seeds"]) for gain in found["gains"]} == {
        ("alone", 2),
        ("power 2", 2),
        ("its teacher", 2),
    }
    assert json.loads((lasnn.folder / "c/compare.json").read_text()) == found
    kept = lasnn.folder / "c/alone-T1-seed1"
    recipe = (kept / "recipe.toml").read_text()
    assert "[teacher]" not in recipe
    assert "attention" not in recipe
    # What is done is not done again; a run that is gone is.
    before = {path: path.stat().st_mtime_ns for path in (lasnn.folder / "c").glob("*/summary.json")}
    (kept / "summary.json").unlink()
    again = lasnn(*arguments, *base, "--out", "c").stdout
    assert again.count("(done before)") == 11
    after = {path: path.stat().st_mtime_ns for path in (lasnn.folder / "c").glob("*/summary.json")}
    assert [path for path in after if after[path] != before[path]] == [kept / "summary.json"]
    once_more = json.loads((lasnn.folder / "c/compare.json").read_text())
    assert [row["accuracy"] for row in once_more["arms"]] == [row["accuracy"] for row in found["arms"]]


def test_each_t_is_one_row_and_names_stay_in_their_cell(tiny):
    told = []
    found = compare_rows(
        *(tiny, 1),
        overrides=["teacher.epochs=1", "distill.epochs=1", "student.init=random"],
        timesteps=[1, 1],
        variants={"a|b": ["distill.lr=0.1"]},
        ablation=True,
        tell=told.append,
    )
    assert [(arm.name, arm.timesteps) for arm in found.arms] == [("distilled", 1), ("alone", 1), ("a|b", 1)]
    assert told[0].startswith("--ablation adds no row")
    assert any(line.startswith("| a\\|b | 1 |") for line in found.as_markdown().splitlines())


def test_the_command_of_a_row_gives_its_figure(lasnn, tiny):
    found = lasnn.json("compare", tiny, "--seeds", 1, *SHORT, "--out", "c")
    for row in found["arms"]:
        command = shlex.split(row["command"].replace("SEED", "0"))[1:]
        assert lasnn.json(*command)["accuracy"] == row["accuracy"]["0"]


def test_the_ablation_leaves_one_thing_out_at_a_time(lasnn, tiny):
    losses = 'losses=[{name="cross-entropy"}, {name="attention", weight=100, power=1}]'
    settings = [*SHORT, "--set", "student.init=teacher", "--set", losses]
    found = lasnn.json("compare", tiny, "--seeds", 1, "--ablation", *settings)
    assert [row["name"] for row in found["arms"]] == [
        "distilled",
        "alone",
        "without attention",
        "without the teacher's weights",
    ]
    assert (lasnn.folder / "runs/compare/tiny/compare.md").is_file()


@pytest.mark.parametrize("init", ["student.init=", "student.init=converted"])
def test_a_row_from_random_weights_calibrates_nothing(tiny, init):
    """And a start from the teacher is one though the recipe says an option that another leaves to its default."""
    settings = [init, "student.calibration=none", "teacher.pool=avg"]
    losses = 'losses=[{name="cross-entropy"}, {name="attention"}]'
    arms = rows(Recipe.load(tiny, [*settings, losses]), [*settings, losses], [], {}, ablation=True)
    assert [arm.name for arm in arms][2:] == ["without attention", "without the teacher's weights"]
    assert all(read_plan(tiny, arm.settings) for arm in arms)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_stops_it_and_the_same_command_goes_on(lasnn, tiny, number):
    arguments = ("compare", tiny, "--seeds", 1, "--set", "teacher.epochs=1", "--set", "distill.epochs=30", "--out", "c")
    process = lasnn.start(*arguments)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and "student" not in _metrics(lasnn):
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert ("the same command goes on" in err) == (number == signal.SIGTERM)
    assert lasnn.json(*arguments)["arms"][0]["mean"] > 0


def _metrics(lasnn) -> str:
    path = lasnn.folder / "c/distilled-T2-seed0/metrics.jsonl"
    return path.read_text() if path.is_file() else ""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--variant", "x"), "--variant x: give NAME:KEY=VALUE"),
        (("--variant", "Alone:distill.lr=1"), "there is a row of this name"),
        (("--variant", "a b:distill.lr=1", "--variant", "a-b:distill.lr=2"), "--variant a-b: there is a row of"),
        (("--variant", "?:distill.lr=1"), "give it letters or digits"),
        (("--variant", "x:seed=1"), "--variant x: seed is set by --seeds"),
        (("--variant", "x: student.timesteps = 1"), "--variant x: student.timesteps is set by --timesteps"),
        (("--set", "teacher=", "--ablation", "--variant", "x:distill.lr=1"), "leave --ablation out"),
        (("--variant", "wide: student.wdth=8"), "wide, T = 2: student.wdth: unknown key"),
        (("--set", "teacher="), "it has no [teacher] to compare with"),
        (("--timesteps", "0"), "--timesteps 0"),
    ],
)
def test_a_mistake_is_named_before_the_first_run(lasnn, tiny, arguments, wanted):
    assert wanted in lasnn("compare", tiny, *arguments, "--out", "c", code=2).stderr
    assert not (lasnn.folder / "c").exists()


def test_a_folder_of_another_comparison_is_refused(lasnn, tiny):
    lasnn("compare", tiny, "--seeds", 1, *SHORT, "--out", "c")
    wrong = lasnn("compare", tiny, "--seeds", 1, *SHORT, "--set", "distill.lr=0.01", "--out", "c", code=2)
    assert "holds a run of another recipe" in wrong.stderr


def test_against_conversion(lasnn, tiny):
    """The figures are those of `evaluate --converted`, and a second call measures nothing again."""
    command = ("compare", tiny, "--seeds", 2, "--timesteps", "1,2", *SHORT, "--out", "c")
    arguments = (*command, "--against-conversion", "--longest", 24)
    found = lasnn.json(*arguments)
    assert [(match["method"], match["timesteps"]) for match in found["matched_accuracy"]] == [
        (method, steps) for steps in (1, 2) for method in get_args(Method)
    ]
    students = {student["timesteps"]: student for student in found["arms"] if student["name"] == "distilled"}
    for row in found["matched_accuracy"]:
        method, student = row["method"], students[row["timesteps"]]
        assert row["accuracy"] == pytest.approx(student["mean"])
        assert (row["teacher"] == "the student's teacher") == (method != "qcfs")
        if method != "qcfs":
            assert row["teacher_accuracy"] == pytest.approx(student["teacher_mean"])
        for seed, steps in row["reached"].items():
            kept = json.loads((lasnn.folder / f"c/converted-{method}-seed{seed}.json").read_text())
            accuracy = {result["timesteps"]: result["accuracy"] for result in kept["results"]}
            # What is made for one T is measured at fewer of them.
            assert method in OF_ONE_T or list(accuracy) in (list(range(1, 17)), list(range(1, 25)))
            assert all(value < student["accuracy"][seed] for t, value in accuracy.items() if steps is None or t < steps)
            assert steps is None or accuracy[steps] >= student["accuracy"][seed]
            assert (row["energy_uj"][seed] is None) == (steps is None)
    kept = json.loads((lasnn.folder / "c/converted-qcfs-seed1.json").read_text())
    again = lasnn.json("evaluate", kept["run"], "--converted", "qcfs", "--timesteps", "1,8")
    assert [result["accuracy"] for result in again["results"]] == [kept["results"][t - 1]["accuracy"] for t in (1, 8)]
    files = {path: path.stat().st_mtime_ns for path in (lasnn.folder / "c").glob("converted-*.json")}
    assert len(files) == 2 * len(get_args(Method))
    assert lasnn.json(*arguments) == found
    assert {path: path.stat().st_mtime_ns for path in files} == files
    text = (lasnn.folder / "c/compare.md").read_text()
    assert "| qcfs | its own, trained on QCFS |" in text
    assert "teacher.activation=qcfs" in text
    assert "maxnorm (ANN: the student's teacher" in lasnn(*arguments).stdout


def test_a_match_by_hand():
    def curve(*accuracy):
        results = [{"timesteps": t, "accuracy": value, "energy_uj": t} for t, value in enumerate(accuracy, start=1)]
        return {"teacher_accuracy": 0.9, "results": results}

    curves = {0: curve(0.1, 0.5, 0.8, 0.7), 1: curve(0.1, 0.2, 0.3, 0.8), 2: curve(0.1, 0.1, 0.1, 0.1)}
    found = match("maxnorm", 2, {0: 0.7, 1: 0.7, 2: 0.7}, curves, 4)
    assert found["reached"] == {"0": 3, "1": 4, "2": None}
    assert found["ratio"] == 2
    assert say_reached(found) == "3, 4, > 4"
    found = match("maxnorm", 2, {0: 0.85, 1: 0.7, 2: 0.7}, curves, 4)
    assert (found["ratio"], say_ratio(found)) == (None, "> 2")
    # Of two seeds the median lies between 3 and what is above 4.
    found = match("maxnorm", 2, {0: 0.7, 2: 0.7}, curves, 4)
    assert (found["ratio"], say_ratio(found)) == (None, "> 1.75")
    found = match("maxnorm", 2, {0: 0.95, 1: 0.95, 2: 0.95}, curves, 4)
    assert say_reached(found) == "not reached by T = 4"
    assert accuracy_over_time(curves.values()) == {
        1: pytest.approx(0.1),
        2: pytest.approx(0.8 / 3),
        4: pytest.approx(1.6 / 3),
    }


def test_what_cannot_be_compared_with_its_conversion(lasnn, tiny):
    wrong = ("compare", tiny, "--against-conversion", "--out", "c")
    assert "max_pool2d_with_indices is not linear" in lasnn(*wrong, "--set", "teacher.pool=max", code=2).stderr
    assert "--longest must be at least 1" in lasnn(*wrong, "--longest", 0, code=2).stderr
    assert "--longest goes with --against-conversion" in lasnn("compare", tiny, "--longest", 4, code=2).stderr
    alone = lasnn(*wrong, "--set", "teacher=", "--variant", "x:distill.lr=0.1", code=2)
    assert "it has no [teacher] to convert" in alone.stderr
    borrowed = ("teacher.architecture=torchvision", "teacher.model=resnet18", "teacher.width=", "teacher.epochs=1")
    borrowed += ('losses=[{name="cross-entropy"},{name="logit-kd"}]',)
    settings = [word for setting in borrowed for word in ("--set", setting)]
    found = lasnn(*wrong, *settings, "--variant", "x:distill.lr=0.1", code=2).stderr
    assert "the teacher cannot be converted: it is not made of the units" in found
    assert "qcfs" not in found
    assert not (lasnn.folder / "c").exists()


def test_variants_are_parsed():
    assert parse_variants(["a: x=1; y=[1, 2]", "b:z="]) == {"a": ["x=1", "y=[1, 2]"], "b": ["z="]}
    with pytest.raises(UserError, match="two variants"):
        parse_variants(["a:x=1", "a:x=2"])


def test_from_python(tiny):
    found = compare_rows(tiny, 1, overrides=["teacher.epochs=1", "distill.epochs=1"])
    assert found.values(found.arms[0]).keys() == {0}
