"""The main job on a tiny recipe: what it leaves, that it repeats, that it can be stopped, and what teaches what."""

import hashlib
import json
import math
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from lasnn import build, distill, evaluate, load_run, losses
from lasnn.callback import Callback
from lasnn.data import Images
from lasnn.errors import MachineError, UserError
from lasnn.evaluation.measure import teacher_accuracy
from lasnn.recipe.schema import Recipe, Training
from lasnn.training.optimizer import learning_rate, make_optimizer
from lasnn.training.precision import Precision
from lasnn.training.stop import Stopped, stop_on_signals
from lasnn.training.teacher import teacher_key
from lasnn.weights import load_state

FILES = {
    "recipe.toml",
    "data.json",
    "env.json",
    "metrics.jsonl",
    "student.safetensors",
    "teacher.safetensors",
    "teacher.json",
    "last.pt",
    "summary.json",
    "tiny_clothes.py",
}
TIMES = ("seconds", "teacher_seconds", "images_per_second")


def without_times(metrics):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]


def digest(path):
    """Of the tensors; a file's metadata may name its own folder."""
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in load_file(path).items()}


def test_a_run_folder_is_complete(tiny):
    run = distill(tiny)
    assert str(run.path) == "runs/tiny-1"
    assert {path.name for path in run.path.iterdir()} == FILES
    summary = run.read_json("summary.json")
    for key in ("accuracy", "teacher_accuracy", "timesteps", "firing_rate", "seconds", "images_per_second"):
        assert summary[key] is not None
    lines = run.metrics()
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        ("teacher", 1),
        ("teacher", 2),
        ("student", 1),
        ("student", 2),
    ]
    for line in lines:
        assert set(line["losses"]) == {"cross-entropy"}
    assert summary["accuracy"] == lines[-1]["accuracy"], "the last epoch's, and measured alike"
    assert summary["teacher_accuracy"] == lines[1]["accuracy"]
    assert 0 < summary["firing_rate"] < 1
    assert run.read_json("env.json")["world_size"] == 1
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["phase"] == "student"
    assert state["epoch"] == 2

    loaded = load_run(run.path)
    assert not loaded.student.training
    images = torch.rand(3, 1, 28, 28)
    assert loaded.student(images).shape == (3, 10)
    assert loaded.teacher(images).shape == (3, 10)
    for network in (loaded.student, loaded.teacher):
        with pytest.raises(ValueError, match=r"in \[0, 1\], not from -1 to 1; the network itself applies mean"):
            network(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 28, 28))
    [result] = evaluate(run.path)
    assert result["accuracy"] == summary["accuracy"]
    assert result["timesteps"] == 2


def test_the_sum_is_the_weighted_terms(tiny):
    run = distill(tiny, overrides=['losses=[{name="cross-entropy",weight=0.5},{name="attention",weight=10.0}]'])
    line = run.metrics()[-1]
    assert line["loss"] == pytest.approx(0.5 * line["losses"]["cross-entropy"] + 10 * line["losses"]["attention"])


def test_the_same_seed_repeats_to_the_last_digit_also_with_a_cached_teacher(tiny):
    first_notes, second_notes = Notes(), Notes()
    first = distill(tiny, progress=first_notes)
    second = distill(tiny, progress=second_notes)
    assert not any("cache" in line for line in first_notes.lines)
    assert any("from the cache" in line and "not trained again" in line for line in second_notes.lines)
    assert without_times(first.metrics()) == without_times(second.metrics())
    for name in ("student.safetensors", "teacher.safetensors"):
        assert digest(first / name) == digest(second / name)
    one, two = (run.read_json("summary.json") for run in (first, second))
    assert without_times([one]) == without_times([two])
    other = distill(tiny, overrides=["seed=1"])
    assert digest(other / "student.safetensors") != digest(first / "student.safetensors")
    assert digest(other / "teacher.safetensors") != digest(first / "teacher.safetensors")


