"""`--resume` takes what leaves the result as it is, and names everything else that has changed."""

import signal
from pathlib import Path

import pytest
import torch
from test_distillation import Notes, StopAt, digest
from test_reliability import SHORT, stopped

from lasnn import Callback, distill, evaluate, load_run
from lasnn.compare import compare
from lasnn.errors import UserError
from lasnn.export import export
from lasnn.report import report
from lasnn.resume import changes_between
from lasnn.run import sessions
from lasnn.training.stop import Stopped

BEFORE = 'seed = 0\n[data]\nroot = "a"\n[[losses]]\nname = "cross-entropy"\nweight = 1.0\n'


def test_changes_go_by_key():
    now = 'seed = 1\n[data]\nroot = "b"\nbatch_size = 128\n[[losses]]\nname = "cross-entropy"\nweight = 2.0\n'
    found = changes_between(BEFORE, now)
    assert [str(change) for change in found.refused] == [
        "seed: was 0, now 1",
        "losses.cross-entropy.weight: was 1.0, now 2.0",
    ]
    assert [str(change) for change in found.accepted] == ['data.root: was "a", now "b"']


def test_what_leaves_the_result_alone_is_taken(tiny):
    whole = distill(tiny, "whole", overrides=SHORT)
    stopped(tiny)
    notes = Notes()
    harmless = ["save_minutes=1", "data.workers=1", "data.residence=stream", "device=cpu", "data.root=elsewhere"]
    run = distill(tiny, "out", overrides=[*SHORT, *harmless], resume=True, progress=notes)
    assert digest(run / "student.safetensors") == digest(whole / "student.safetensors")
    assert "changed  save_minutes: was 10.0, now 1.0" in notes.lines
    assert 'residence = "stream"' in (run / "recipe.toml").read_text()


def test_a_dry_run_says_what_the_run_would_say_of_its_folder(tiny, lasnn):
    stopped(tiny)
    settings = [part for setting in SHORT for part in ("--set", setting)]
    begin = "out is not empty; choose another --out, or --resume to go on with the run in it"
    changed = "out holds a run of another recipe (seed: was 0, now 1)"
    for dry in ((), ("--dry-run",)):
        command = ["distill", tiny, *settings, "--out", "out", *dry]
        assert begin in lasnn(*command, code=2).stderr
        assert changed in lasnn(*command, "--resume", "--set", "seed=1", code=2).stderr
    state = (tiny.parent / "out" / "last.pt").read_bytes()
    lasnn(*command, "--resume")
    assert (tiny.parent / "out" / "last.pt").read_bytes() == state


def test_a_runs_own_recipe_resumes_that_run(tiny):
    """Without --out, whatever the folder is called; a new run of it is named as the recipe was."""
    whole = distill(tiny, "whole", overrides=SHORT)
    run = stopped(tiny)
    again = distill(run / "recipe.toml", resume=True)
    assert again.path == run.absolute()
    assert digest(again / "student.safetensors") == digest(whole / "student.safetensors")
    assert distill(whole / "recipe.toml").path == Path("runs/whole-1")


def test_the_others_are_named_together(tiny):
    stopped(tiny)
    with pytest.raises(UserError) as error:
        distill(tiny, "out", overrides=[*SHORT, "seed=1", "student.timesteps=3", "distill.epochs=3"], resume=True)
    [line] = error.value.problems
    for part in ("seed: was 0, now 1", "student.timesteps: was 2, now 3", "distill.epochs: was 2, now 3", "min_lr"):
        assert part in line


@pytest.mark.parametrize(
    "change",
    ["seed=1", "data.batch_size=20", "data.accumulate=2", "distill.lr=0.1", "teacher.lr=0.2", "teacher.epochs=2"],
)
def test_what_changes_the_result_is_refused_and_changes_nothing(tiny, change):
    run = stopped(tiny)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".lock"}
    with pytest.raises(UserError, match=rf"out holds a run of another recipe \({change.partition('=')[0]}: was "):
        distill(tiny, "out", overrides=[*SHORT, change, "save_minutes=3"], resume=True)
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".lock"}


def test_other_images_under_another_root_are_refused_and_change_nothing(tiny):
    plugin = Path("tiny_clothes.py")
    same = "test.pixels[::16][:120]"
    assert same in plugin.read_text()
    plugin.write_text(plugin.read_text().replace(same, f"{same} + (str(self.root) == 'other')"))
    run = stopped(tiny)
    before = (run / "recipe.toml").read_text()
    with pytest.raises(UserError, match="the test images, or their order, are not those that they were") as error:
        distill(tiny, "out", overrides=[*SHORT, "data.root=other"], resume=True)
    assert "out: its images are not those that the run began with" in str(error.value)
    assert (run / "recipe.toml").read_text() == before
    distill(tiny, "out", overrides=[*SHORT, "data.root=third"], resume=True)
    assert 'root = "third"' in (run / "recipe.toml").read_text()


