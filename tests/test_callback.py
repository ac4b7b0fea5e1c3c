"""Who is told of a run: several at once, registered by a plugin or not, and TensorBoard's event files."""

import re
import sys
import time
from collections import Counter

import pytest
from test_distillation import StopAt, digest

from lasnn import Callback, distill
from lasnn.console import RunProgress
from lasnn.errors import UserError
from lasnn.plan import read_plan
from lasnn.run import resume_command
from lasnn.training.stop import Stopped

pytestmark = pytest.mark.usefixtures("cached_teachers")

SHORT = ["teacher.epochs=1", "distill.epochs=2"]


class AccuracyMetrics(Callback):
    """Counts what it is told."""

    def __init__(self):
        self.counts = Counter()
        for event in ("start", "note", "teacher", "epoch", "step", "end_epoch", "finish", "close"):
            setattr(self, event, lambda *_, event=event: self.counts.update([event]))


def test_everybody_is_told_and_nothing_else_changes(tiny):
    first, second = AccuracyMetrics(), AccuracyMetrics()
    run = distill(tiny, overrides=SHORT, progress=first, callbacks=[second])
    assert first.counts == second.counts
    wanted = {"start": 1, "teacher": 1, "epoch": 3, "end_epoch": 3, "finish": 1, "close": 1}
    assert {event: first.counts[event] for event in wanted} == wanted
    assert first.counts["step"] >= 3
    assert digest(run / "student.safetensors") == digest(distill(tiny, overrides=SHORT) / "student.safetensors")


class Meddler(Callback):
    """Changes all that it is told, in place."""

    def teacher(self, result):
        result["accuracy"] = 100.0

    def step(self, step, rate, sums, weights):
        for total in sums.values():
            total.mul_(0)
        sums.clear()
        weights.clear()

    def end_epoch(self, metrics):
        metrics["losses"].clear()
        metrics["accuracy"] *= 100

    def finish(self, summary, run):
        summary.clear()


def test_a_callback_cannot_change_the_runs_figures(tiny):
    told = AccuracyMetrics()
    plain = distill(tiny, overrides=[*SHORT, "seed=7"])
    (tiny.parent / "runs" / "teachers").unlink()
    run = distill(tiny, overrides=[*SHORT, "seed=7"], callbacks=[Meddler(), told])
    assert told.counts["finish"] == 1

    def figures(of):
        epochs = [{key: epoch[key] for key in ("phase", "loss", "losses", "accuracy")} for epoch in of.metrics()]
        return epochs, of.read_json("teacher.json")["accuracy"], of.read_json("summary.json")["accuracy"]

    assert figures(run) == figures(plain)


class Live(RunProgress):
    """Keeps what it shows."""

    text = ""

    def say(self, text):
        pass

    def begin_live(self):
        return True

    def live(self, text, share):
        self.text = text


@pytest.mark.parametrize(("first", "seconds"), [(0, 9999 * 0.05), (900, 5099 * 0.05)])
def test_the_time_left_is_that_of_the_steps_to_come(tiny, first, seconds):
    """Of a run that goes on within an epoch too: ten epochs of 1,000 steps, one of which took 0.05 s."""
    shown = Live()
    plan = read_plan(tiny)
    shown.start(plan, tiny.parent)
    shown.epoch("student", 4 if first else 0, 10, 1000)
    time.sleep(0.05)
    shown.step(first, plan.recipe.data.batch_size / 0.05, {"a": 1.0}, {"a": 1.0})
    hours, minutes, rest = map(int, re.search(r"(\d+):(\d+):(\d+) left", shown.text).groups())
    assert 3600 * hours + 60 * minutes + rest == pytest.approx(seconds, rel=0.5)


def test_callbacks_are_closed_when_a_run_is_stopped(tiny):
    told = AccuracyMetrics()
    with pytest.raises(Stopped):
        distill(tiny, overrides=SHORT, progress=StopAt("student", 1, 15), callbacks=[told])
    assert told.counts["close"] == 1
    assert told.counts["finish"] == 0