@pytest.mark.parametrize(
    ("setting", "trains_again"),
    [
        ("student.timesteps=1", False),
        ("distill.epochs=1", False),
        ("data.root=elsewhere", False),
        ("data.download=true", False),
        ("teacher.epochs=1", True),
        ("teacher.width=5", True),
        ("data.batch_size=40", True),
        ("data.augment=[]", True),
    ],
)
def test_what_defines_a_cached_teacher(tiny, setting, trains_again):
    cpu, images = torch.device("cpu"), Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    # One that can be fetched.
    always = ["data.name=fashion-mnist"]
    keys = {teacher_key(Recipe.load(tiny, [*always, *overrides]), cpu, images) for overrides in ([], [setting])}
    assert len(keys) == 1 + trains_again
    other = Images(images.pixels + 1, images.labels)
    assert teacher_key(Recipe.load(tiny), cpu, other) not in keys, "the images themselves count, not where they lie"


def test_the_attention_loss_teaches(tiny):
    """With attention in the objective, the student's maps end closer to the teacher's than without."""
    settings = ["distill.epochs=4", "data.augment=[]"]
    ends = []
    for weight in (0.0, 1000.0):
        terms = f'losses=[{{name="cross-entropy"}},{{name="attention",weight={weight}}}]'
        ends.append(distill(tiny, overrides=[*settings, terms]).metrics()[-1]["losses"]["attention"])
    assert ends[1] < 0.7 * ends[0]


@pytest.mark.parametrize("settings", [[], ["precision=bf16"], ["distill.time_chunk=1"]], ids=str)
def test_every_loss_trains(tiny, settings):
    names = losses.names()
    terms = ",".join(f'{{name="{name}",weight=0.1}}' for name in names)
    run = distill(tiny, overrides=[f"losses=[{terms}]", "distill.epochs=1", "teacher.epochs=1", *settings])
    assert list(run.metrics()[-1]["losses"]) == names
    assert all(math.isfinite(value) for value in run.metrics()[-1]["losses"].values())


@pytest.mark.parametrize(
    ("encoder", "neuron"),
    [
        ("direct", "if"),
        ("rate", "plif"),
        ("poisson", "plif"),
        *(
            pytest.param(*more, marks=pytest.mark.full)
            for more in (("direct", "plif"), ("rate", "if"), ("poisson", "if"))
        ),
    ],
)
def test_encoders_and_neurons_train_repeatably(tiny, encoder, neuron):
    settings = [
        f"student.encoder={encoder}",
        f"student.neuron.name={neuron}",
        "distill.epochs=1",
        "teacher.epochs=1",
    ]
    runs = [distill(tiny, overrides=settings) for _ in range(2)]
    assert digest(runs[0] / "student.safetensors") == digest(runs[1] / "student.safetensors")
    [one], [two] = (evaluate(run.path) for run in runs)
    assert one["accuracy"] == two["accuracy"]
    if neuron == "plif":
        start = {value for key, value in load_file(runs[0] / "student.safetensors").items() if ".neuron.w" in key}
        assert any(abs(float(value)) > 0 for value in start), "tau is learnt"


def test_optimiser_settings_are_read():
    module = torch.nn.Conv2d(1, 2, 3)
    config = Training(lr=0.3, momentum=0.5, weight_decay=0.01)
    sgd = make_optimizer(module, config).param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.3, 0.5, 0.01)
    adamw = make_optimizer(module, config.model_copy(update={"optimizer": "adamw"}))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.5, 0.999)
    assert adamw.param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_gradients_are_clipped(tiny, clip):
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.data.zero_()
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    Precision("fp32", torch.device("cpu")).step(optimizer, module, clip, found_inf=None)
    assert module.weight.norm().item() == pytest.approx(min(5.0, clip or 5.0))


