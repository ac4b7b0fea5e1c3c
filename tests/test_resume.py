"""`--resume` takes what leaves the result as it is, and names everything else that has changed."""

import pytest
from test_distillation import Notes, digest
from test_reliability import SHORT, stopped

from lasnn import distill
from lasnn.errors import UserError
from lasnn.resume import changes_between

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
    harmless = ["save_minutes=1", "data.workers=1", "data.residence=stream", "device=cpu"]
    run = distill(tiny, "out", overrides=[*SHORT, *harmless], resume=True, progress=notes)
    assert digest(run / "student.safetensors") == digest(whole / "student.safetensors")
    assert "resumed with save_minutes: was 10.0, now 1.0" in notes.lines
    assert 'residence = "stream"' in (run / "recipe.toml").read_text()


def test_the_others_are_named_together(tiny):
    stopped(tiny)
    with pytest.raises(UserError) as error:
        distill(tiny, "out", overrides=[*SHORT, "seed=1", "student.timesteps=3", "distill.epochs=3"], resume=True)
    [line] = error.value.problems
    for part in ("seed: was 0, now 1", "student.timesteps: was 2, now 3", "distill.epochs: was 2, now 3", "cosine"):
        assert part in line


def test_more_epochs_at_a_constant_rate(tiny):
    constant = ["teacher.epochs=1", "distill.min_lr=0.05"]
    whole = distill(tiny, "whole", overrides=[*constant, "distill.epochs=3"])
    distill(tiny, "out", overrides=[*constant, "distill.epochs=2"])
    run = distill(tiny, "out", overrides=[*constant, "distill.epochs=3"], resume=True)
    assert run.read_json("summary.json")["epochs"] == 3
    assert digest(run / "student.safetensors") == digest(whole / "student.safetensors")


def test_epochs_before_the_student_has_begun(tiny):
    stopped(tiny, phase="teacher", epoch=0)
    run = distill(tiny, "out", overrides=["teacher.epochs=1", "distill.epochs=1"], resume=True)
    assert run.read_json("summary.json")["epochs"] == 1
