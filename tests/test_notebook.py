"""Progress in a notebook and on a terminal, stopping in each, and results that show themselves and become tables."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from lasnn import distill, evaluate, load_run
from lasnn.callback import Callback
from lasnn.errors import UserError
from lasnn.notebook import NotebookProgress, in_notebook
from lasnn.run import RunFolder
from lasnn.training.stop import Stopped


class Display:
    """A notebook's place for one output: what it showed, in order."""

    def __init__(self):
        self.shown: list[str] = []
        self.places = 0

    def __call__(self, shown):
        self.places += 1
        self.update(shown)
        return self

    def update(self, shown):
        self.shown.append(shown._repr_html_())
        self.text = repr(shown)


class StopIn(Callback):
    """Sends the process a signal in an epoch of the student."""

    def __init__(self, signum: int):
        self.signum = signum

    def epoch(self, phase, epoch, epochs, steps):
        if (phase, epoch) == ("student", 1):
            os.kill(os.getpid(), self.signum)


def shown(what) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(what)
    return console.file.getvalue()


def test_a_notebook_shows_one_table_that_grows(tiny, cached_teachers):
    display = Display()
    # Of this seed no teacher is cached.
    run = distill(tiny, "runs/one", overrides=["seed=13"], progress=NotebookProgress(display))
    assert display.places == 1
    last = display.shown[-1]
    assert last.count("<tr>") == 1 + 2 + 2
    assert "<th>accuracy</th>" in last
    assert "<td>student</td><td>2/2</td>" in last
    assert "<progress" not in last
    during = [html for html in display.shown if "<progress" in html]
    assert during
    assert re.search(r'<progress value="0\.\d+" max="1"></progress> (teacher|student) epoch', "".join(during))
    assert re.search(r"\d:\d\d:\d\d left", "".join(during))
    assert len(last) > len(display.shown[0])
    assert "student  2/2" in display.text
    assert "student: test accuracy" in display.text
    # The run says its result itself.
    accuracy = f"{run.read_json('summary.json')['accuracy']:.4f} (teacher "
    for view in (shown(run), run._repr_html_(), shown(load_run(run.path)), load_run(run.path)._repr_html_()):
        assert accuracy in view
        assert "runs/one" in view
        assert "spikes per neuron and step" in view


def test_results_become_tables(tiny, cached_teachers):
    pandas = pytest.importorskip("pandas")
    run = distill(tiny, "runs/one", progress=None)
    results = evaluate(run.path, [1, 2], include_speed=False)
    frame = pandas.DataFrame(results)
    assert frame["timesteps"].tolist() == [1, 2]
    assert frame["accuracy"].dtype == frame["energy_uj"].dtype == "float64"
    assert frame.loc[1, "firing_rate"] == results[1]["firing_rate"]
    flat = pandas.json_normalize(results)
    assert flat["energy_with_memory.int8.energy_uj"].tolist() == [
        result["energy_with_memory"]["int8"]["energy_uj"] for result in results
    ]
    assert flat["break_even_firing_rate.fp32"].notna().all()


def test_what_is_shown_left_alone(tiny, cached_teachers, capsys):
    assert not in_notebook()
    distill(tiny, "runs/quiet", progress=None)
    assert capsys.readouterr().out == ""
    distill(tiny, "runs/plain")
    out = capsys.readouterr().out
    # No terminal: whole lines, no bar.
    assert "student epoch 2/2" in out
    assert "step 1/8" not in out
    assert "\x1b" not in out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_python_says_how_to_go_on(signum, tiny, cached_teachers):
    with pytest.raises(Stopped, match="the state is in") as caught:
        distill(tiny, "runs/one", progress=None, callbacks=[StopIn(signum)])
    text = caught.value._render_traceback_()
    assert text[0].startswith("Stopped: stopped by SIG")
    assert text[1] == "go on with: distill('runs/one/recipe.toml', 'runs/one', resume=True)"
    stopped = RunFolder(caught.value.run)
    assert "stopped, student epoch 1/2" in shown(stopped)
    assert "lasnn distill" in stopped._repr_html_()
    # Word for word, as it is copied.
    done = eval(text[1].removeprefix("go on with: ").replace("resume=True", "resume=True, progress=None"))
    assert done.read_json("summary.json")["epochs"] == 2


def test_a_student_alone_and_a_broken_run_show_what_they_are(tmp_path):
    (tmp_path / "student.safetensors").write_bytes(b"")
    assert "student.safetensors" in shown(RunFolder(tmp_path / "student.safetensors"))
    assert "broken" in shown(RunFolder(tmp_path))


def test_a_users_mistake_is_its_own_words_in_a_notebook():
    assert UserError("first", "second")._render_traceback_() == ["UserError: first\nsecond"]


@pytest.mark.full
def test_on_a_terminal_there_is_a_bar_and_ctrl_c_leaves_a_run(tiny):
    """As typed: the terminal sends the signal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lasnn", "distill", "tiny.toml", "--out", "one", "--set", "distill.epochs=500"]
    environment = {**os.environ, "COLUMNS": "150", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tiny.parent,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen, until, stopped = "", time.monotonic() + 90, False
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 100000).decode(errors="replace")
            except OSError:
                break
        if not stopped and "student epoch   3/500" in seen:
            os.write(ours, b"\x03")
            stopped = True
    assert process.wait(10) == 130, seen[-2000:]
    assert "━" in seen
    assert re.search(r"step \d/8.*:\d\d:\d\d left", seen)
    assert "go on with: lasnn distill one/recipe.toml --out one --resume" in seen


NOTEBOOK = [
    "import os, signal\nfrom lasnn import Callback, distill, evaluate, load_run",
    "class Press(Callback):\n"
    "    def epoch(self, phase, epoch, epochs, steps):\n"
    "        if (phase, epoch) == ('student', 1):\n"
    "            os.kill(os.getpid(), signal.SIGINT)\n"
    "distill('tiny.toml', 'one', callbacks=[Press()])",
    "run = distill('one/recipe.toml', 'one', resume=True)\nrun",
    "import pandas\npandas.DataFrame(evaluate(run.path, [1, 2], include_speed=False))[['timesteps', 'accuracy']]",
    "distill('tiny.toml', 'two', overrides=['student.timestep=2'])",
    "load_run('one')",
]


@pytest.mark.full
def test_a_notebook(tiny):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("pandas")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK])
    client = nbclient.NotebookClient(
        notebook, timeout=300, allow_errors=True, resources={"metadata": {"path": str(tiny.parent)}}
    )
    client.execute()
    outputs = [cell.outputs for cell in notebook.cells]
    # One place, stopped after a whole step, and no way through the library.
    table, error = outputs[1]
    assert table.output_type == "display_data"
    assert "<td>student</td><td>1/2</td>" in table.data["text/html"]
    assert error.ename == "Stopped"
    assert len(error.traceback) == 2
    assert error.traceback[1] == "go on with: distill('one/recipe.toml', 'one', resume=True)"
    table, result = outputs[2]
    assert "<td>student</td><td>2/2</td>" in table.data["text/html"]
    assert "(teacher 0." in result.data["text/html"]
    assert "RunFolder" in result.data["text/plain"]
    assert "<th>accuracy</th>" in outputs[3][-1].data["text/html"]
    [mistake] = [output for output in outputs[4] if output.output_type == "error"]
    assert mistake.traceback == [f"UserError: {mistake.evalue}"]
    assert "did you mean 'timesteps'?" in mistake.evalue
    assert "(teacher 0." in outputs[5][0].data["text/html"]