def test_a_teachers_file_may_lie_elsewhere_but_must_be_the_same(tiny):
    first = distill(tiny, "first", overrides=SHORT)
    short = ["distill.epochs=2", f"teacher.checkpoint={first / 'teacher.safetensors'}"]
    run = stopped(tiny, settings=short)
    Path("copy").mkdir()
    (first / "teacher.safetensors").rename("copy/teacher.safetensors")
    distill(tiny, "other", overrides=[*SHORT, "seed=1"])
    with pytest.raises(UserError, match="teacher.checkpoint: other has other weights than the run's teacher"):
        distill(tiny, "out", overrides=[*short[:1], "teacher.checkpoint=other"], resume=True)
    with pytest.raises(UserError, match="teacher.checkpoint: was .*, now not set"):
        distill(tiny, "out", overrides=["distill.epochs=2"], resume=True)
    distill(tiny, "out", overrides=[*short[:1], "teacher.checkpoint=copy"], resume=True)
    assert (run / "summary.json").is_file()


def test_a_key_that_a_run_of_an_earlier_lasnn_lacks_is_its_default(tiny):
    run = stopped(tiny)
    text = (run / "recipe.toml").read_text()
    kept = [line for line in text.splitlines() if line.partition(" ")[0] not in ("deterministic", "accumulate")]
    (run / "recipe.toml").write_text("\n".join(kept))
    with pytest.raises(UserError, match="data.accumulate: was not set, now 2"):
        distill(tiny, "out", overrides=[*SHORT, "data.accumulate=2"], resume=True)
    distill(tiny, "out", overrides=SHORT, resume=True)
    assert (run / "recipe.toml").read_text() == text


def test_from_another_directory(tiny, tmp_path, monkeypatch):
    """A run on data that ships with lasnn resumes from anywhere."""
    run = stopped(tiny).absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    distill(run / "recipe.toml", run, resume=True)
    assert (run / "summary.json").is_file()


def test_more_epochs_at_a_constant_rate(tiny):
    constant = ["teacher.epochs=1", "distill.min_lr=0.05"]
    whole = distill(tiny, "whole", overrides=[*constant, "distill.epochs=3"])
    distill(tiny, "out", overrides=[*constant, "distill.epochs=2"])
    run = distill(tiny, "out", overrides=[*constant, "distill.epochs=3"], resume=True)
    assert run.read_json("summary.json")["epochs"] == 3
    assert digest(run / "student.safetensors") == digest(whole / "student.safetensors")


def test_a_run_that_goes_on_is_not_measured_by_the_student_that_it_had(tiny):
    constant = ["teacher.epochs=1", "distill.min_lr=0.05"]
    run = distill(tiny, "out", overrides=[*constant, "distill.epochs=1"])
    before = load_run("out").student.network.state_dict()
    with pytest.raises(Stopped):
        distill(tiny, "out", overrides=[*constant, "distill.epochs=3"], resume=True, progress=StopAt("student", 2, 15))
    for attempt in (
        lambda: load_run("out"),
        lambda: evaluate("out"),
        lambda: export("out", "safetensors"),
        lambda: distill(tiny, "other", overrides=[*constant, "student.init=./out"]),
    ):
        with pytest.raises(UserError, match=r"out is not finished; finish it.*or give .*student.safetensors, what it"):
            attempt()
    kept = load_run("out/student.safetensors").student.network.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in before.items())
    distill(tiny, "out", overrides=[*constant, "distill.epochs=3"], resume=True)
    assert load_run("out").summary["epochs"] == 3
    assert (run / "student.safetensors").is_file()


def test_a_resumed_run_says_what_it_goes_on_with_and_keeps_what_it_had(tiny):
    stopped(tiny)
    threads, notes = torch.get_num_threads(), Notes()
    torch.set_num_threads(threads + 1)
    try:
        run = distill(tiny, "out", overrides=SHORT, resume=True, progress=notes)
    finally:
        torch.set_num_threads(threads)
    said = f"the run goes on with {threads + 1} threads, it had {threads} threads before"
    assert f"{said}: roundings may differ from here on" in notes.lines
    known = run.read_json("env.json")
    assert [session["threads"] for session in sessions(known)] == [threads, threads + 1]
    assert "earlier" not in known["earlier"][0]
    page = Path(report(run.path, converted="none")["file"]).read_text()
    assert f"No single command repeats these numbers: {said}." in page


def test_a_signal_after_the_last_step_ends_what_comes_next(tiny):
    class Late(Callback):
        def finish(self, summary, run):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(tiny, "out", overrides=SHORT, callbacks=[Late()])
    # All of it is there.
    assert load_run("out").summary["epochs"] == 2
    with pytest.raises(KeyboardInterrupt):
        compare(tiny, seeds=2, overrides=SHORT, out="rows", progress=Late())
    assert len(list(Path("rows").glob("*/summary.json"))) == 1


def test_epochs_before_the_student_has_begun(tiny):
    stopped(tiny, phase="teacher", epoch=0)
    run = distill(tiny, "out", overrides=["teacher.epochs=1", "distill.epochs=1"], resume=True)
    assert run.read_json("summary.json")["epochs"] == 1


def test_more_epochs_under_a_schedule_of_a_term_are_refused(tiny):
    terms = 'losses=[{name="cross-entropy"},{name="logit-kd",schedule="cosine"}]'
    constant = ["teacher.epochs=1", "distill.min_lr=0.05", terms]
    with pytest.raises(Stopped):
        distill(tiny, "out", overrides=constant, progress=StopAt("student", 1, signal.SIGTERM))
    with pytest.raises(
        UserError, match=r"distill.epochs: was 2, now 3: .* the weight of 'logit-kd' follows a schedule"
    ):
        distill(tiny, "out", overrides=[*constant, "distill.epochs=3"], resume=True)
