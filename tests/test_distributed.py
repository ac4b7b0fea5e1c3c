"""Several processes, started by torchrun, train what one process trains, and stop and fail as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import TINY_DATA
from lasnn.weights import digest, load_weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

# 45 images in batches of 11: five steps, four of them uneven for two processes and for three, the last with one image.
FEW = TINY_DATA.replace("400", "45").replace("120", "23")

# What two processes could do differently: draws for the images and for the encoder, labels that mix, a shortcut's norm,
# a frozen and an unused block, which has to stay as it is under decay.
PARTS = '''
import os, signal
import torch
from torch import nn
from lasnn import architectures, losses
from lasnn.errors import UserError
from lasnn.architecture.resnet import _resnet
from lasnn.kernels import BatchNorm2d
from lasnn.loss import couples_images


@architectures.register("odd")
def odd(act, *, in_channels: int, num_classes: int):
    """A small residual network with a frozen block and one that is not used."""
    network = _resnet(act, in_channels, 4, [(4, 1, 1), (8, 1, 2)], nn.Linear(8, num_classes))
    network.stage2[0].conv2.requires_grad_(False)
    network.stage1 = First(network.stage1[0], nn.Conv2d(4, 4, 3))
    return network


class First(nn.Sequential):
    def forward(self, x):
        return self[0](x)


@losses.register("learnt")
class Learnt(nn.Module):
    """A convolution and a batch norm from the first pair's currents to the teacher's."""

    def __init__(self, student_shapes, teacher_shapes):
        super().__init__()
        self.conv = nn.Conv2d(student_shapes[0][0], teacher_shapes[0][0], 3, bias=False)
        self.norm = BatchNorm2d(teacher_shapes[0][0])

    def forward(self, student_currents, teacher_currents):
        return (self.norm(self.conv(student_currents[0][0])) - teacher_currents[0][..., 1:-1, 1:-1]).square().mean()


@losses.register("coupled")
@couples_images
class Coupled(nn.Module):
    """Which images are alike, in logits behind a learnt layer and a batch norm of their own, and in labels."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_classes, 6, bias=False), nn.BatchNorm1d(6))

    def forward(self, logits, targets, teacher_logits):
        ours = self.layers(logits.mean(0)) if len(targets) > 1 else self.layers[0](logits.mean(0))
        return (ours @ ours.T - targets @ targets.T + teacher_logits @ teacher_logits.T).square().mean()


calls = 0


@losses.register("fault")
def fault(logits, targets):
    """Nothing, but for the process and the step that FAULT names, as "1:7:kill", before torchrun's last attempt."""
    global calls
    # The plan tries a loss on random logits, which no layer has made.
    if logits.requires_grad and logits.grad_fn.name() != "CloneBackward0":
        calls += 1
        rank, step, what = os.environ.get("FAULT", ":0:").split(":")
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if os.environ.get("RANK") == rank and calls == int(step) - again:
            if what == "kill" and again < int(os.environ.get("KILLS", 1)):
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop":
                # torchrun's, which hands it on.
                os.kill(os.getppid(), signal.SIGTERM)
            if what == "error":
                raise UserError("this image is torn")
    return 0 * logits.mean()