def test_a_step_that_is_not_finite_is_left_out(tiny):
    module = torch.nn.Linear(2, 1, bias=False)
    optimizer = make_optimizer(module, Training(), fused=True)
    before = module.weight.detach().clone()
    module.weight.grad = torch.ones(1, 2)
    Precision("fp32", torch.device("cpu")).step(optimizer, module, 0.0, found_inf=torch.ones(()))
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize(
    "setting",
    [
        'losses=[{name="cross-entropy",label_smoothing=0.2},{name="attention",weight=1000.0}]',
        'losses=[{name="cross-entropy"},{name="attention",weight=1000.0,power=1.0}]',
        "student.init=teacher",
        "student.neuron.tau=3.0",
        "student.encoder=poisson",
    ],
)
def test_settings_of_the_objective_are_read(tiny, setting):
    base = ["teacher.epochs=1", 'losses=[{name="cross-entropy"},{name="attention",weight=1000.0}]']
    values = []
    for settings in (base, [*base, setting]):
        built = build(tiny, overrides=settings, train_teacher=True)
        values.append(built.objective(*next(iter(built.batches(0))))["loss"].item())
    assert values[0] != values[1]


def test_training_settings_reach_the_training(tiny):
    """Of both phases; what each does to the optimiser is tested above."""
    settings = ["lr=0.01", "momentum=0.5", "weight_decay=0.1", "clip_norm=0.01", "warmup_epochs=0.5", "min_lr=0.005"]
    changed = [f"{table}.{setting}" for table in ("teacher", "distill") for setting in settings]
    run = distill(tiny, overrides=["teacher.epochs=1", "distill.epochs=1", *changed])
    group = load_state(run / "last.pt")["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.1)
    config = Training(epochs=1, lr=0.01, warmup_epochs=0.5, min_lr=0.005)
    assert [line["lr"] for line in run.metrics()] == [learning_rate(config, 7, 8)] * 2


def test_half_precision_is_what_the_convolutions_compute_in(tiny):
    with Precision("bf16", torch.device("cpu")).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with Precision("fp32", torch.device("cpu")).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_label_smoothing_of_the_teacher(tiny):
    short = ["teacher.epochs=1", "distill.epochs=1"]
    plain = distill(tiny, overrides=short).metrics()[0]["loss"]
    assert distill(tiny, overrides=[*short, "teacher.label_smoothing=0.3"]).metrics()[0]["loss"] != plain


def test_a_student_that_starts_from_its_teacher(tiny):
    settings = ["student.init=teacher", "student.neuron.name=plif", "distill.epochs=1", "distill.lr=1e-12"]
    run = distill(tiny, overrides=[*settings, "distill.momentum=0", "distill.weight_decay=0"])
    student, teacher = load_file(run / "student.safetensors"), load_file(run / "teacher.safetensors")
    for name, value in teacher.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(student[name], value, atol=1e-6, rtol=0)


def test_the_teacher_may_come_from_another_run_or_a_file(tiny):
    first = distill(tiny)
    text = tiny.read_text().replace("epochs = 2\n", "", 1)
    tiny.write_text(text)
    for where in (first.path, first / "teacher.safetensors"):
        run = distill(tiny, overrides=[f"teacher.checkpoint={where}"])
        assert digest(run / "teacher.safetensors") == digest(first / "teacher.safetensors")
        assert digest(run / "student.safetensors") == digest(first / "student.safetensors")
        assert [line["phase"] for line in run.metrics()] == ["student", "student"]
        again = Recipe.load(run / "recipe.toml")
        assert again.teacher.checkpoint == str(where), "as it was written"
        assert run.read_json("env.json")["teacher_checkpoint"] == str(where.absolute())


def test_without_a_teacher(tiny):
    text = tiny.read_text()
    tiny.write_text(text[: text.index("[teacher]")] + text[text.index("[student]") :])
    run = distill(tiny)
    summary = run.read_json("summary.json")
    assert summary["teacher_accuracy"] is None
    assert not (run / "teacher.safetensors").exists()
    assert load_run(run.path).teacher is None
    assert "teacher_accuracy" not in evaluate(run.path)[0]


class StopAt(Callback):
    """Raises a signal after a number of reports, as a user or a scheduler would."""

    def __init__(self, phase, at_epoch, signum):
        self.wanted, self.signum = (phase, at_epoch), signum

    def epoch(self, phase, epoch, epochs, steps):
        if (phase, epoch) == self.wanted:
            signal.raise_signal(self.signum)


@pytest.mark.parametrize(
    ("phase", "signum"),
    [
        ("teacher", signal.SIGINT),
        ("student", signal.SIGTERM),
        pytest.param("teacher", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("student", signal.SIGINT, marks=pytest.mark.full),
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights(tiny, phase, signum):
    whole = distill(tiny, "whole")
    # The stopped run must train its own teacher.
    settings = ["seed=0"]
    shutil.rmtree("runs")
    with pytest.raises(Stopped) as caught:
        distill(tiny, "stopped", overrides=settings, progress=StopAt(phase, 1, signum))
    assert caught.value.signum == signum
    state = load_state(caught.value.run / "last.pt")
    assert (state["phase"], state["epoch"], state["step"]) == (phase, 1, 1)
    assert not (caught.value.run / "student.safetensors").exists()
    with pytest.raises(UserError, match="has no student yet; finish it with `lasnn distill stopped/recipe.toml"):
        load_run("stopped")
    with pytest.raises(UserError, match="is not empty"):
        distill(tiny, "stopped")
    if signum == signal.SIGINT:
        # Left out, the folder is that of the newest unfinished run of the recipe under runs/; this one has to be moved.
        with pytest.raises(
            UserError, match="there is no unfinished run of tiny under runs to resume; leave --resume out"
        ):
            distill(tiny, resume=True)
        shutil.move("stopped", "runs/tiny-7")
        with pytest.raises(UserError, match=r"tiny-7 holds a run of another recipe \(seed: was 0, now 1\)"):
            distill(tiny, overrides=["seed=1"], resume=True)
        shutil.move("runs/tiny-7", "runs/of-any-name")
        resumed = distill(tiny, resume=True)
        assert str(resumed.path) == "runs/of-any-name"
        with pytest.raises(UserError, match="there is no unfinished run of tiny"):
            distill(tiny, resume=True)
    else:
        resumed = distill(tiny, "stopped", resume=True)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert digest(resumed / "teacher.safetensors") == digest(whole / "teacher.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())


def test_resume_of_nothing_of_a_finished_run_and_of_another_recipe(tiny):
    notes = Notes()
    run = distill(tiny, "out", resume=True, progress=notes)
    assert "nothing to resume in out; starting from the beginning" in notes.lines
    before = (run / "student.safetensors").stat().st_mtime_ns
    distill(tiny, "out", resume=True, progress=notes)
    assert "is finished; there is nothing to resume" in notes.lines[-1]
    assert (run / "student.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"out holds a run of another recipe \(distill.lr: was 0.05, now 0.1\)"):
        distill(tiny, "out", resume=True, overrides=["distill.lr=0.1"])


def test_a_folder_that_is_not_a_run(tiny, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match="full is not empty"):
            distill(tiny, "full", resume=resume)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file; name a folder"):
        distill(tiny, "tiny.toml")
    with pytest.raises(UserError, match="full is not a run folder"):
        load_run("full")


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(MachineError, match=r"the student's loss is not a finite number in epoch 1, step \d+"):
        distill(tiny, overrides=["distill.lr=1e30", "distill.optimizer=adamw"])
    assert not list(tiny.parent.glob("runs/tiny-1/student.safetensors"))
    with pytest.raises(MachineError, match=r"not (a )?finite number"):
        # One step in all: the loss was fine, what the weights that it left compute is not.
        distill(tiny, overrides=["distill.lr=1e38", "distill.epochs=1", "data.batch_size=400"])
    assert not list(tiny.parent.glob("runs/*/student.safetensors"))


def test_the_schedule():
    table = Training(epochs=10, lr=1.0, min_lr=0.1, warmup_epochs=2)
    rates = [learning_rate(table, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[30] == pytest.approx(0.55)
    assert 0.1 < rates[49] < 0.11
    assert learning_rate(Training(epochs=1, lr=0.5), 0, 1) == 0.5
    short = Training(epochs=3, lr=0.1, warmup_epochs=0.1)
    assert max(learning_rate(short, step, 3) for step in range(9)) <= 0.1, "no overshoot"


def test_norms_and_biases_do_not_decay():
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    decaying, plain = make_optimizer(module, Training()).param_groups
    assert [p.ndim for p in decaying["params"]] == [4]
    assert decaying["weight_decay"] == 5e-4
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0


def test_signals_are_left_alone_outside_a_run_and_in_threads():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        assert stop.signum == 0
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []

    def elsewhere():
        with stop_on_signals() as stop:
            seen.append(stop.signum)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [0]


class Notes(Callback):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("damage", ["teacher.safetensors", "teacher.json", "metrics.jsonl"])
def test_a_damaged_cached_teacher_is_trained_again(tiny, damage):
    first = distill(tiny)
    [cache] = tiny.parent.glob("runs/teachers/*")
    (cache / damage).write_text("[]\n{}")
    notes = Notes()
    second = distill(tiny, progress=notes)
    assert any("cannot be used and is trained again" in line for line in notes.lines)
    assert digest(second / "student.safetensors") == digest(first / "student.safetensors")
    assert digest(cache / "teacher.safetensors") == digest(first / "teacher.safetensors")


def test_a_cache_that_cannot_be_written_costs_no_run(tiny):
    (tiny.parent / "runs").mkdir()
    (tiny.parent / "runs" / "teachers").write_text("a file")
    notes = Notes()
    run = distill(tiny, "out", progress=notes)
    assert any(line.startswith("the teacher is not cached: ") for line in notes.lines)
    assert run.read_json("summary.json")["accuracy"] >= 0


def test_a_plugin_that_changed_is_not_resumed(tiny):
    with pytest.raises(Stopped):
        distill(tiny, "out", progress=StopAt("student", 1, signal.SIGTERM))
    plugin = tiny.parent / "tiny_clothes.py"
    copy = tiny.parent / "out" / "tiny_clothes.py"
    copy.write_text(plugin.read_text() + "\n# not what the run began with\n")
    with pytest.raises(UserError, match="tiny_clothes.py has changed since the run in out began"):
        distill(tiny, "out", resume=True)


def test_a_module_that_changed_is_not_resumed(tiny, monkeypatch):
    """It has no copy in the run folder."""
    monkeypatch.syspath_prepend(str(tiny.parent))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    module = tiny.parent / "module_of_clothes.py"
    (tiny.parent / "tiny_clothes.py").rename(module)
    tiny.write_text(tiny.read_text().replace("tiny_clothes.py", "module_of_clothes"))
    with pytest.raises(Stopped):
        distill(tiny, "out", progress=StopAt("student", 1, signal.SIGTERM))
    before = module.read_text()
    module.write_text(before + "\n# not what the run began with\n")
    with pytest.raises(UserError, match="the module module_of_clothes has changed since the run in out began"):
        distill(tiny, "out", resume=True)
    module.write_text(before)
    assert distill(tiny, "out", resume=True).read_json("summary.json")


def test_a_state_of_the_student_is_not_lost_with_the_teachers_file(tiny):
    """Without it and without the cache the teacher would be trained anew, over what the student has learnt."""
    with pytest.raises(Stopped):
        distill(tiny, "out", progress=StopAt("student", 1, signal.SIGTERM))
    state = (tiny.parent / "out/last.pt").read_bytes()
    (tiny.parent / "out/teacher.safetensors").rename(tiny.parent / "kept")
    shutil.rmtree(tiny.parent / "runs")
    with pytest.raises(UserError, match=r"last.pt is of the student's training, but .*teacher.safetensors is missing"):
        distill(tiny, "out", resume=True)
    assert (tiny.parent / "out/last.pt").read_bytes() == state
    (tiny.parent / "kept").rename(tiny.parent / "out/teacher.safetensors")
    assert distill(tiny, "out", resume=True).read_json("summary.json")


def test_a_cached_teacher_is_measured_on_todays_test_images(tiny):
    """What it is trained on defines it, and not what it is measured on."""
    plugin = tiny.parent / "tiny_clothes.py"
    whole = "Images(test.pixels[::16][:120], test.labels[::16][:120])"
    shifted = "(test.labels[::16][:120] + __import__('os').path.exists('shifted')) % 10"
    plugin.write_text(plugin.read_text().replace(whole, f"Images(test.pixels[::16][:120], {shifted})"))
    first = distill(tiny, "first").read_json("summary.json")["teacher_accuracy"]
    (tiny.parent / "shifted").touch()
    notes = Notes()
    run = distill(tiny, "second", progress=notes)
    loaded = load_run(run.path)
    measured = teacher_accuracy(loaded.teacher, loaded.images.test, batch_size=50)
    assert run.read_json("summary.json")["teacher_accuracy"] == pytest.approx(measured) != first
    assert any("from the cache" in line for line in notes.lines)
    assert any("is of other test images, and is measured again" in line for line in notes.lines)
    assert not any(epoch["phase"] == "teacher" for epoch in run.metrics())


def test_overrides_go_with_a_file(tiny):
    with pytest.raises(UserError, match="already checked"):
        distill(Recipe.load(tiny), overrides=["seed=3"])


def test_what_layers_draw_depends_on_the_recipe_alone(tiny):
    """Dropout draws from the global generator, in the conversion too; it is keyed, and the caller's state, which may be
    any, is given back. A cached teacher makes no difference.
    """
    (tiny.parent / "drop.py").write_text(
        """
from torch import nn
from lasnn import Staged, architectures


def with_dropout(act, *, in_channels: int, num_classes: int) -> Staged:
    \"\"\"One stage, and dropout in it.\"\"\"
    layers = [nn.Conv2d(in_channels, 4, 3, padding="same"), act(4), nn.Dropout(0.5)]
    stage = nn.Sequential(*layers, nn.Conv2d(4, 4, 3, padding="same"), act(4))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return Staged({"stage1": stage}, head)


architectures.register("with-dropout")(with_dropout)
"""
    )
    settings = ['plugins=["tiny_clothes.py","drop.py"]', "student.architecture=with-dropout", "student.width="]
    settings += ["teacher.architecture=with-dropout", "teacher.width=", "student.init=converted"]
    runs = []
    for seed in (5, 6):
        state = torch.manual_seed(seed).get_state()
        runs.append(distill(tiny, overrides=settings))
        assert torch.equal(torch.get_rng_state(), state)
    assert digest(runs[0] / "student.safetensors") == digest(runs[1] / "student.safetensors")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "from lasnn import losses\n@losses.register('bad-{n}')\ndef bad(logits, targets):\n    return logits\n",
            "must return one number",
        ),
        (
            "from lasnn import losses\n@losses.register('bad-{n}')\ndef bad(logits, targets): return logits @ logits\n",
            r"failed: RuntimeError: .*bad.py:3\)",
        ),
    ],
)
def test_a_users_loss_is_tried_before_the_first_batch(tiny, code, message):
    name = f"bad-{len(message)}"
    (tiny.parent / "bad.py").write_text(code.replace("bad-{n}", name))
    settings = ['plugins=["tiny_clothes.py","bad.py"]', f'losses=[{{name="{name}"}}]']
    with pytest.raises(UserError, match=message):
        distill(tiny, overrides=settings)
    assert not (tiny.parent / "runs").exists()


def test_data_that_is_not_what_it_announces(tiny):
    (tiny.parent / "odd.py").write_text(
        """
import torch
from lasnn import datasets
from lasnn.data import Dataset, Images

@datasets.register("odd-labels")
class OddLabels(Dataset):
    \"\"\"Twenty images with a label too many.\"\"\"

    channels, height, width = 1, 28, 28
    classes, mean, std = ("a", "b"), (0.5,), (0.5,)
    train_size = test_size = 20

    def __init__(self, root):
        pass

    def load(self):
        images = Images(torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 3)
        return images, images
"""
    )
    with pytest.raises(UserError, match="training labels run from 0 to 2; 2 classes"):
        distill(tiny, overrides=['plugins=["odd.py"]', "data.name=odd-labels"])
    assert not (tiny.parent / "runs").exists()


def test_a_torn_last_line_of_the_metrics_is_left_out(tiny):
    run = distill(tiny)
    lines = run.metrics()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "student", "epoch": 3, "losses": {"cross-entropy": 0.5}')
    assert run.metrics() == lines
    (run / "metrics.jsonl").write_text('{"phase\n' + json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        run.metrics()
