"""The command line as a process: output, exit codes, signals, and what a user's mistakes say."""

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch

from common import ROOT


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a tiny run in it, made by the command line."""
    from common import TINY, TINY_DATA, Command

    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny_clothes.py").write_text(TINY_DATA)
    (folder / "tiny.toml").write_text('plugins = ["tiny_clothes.py"]\n' + TINY)
    command = Command(folder)
    command.distilled = command("distill", "tiny.toml")
    return command


def test_help_is_quick_and_does_not_import_torch(lasnn):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = lasnn("--help").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    for command in ("distill", "evaluate", "list"):
        assert command in out


def test_version(lasnn):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", lasnn("--version").stdout)


def test_distill_prints_plain_lines_when_piped(done):
    out = done.distilled.stdout
    assert "\x1b" not in out
    assert "\r" not in out
    for expected in (
        "student  vgg5:",
        "run folder: runs/tiny-1",
        "teacher: test accuracy 0.",
        "student: test accuracy 0.",
        "next: lasnn evaluate runs/tiny-1",
    ):
        assert expected in out
    assert re.search(r"stage1 +4 x 28 x 28 +stage1 +4 x 28 x 28", out)
    line = re.compile(
        r"student epoch 2/2  loss \d+\.\d{4} \(cross-entropy [\d.]+\)  accuracy 0\.\d{4}  "
        r"\d+ images/s  done"
    )
    assert line.search(out)


def test_distill_on_a_terminal_is_live(done):
    """In a pseudo-terminal the running epoch is drawn, with its terms and the time left."""
    parent, child = pty.openpty()
    arguments = [sys.executable, "-m", "lasnn", "distill", "tiny.toml", "--set", "distill.epochs=12"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "150"}
    process = subprocess.Popen(arguments, cwd=done.folder, stdout=child, stderr=child, env=environment)
    os.close(child)
    drawn = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:
            break
        if not piece:
            break
        drawn += piece
    assert process.wait() == 0
    assert b"\x1b[" in drawn
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert re.search(r"student epoch \d+/12  step \d+/8  cross-entropy [\d.]+", text)
    assert re.search(r"images/s  \d:\d\d:\d\d left", text)


def test_json_is_one_object(done):
    summary = done.json("distill", "tiny.toml")
    assert summary["run"].startswith("runs/tiny-")
    assert 0 <= summary["accuracy"] <= 1
    assert summary["timesteps"] == 2


def test_json_stays_alone_when_a_plugin_prints(done):
    (done.folder / "loud.py").write_text('print("a plugin speaks")\n')
    plugins = 'plugins=["tiny_clothes.py","loud.py"]'
    plan = done("distill", "tiny.toml", "--set", plugins, "--dry-run", "--json")
    assert json.loads(plan.stdout)["student"] == "vgg5"
    assert "a plugin speaks" in plan.stderr


def test_evaluate_one_t_and_several(done):
    single = done.json("evaluate", "runs/tiny-1", "--timesteps", "4")
    for key in ("accuracy", "timesteps", "firing_rate", "energy_uj", "images", "images_per_second"):
        assert key in single
    assert single["images"] == 120
    several = done.json("evaluate", "runs/tiny-1", "--timesteps", "1,2,4,8")["results"]
    assert [result["timesteps"] for result in several] == [1, 2, 4, 8]
    assert several[2]["accuracy"] == single["accuracy"]
    assert several[2]["firing_rate_by_layer"] == single["firing_rate_by_layer"]
    assert several[0]["energy_uj"] < several[3]["energy_uj"]
    summary = json.loads((done.folder / "runs/tiny-1/summary.json").read_text())
    assert done.json("evaluate", "runs/tiny-1")["accuracy"] == summary["accuracy"]
    table = done("evaluate", "runs/tiny-1", "--timesteps", "1,2").stdout
    assert "120 test images of tiny-clothes" in table
    assert "stage1.1" in table


def test_evaluate_without_a_run_takes_the_newest(done):
    newest = done.json("distill", "tiny.toml", "--set", "distill.epochs=1")["run"]
    assert done.json("evaluate")["run"] == newest


def test_dry_run_needs_no_data_and_writes_nothing(lasnn, tmp_path):
    out = lasnn("distill", "quickstart", "--dry-run").stdout
    for expected in ("teacher  vgg5", "parameters", "steps", "MiB", "stage3"):
        assert expected in out
    plan = lasnn.json("distill", "quickstart", "--dry-run", "--set", "data.name=fashion-mnist")
    assert plan["images"] == {"train": 60000, "test": 10000, "validation": 0}
    assert [pair["student"] for pair in plan["pairs"]] == ["stage1", "stage2", "stage3"]
    assert os.listdir(tmp_path) == []


def test_list(lasnn):
    out = lasnn("list").stdout
    for expected in (
        "architectures",
        "resnet19  ResNet-19",
        "width = 64  (a whole number (>= 1))",
        'pool = "avg"  (one of "avg", "max")',
        "attention  Layer-wise attention transfer",
        "quickstart  ",
    ):
        assert expected in out
    assert set(lasnn.json("list", "recipes")["recipes"]) >= {"quickstart"}
    assert lasnn.json("list", "losses")["losses"]["logit-kd"]["options"]["temperature"]["default"] == 4.0
    # What a network is given is no option of it, but may be one of a data set.
    assert "num_classes" in lasnn.json("list", "datasets")["datasets"]["image-folder"]["options"]
    assert "num_classes" not in lasnn.json("list", "architectures")["architectures"]["vgg5"]["options"]
    assert "did you mean 'neurons'?" in lasnn("list", "neuron", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["distill", "quickstart", "--set", "student.timestep=4"],
            "--set: student.timestep: unknown key 'timestep' in [student] (vgg5)",
        ),
        (
            ["distill", "quickstart", "--set", "student.timesteps=0"],
            "0 is not valid; it takes a whole number (>= 1)",
        ),
        (["distill", "quickstart", "--set", "student.timesteps=four"], "'four' is not valid"),
        (
            ["distill", "quickstart", "--set", 'distill.pairs=["stage4:stage1"]'],
            "known: stage1, stage2, stage3",
        ),
        (["distill", "quickstart", "--set", "student.architecture=resnet91"], "did you mean 'resnet19'?"),
        (["distill", "quikstart"], "did you mean 'quickstart'?"),
        (["evaluate", "nowhere"], "no folder nowhere"),
        (["evaluate", "fashion-vgg5-t4"], "the student that ships is called model:fashion-vgg5-t4"),
        (["evaluate", "."], "is not a run folder (it has no recipe.toml)"),
        (["evaluate"], "`lasnn distill quickstart` makes one"),
        (["evaluate", "--timesteps", "0"], "give whole numbers of at least 1"),
        (["evaluate", "--timesteps", "1,x"], "give whole numbers of at least 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(lasnn, tmp_path, arguments, message):
    result = lasnn(*arguments, code=2)
    [line] = result.stderr.splitlines()
    assert line.startswith("lasnn: ")
    assert message in line
    assert result.stdout == ""
    assert os.listdir(tmp_path) == [], "nothing half-written is left"


def test_all_mistakes_at_once(lasnn):
    settings = ["student.timesteps=0", "student.width=x", "data.batch_sise=3", 'losses.logit-kd.readout="stp"']
    result = lasnn("distill", "quickstart", *(item for text in settings for item in ("--set", text)), code=2)
    assert len(result.stderr.splitlines()) == 4
    assert (
        "--set: student.neuron.name: "
        in lasnn("distill", "quickstart", "--set", "student.neuron.name=lff", code=2).stderr
    )
    # What a recipe without mistakes of form builds.
    settings = ["device=gpu", 'distill.pairs=["stage9"]', "teacher.checkpoint=gone"]
    result = lasnn("distill", "quickstart", *(item for text in settings for item in ("--set", text)), code=2)
    for key in ("device", "distill.pairs", "teacher.checkpoint"):
        assert f"--set: {key}: " in result.stderr


def test_a_missing_and_a_truncated_data_file(lasnn, tmp_path):
    source = ROOT / "lasnn" / "data" / "fashion-mnist-mini"
    arguments = [
        "distill",
        "quickstart",
        "--set",
        "data.name=fashion-mnist",
        "--set",
        f"data.root={tmp_path / 'data'}",
    ]
    (tmp_path / "data").mkdir()
    for path in source.glob("*.gz"):
        content = path.read_bytes()
        (tmp_path / "data" / path.name).write_bytes(content[: len(content) // 2])
    [line] = lasnn(*arguments, code=2).stderr.splitlines()
    assert "train-images-idx3-ubyte.gz" in line
    (tmp_path / "data" / "train-images-idx3-ubyte.gz").unlink()
    [line] = lasnn(*arguments, code=2).stderr.splitlines()
    assert "train-images-idx3-ubyte" in line
    assert not (tmp_path / "runs").exists()


def test_a_full_disk(done):
    """A limit on the size of files stands for the disk: exit code 1, one line, nothing half-written."""

    def limit():
        # Python ignores SIGXFSZ, so that a write beyond the limit fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    result = done("distill", "tiny.toml", "--out", "full", "--set", "seed=9", code=1, preexec_fn=limit)
    [line] = result.stderr.splitlines()
    assert re.match(r"lasnn: cannot write full/\S+: File too large", line)
    assert not list(done.folder.glob("full/*.safetensors"))
    assert not list(done.folder.glob("full/.*"))
    assert not (done.folder / "full" / "summary.json").exists()


def test_a_folder_that_cannot_be_written(done):
    (done.folder / "file").write_text("")
    [line] = done("distill", "tiny.toml", "--out", "file/run", code=2).stderr.splitlines()
    assert line.startswith("lasnn: --out file/run: ")
    assert "is a file; name a folder" in line


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)]
)
def test_signals_save_and_say_how_to_go_on(done, signum, code):
    out = f"signalled-{code}"
    process = done.start("distill", "tiny.toml", "--out", out, "--set", "distill.epochs=500")
    for line in process.stdout:
        if re.match(r"student epoch +2/", line):
            process.send_signal(signum)
            break
    process.stdout.read()
    err = process.stderr.read()
    assert process.wait() == code
    assert "Traceback" not in err
    assert f"the state is in {out}/last.pt" in err
    command = re.search(r"go on with: lasnn (.*)", err).group(1).split()
    assert torch.load(done.folder / out / "last.pt", weights_only=True)["epoch"] >= 2
    process = done.start(*command)
    for line in process.stdout:
        if line.startswith("resuming the student "):
            process.kill()
            break
    else:
        pytest.fail("it did not resume")
    process.communicate()


def test_a_signal_before_the_training_ends_the_command(done):
    (done.folder / "slow.py").write_text("import sys, time\nprint('here', flush=True)\ntime.sleep(60)\n")
    process = done.start("distill", "tiny.toml", "--set", 'plugins=["slow.py"]')
    # Which file is loaded is said before it runs.
    assert process.stdout.readline() == f"plugin: {done.folder / 'slow.py'}\n"
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err


def test_a_users_architecture_learns_from_a_shipped_teacher(lasnn, tmp_path):
    """The tutorial's example of a plugin, distilled from a shipped architecture, then evaluated from its run folder."""
    from common import TINY, TINY_DATA

    tutorial = (ROOT / "docs" / "tutorials" / "architecture.md").read_text()
    code = re.search(r"%%writefile my_nets.py\n(.*?)```", tutorial, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    (tmp_path / "my_nets.py").write_text(code)
    (tmp_path / "tiny_clothes.py").write_text(TINY_DATA)
    name = re.search(r'register\("(.+?)"\)', code).group(1)
    recipe = TINY.replace('[student]\narchitecture = "vgg5"', f'[student]\narchitecture = "{name}"')
    (tmp_path / "mine.toml").write_text('plugins = ["my_nets.py", "tiny_clothes.py"]\n' + recipe)
    plan = lasnn.json("distill", "mine.toml", "--dry-run")
    assert (plan["teacher"], plan["student"]) == ("vgg5", name)
    assert plan["pairs"]
    summary = lasnn.json("distill", "mine.toml")
    # The run folder is all that evaluation needs.
    (tmp_path / "my_nets.py").unlink()
    (tmp_path / "mine.toml").unlink()
    assert lasnn.json("evaluate")["accuracy"] == summary["accuracy"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "3000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")],
)
def test_the_commands_wait_for_threads_briefly_unless_told_otherwise(given, wanted, lasnn):
    (lasnn.folder / "says.py").write_text(
        "import os\nprint(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))\n"
    )
    (lasnn.folder / "says.toml").write_text('plugins = ["says.py"]\n')
    # What another test's command, run in this process, has set.
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        lasnn.environment.pop(name, None)
    lasnn.environment.update(given)
    assert lasnn("distill", "says.toml", "--dry-run", code=2).stdout.splitlines()[1] == wanted