'''

RECIPE = """
plugins = ["few.py", "parts.py"]

[data]
name = "tiny-clothes"
batch_size = 11
augment = ["flip", "mixup"]

[teacher]
architecture = "odd"
epochs = 1
lr = 0.05

[student]
architecture = "odd"
timesteps = 3
encoder = "poisson"

[student.neuron]
name = "plif"

[distill]
epochs = 1
lr = 0.05
weight_decay = 0.1

[[losses]]
name = "cross-entropy"

[[losses]]
name = "attention"
weight = 100.0

[[losses]]
name = "learnt"

[[losses]]
name = "coupled"
weight = 0.001

[[losses]]
name = "similarity"

[[losses]]
name = "cka"

[[losses]]
name = "fault"
"""
PARTS_OF_A_BATCH = """losses=[
    {name = "cross-entropy"}, {name = "attention", weight = 100.0}, {name = "learnt"}
]"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe, as `several.toml`, and its plugins."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "few.py").write_text(FEW)
    (folder / "parts.py").write_text(PARTS)
    (folder / "several.toml").write_text(RECIPE)
    return folder


def run(folder: Path, *command, code: int = 0, count: int = 1, restarts: int = 0, fault: str = ":0:"):
    """A program (or `-m module`) with its arguments in `count` processes; teachers are not shared between runs."""
    launch = [*TORCHRUN, f"--nproc-per-node={count}", f"--max-restarts={restarts}"] if count > 1 else [sys.executable]
    environment = {**os.environ, "FAULT": fault, "PYTHONUNBUFFERED": "1"}
    command = [*launch, *map(str, command)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    return done


def distill(folder: Path, out: Path, *options, epochs: int = 3, **launch):
    """`lasnn distill` without a teacher, whose phase is as the student's."""
    settings = [f"--set=distill.epochs={epochs}", "--out", out, *options]
    return run(folder, "-m", "lasnn", "distill", "several.toml", *settings, **launch)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_none(figures):
    """Of losses that compare images there is no gradient on so few."""
    return {name: value for name, value in figures.items() if value is not None} if type(figures) is dict else figures


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, []),
        pytest.param(3, ["data.accumulate=2", "data.batch_size=22", PARTS_OF_A_BATCH], marks=pytest.mark.full),
        pytest.param(3, ["student.encoder=direct", "distill.optimizer=adamw"], marks=pytest.mark.full),
        pytest.param(2, ["distill.time_chunk=2"], marks=pytest.mark.full),
        pytest.param(2, ["data.validation=6", "distill.ema=0.9"], marks=pytest.mark.full),
    ],
    ids=str,
)
def test_processes_train_what_one_trains(folder, tmp_path, count, settings):
    """Five steps of teacher and student in fp64: uneven shares, a batch of one image, whatever draws, and losses that
    compare the images of a batch, which each process is given.
    """
    script = Path(__file__).with_name("double_precision.py")
    outs = []
    for number in (1, count):
        outs.append(tmp_path / str(number))
        outs[-1].mkdir()
        run(outs[-1], script, folder / "several.toml", "out", *settings, count=number)
    one, several = (out / "out" for out in outs)
    assert json.loads((several / "env.json").read_text())["world_size"] == count
    assert json.loads((one / "env.json").read_text())["world_size"] == 1

    for name in ("teacher.safetensors", "student.safetensors"):
        wanted, got = (load_weights(out / name)[0] for out in (one, several))
        assert {value.dtype for value in wanted.values()} == {torch.float64, torch.int64}
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    wanted, got = (torch.load(out / "last.pt", weights_only=True)["objective"] for out in (one, several))
    assert len(wanted) == 6 + 6 * (PARTS_OF_A_BATCH not in settings), "what the losses learn, and their batch norms"
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    for wanted, got in zip(metrics(one), metrics(several), strict=True):
        assert got["losses"] == pytest.approx(wanted["losses"], abs=1e-9)
        assert got["accuracy"] == wanted["accuracy"]
        assert got.keys() == wanted.keys()
        if "validation_nll" in wanted:
            assert got["validation_nll"] == pytest.approx(wanted["validation_nll"], rel=1e-9)
        assert got.get("diagnostics", {}).keys() == wanted.get("diagnostics", {}).keys()
        for what, value in wanted.get("diagnostics", {}).items():
            assert without_none(got["diagnostics"][what]) == pytest.approx(without_none(value), rel=1e-5)
        assert round(23 * got["accuracy"]) == pytest.approx(23 * got["accuracy"])
    wanted, got = (json.loads((out / "summary.json").read_text()) for out in (one, several))
    for key in ("accuracy", "firing_rate", "energy_uj", "images", "epochs"):
        assert got[key] == pytest.approx(wanted[key], rel=1e-12)


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The run of two processes that nothing disturbs."""
    distill(folder, folder / "undisturbed", count=2)
    return folder / "undisturbed"


def same_weights(out: Path, other: Path) -> bool:
    """Bit for bit; the files differ in the order of their metadata."""
    return all(
        digest(load_weights(out / name)[0]) == digest(load_weights(other / name)[0])
        for name in ("teacher.safetensors", "student.safetensors")
    )


def lines(done: subprocess.CompletedProcess) -> list[str]:
    """What lasnn itself has said on standard error, beside torchrun."""
    return [line for line in done.stderr.splitlines() if line.startswith("lasnn: ")]


@pytest.mark.full
def test_in_fp32_the_first_step_s_loss_is_that_of_one_process(folder, undisturbed):
    """All images in one batch: the epoch's loss is its one step's."""
    found = []
    for count in (1, 2):
        out = folder / f"first-{count}"
        distill(folder, out, "--set=data.batch_size=45", "--set=student.encoder=direct", epochs=1, count=count)
        found.append(metrics(out)[-1]["losses"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_one_process_writes_and_prints(undisturbed):
    """A line for each epoch, in the file as on the terminal."""
    assert [(epoch["phase"], epoch["epoch"]) for epoch in metrics(undisturbed)] == [
        ("teacher", 1),
        *[("student", epoch) for epoch in (1, 2, 3)],
    ]
    assert not list(undisturbed.glob(".*.????????*"))


@pytest.mark.full
def test_a_signal_stops_all_after_the_same_step_and_they_go_on(folder, undisturbed):
    out = folder / "stopped"
    done = distill(folder, out, count=2, fault="1:7:stop", code=1)
    [line] = lines(done)
    assert line == f"lasnn: stopped by SIGTERM; the state is in {out / 'last.pt'}"
    command = f"torchrun --nproc-per-node 2 -m lasnn distill {out / 'recipe.toml'} --out {out} --resume"
    assert f"go on with: {command}" in done.stderr
    state = torch.load(out / "last.pt", weights_only=True)
    assert (state["phase"], state["epoch"]) == ("student", 1)
    assert 1 <= state["step"] < 5
    run(folder, *command.split()[3:], count=2)
    assert same_weights(out, undisturbed)
    assert [epoch["losses"] for epoch in metrics(out)] == [epoch["losses"] for epoch in metrics(undisturbed)]


@pytest.mark.full
@pytest.mark.parametrize("kills", [1, 2])
def test_killed_processes_are_started_again_and_go_on(folder, undisturbed, monkeypatch, kills):
    """Process 1 is killed in step 7, both begin again, it is killed six steps later, and they come to the end."""
    monkeypatch.setenv("KILLS", str(kills))
    out = folder / f"killed-{kills}"
    done = distill(folder, out, "--set=save_minutes=0", count=2, restarts=3, fault="1:7:kill")
    assert done.stdout.count("resuming the student") == kills
    assert same_weights(out, undisturbed)


@pytest.mark.full
def test_what_one_process_fails_of_is_said_once(folder):
    done = distill(folder, folder / "failed", count=2, fault="1:3:error", code=1)
    assert lines(done) == ["lasnn: this image is torn"]
    assert "gloo" not in done.stderr
    # torchrun's report, at the end, has it too.
    assert "traceback : this image is torn" in done.stderr


@pytest.mark.full
def test_what_all_fail_of_is_said_once(folder, undisturbed):
    done = distill(folder, undisturbed, count=2, code=1)
    assert lines(done) == [
        f"lasnn: {undisturbed} is not empty; choose another --out, or --resume to go on with the run in it"
    ]
    assert "exitcode  : 2 " in done.stderr
    done = distill(folder, folder / "none", "--set=data.batch_size=1", count=2, code=1)
    [line] = lines(done)
    assert "data.batch_size: 1 images cannot be shared by 2 processes" in line
    assert not (folder / "none").exists()