def test_a_plugins_callback_goes_by_its_name(tiny, lasnn):
    (tiny.parent / "log.py").write_text(
        """
from lasnn import Callback, callbacks

@callbacks.register("my-log")
class MyLog(Callback):
    \"\"\"Lines in a file.\"\"\"
    def end_epoch(self, metrics):
        with open("my.log", "a") as file:
            file.write(f"{metrics['phase']} {metrics['epoch']}\\\\n")

@callbacks.register("broken")
class Broken(Callback):
    \"\"\"Fails.\"\"\"
    def end_epoch(self, metrics):
        raise KeyError("loss_of_my_own")

@callbacks.register("no-callback")
def no_callback():
    \"\"\"Something else.\"\"\"
""".replace("\\\\n", "\\n")
    )
    plugins = ['plugins=["tiny_clothes.py","log.py"]', *SHORT]
    distill(tiny, overrides=plugins, callbacks=["my-log"])
    assert (tiny.parent / "my.log").read_text().splitlines() == ["teacher 1", "student 1", "student 2"]
    with pytest.raises(UserError, match=r"callback 'broken' \(.*log.py:\d+\) failed: KeyError: 'loss_of_my_own'"):
        distill(tiny, overrides=plugins, callbacks=["broken"])
    before = sorted(tiny.parent.glob("runs/*"))
    with pytest.raises(UserError, match=r"callback 'no-callback' \(.*\) must be a lasnn.Callback"):
        distill(tiny, overrides=plugins, callbacks=["no-callback"])
    error = lasnn("distill", "tiny.toml", "--callback", "tensorbord", code=2).stderr
    assert error.startswith("lasnn: unknown callback 'tensorbord'; did you mean 'tensorboard'? known: ")
    assert sorted(tiny.parent.glob("runs/*")) == before, "no run folder is left"


def test_tensorboard_shows_a_resumed_run_as_one(tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = [*SHORT, "data.batch_size=10"]
    with pytest.raises(Stopped):
        distill(tiny, "out", overrides=settings, progress=StopAt("student", 1, 15), callbacks=["tensorboard"])
    run = distill(tiny, "out", overrides=settings, resume=True, callbacks=["tensorboard"])
    for phase, epochs in (("teacher", 1), ("student", 2)):
        events = accumulator.EventAccumulator(str(run / "tensorboard" / phase)).Reload()
        lines = [line for line in run.metrics() if line["phase"] == phase]
        accuracy = [(event.step, pytest.approx(event.value)) for event in events.Scalars("accuracy")]
        assert accuracy == [(40 * line["epoch"] - 1, line["accuracy"]) for line in lines]
        assert [event.value for event in events.Scalars("epoch/loss")] == pytest.approx([it["loss"] for it in lines])
        steps = [event.step for event in events.Scalars("this epoch so far/cross-entropy")]
        assert steps == [40 * epoch + step for epoch in range(epochs) for step in (0, 20, 39)]


def test_tensorboard_keeps_the_epoch_before_a_run_goes_on(tiny):
    """What begins at an epoch's end purges nothing of that epoch."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = ["teacher.epochs=1", "distill.min_lr=0.05", "distill.lr=0.05", "distill.warmup_epochs=0"]
    for epochs in (1, 2):
        further = [*settings, f"distill.epochs={epochs}"]
        run = distill(tiny, "out", overrides=further, resume=epochs == 2, callbacks=["tensorboard"])
    events = accumulator.EventAccumulator(str(run / "tensorboard" / "student")).Reload()
    accuracy = [event.value for event in events.Scalars("accuracy")]
    assert accuracy == pytest.approx([line["accuracy"] for line in run.metrics() if line["phase"] == "student"])
    assert len(accuracy) == 2


def test_the_command_that_goes_on_has_the_callbacks(tiny):
    pytest.importorskip("tensorboard")
    with pytest.raises(Stopped) as stopped:
        distill(tiny, "out", overrides=SHORT, progress=StopAt("student", 1, 15), callbacks=["tensorboard"])
    assert resume_command(stopped.value.run).endswith("--resume --callback tensorboard")


def test_tensorboard_that_is_not_installed(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'lasnn\[tensorboard\]'"):
        distill(tiny, callbacks=["tensorboard"])
    assert not list(tiny.parent.glob("runs/tiny-*"))
