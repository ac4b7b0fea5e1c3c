"""A loss with learnt parts is trained, saved and resumed with the student; what losses can ask for beside features."""

import math
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_distillation import StopAt, digest, without_times
from torch import nn

from common import ROOT
from lasnn import Staged, architectures, build, distill, losses
from lasnn.errors import MachineError, UserError
from lasnn.loss import couples_images, over_time
from lasnn.network.staged import build as build_network
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import NormSpike, Unit, ann_units, snn_units
from lasnn.network.whole import HookedView
from lasnn.neuron import LIF
from lasnn.plan import make_plan
from lasnn.random import generator
from lasnn.recipe.schema import Recipe
from lasnn.registry import encoders
from lasnn.training.stop import Stopped
from lasnn.weights import load_state

DOCS = ROOT / "docs" / "recipes.md"
LOSS = """
from torch import nn

from lasnn import losses
from lasnn.kernels import BatchNorm2d


@losses.register("regressor")
class Regressor(nn.Module):
    \"\"\"From the first pair's firing rates to the teacher's feature.\"\"\"

    def __init__(self, student_shapes, teacher_shapes, num_classes, *, size: int = 1):
        super().__init__()
        assert num_classes == 10
        self.conv = nn.Conv2d(student_shapes[0][0], teacher_shapes[0][0], size, bias=False)
        self.norm = BatchNorm2d(teacher_shapes[0][0])

    def forward(self, student_features, teacher_features):
        return (self.norm(self.conv(student_features[0].mean(0))) - teacher_features[0]).square().mean()
"""
SETTINGS = ['plugins=["tiny_clothes.py","mine.py"]', 'losses=[{name="cross-entropy"},{name="regressor"}]']
KEYS = {f"losses.1.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
KEYS.add("losses.1.conv.weight")


@pytest.fixture
def own(tiny):
    (tiny.parent / "mine.py").write_text(LOSS)
    return tiny


def test_learnt_parts_are_trained_and_saved_and_are_not_the_students(own):
    before = build(own, overrides=SETTINGS, train_teacher=True).objective.state_dict()
    runs = [distill(own, overrides=SETTINGS) for _ in range(2)]
    states = [load_state(run / "last.pt") for run in runs]
    assert states[0]["objective"].keys() == before.keys() == KEYS
    for name, value in before.items():
        assert not torch.equal(states[0]["objective"][name], value), f"{name} is trained"
        assert torch.equal(states[0]["objective"][name], states[1]["objective"][name]), "runs repeat"
    assert digest(runs[0] / "student.safetensors") == digest(runs[1] / "student.safetensors")
    assert not any("losses" in name or "regressor" in name for name in load_file(runs[0] / "student.safetensors"))
    other = build(own, overrides=[*SETTINGS, "seed=1"], train_teacher=True).objective.state_dict()
    assert not torch.equal(other["losses.1.conv.weight"], before["losses.1.conv.weight"])


def test_the_optimiser_and_the_clipping_have_them_by_the_rules_of_the_rest(own):
    """One step from a gradient that is clipped to almost nothing, with a decay that is not."""
    settings = [*SETTINGS, "data.batch_size=400", "distill.epochs=1", "teacher.epochs=1", "distill.lr=0.5"]
    before = build(own, overrides=settings, train_teacher=True).objective.state_dict()
    run = distill(own, overrides=[*settings, "distill.weight_decay=0.2", "distill.clip_norm=1e-9"])
    after = load_state(run / "last.pt")["objective"]
    torch.testing.assert_close(after["losses.1.conv.weight"], before["losses.1.conv.weight"] * (1 - 0.5 * 0.2))
    torch.testing.assert_close(after["losses.1.norm.weight"], torch.ones(4), msg="vectors do not decay")


def test_a_stopped_run_resumes_with_them(own):
    whole = distill(own, "whole", overrides=SETTINGS)
    with pytest.raises(Stopped):
        distill(own, "stopped", overrides=SETTINGS, progress=StopAt("student", 1, signal.SIGTERM))
    resumed = distill(own, "stopped", overrides=SETTINGS, resume=True)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())
    states = [load_state(run / "last.pt")["objective"] for run in (whole, resumed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_loop_of_ones_own_trains_them(own):
    built = build(own, overrides=SETTINGS, train_teacher=True)
    assert len(list(built.objective.parameters())) == 3
    optimizer = torch.optim.SGD([*built.student.parameters(), *built.objective.parameters()], lr=0.05)
    images, targets = next(iter(built.batches(0)))
    values = []
    for step in range(5):
        optimizer.zero_grad()
        terms = built.objective(images, targets, 0, step)
        terms["loss"].backward()
        optimizer.step()
        values.append(terms["regressor"].item())
    assert values[-1] < values[0]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (type("A", (), {"forward": lambda self, logits: logits}), "is a class, but no nn.Module"),
        (type("A", (nn.Module,), {"forward": lambda self, logit: logit}), "asks for logit; .* chosen from logits"),
        (type("A", (nn.Module,), {"forward": lambda self, *, logits: logits}), r"forward\(\) of loss 'a' takes logits"),
    ],
)
def test_a_class_that_is_no_loss(loss, said):
    with pytest.raises(ValueError, match=said):
        losses.register("a")(loss)
    assert "a" not in losses


def test_a_constructor_that_asks_for_what_there_is_not():
    class Strange(nn.Module):
        def __init__(self, shapes):
            super().__init__()

        def forward(self, logits):
            return logits.mean()

    with pytest.raises(ValueError, match="constructor of loss 'a' asks for shapes; .* student_shapes, teacher_shapes"):
        losses.register("a")(Strange)


PLAIN = {
    "data": {"batch_size": 40},
    "teacher": {"architecture": "vgg5", "width": 2, "epochs": 1},
    "student": {"architecture": "vgg5", "width": 3, "timesteps": 2},
    "distill": {"epochs": 1},
}


def plan(loss: str, **tables):
    return make_plan(Recipe.from_tables(PLAIN | tables | {"losses": [{"name": "cross-entropy"}, {"name": loss}]}))


def refused(loss: str, **tables) -> list[str]:
    with pytest.raises(UserError) as caught:
        plan(loss, **tables)
    return list(caught.value.problems)


def test_a_loss_whose_learnt_parts_alone_learn_is_refused():
    @losses.register("mine")
    class Mine(nn.Module):
        """It reaches no student."""

        def __init__(self, num_classes):
            super().__init__()
            self.linear = nn.Linear(num_classes, 1)

        def forward(self, logits):
            return self.linear(logits.detach()).mean()

    [line] = refused("mine")
    assert "has no gradient, so that nothing learns from it" in line


def test_a_loss_that_cannot_be_made_is_one_line():
    @losses.register("mine")
    class Mine(nn.Module):
        """Its constructor fails."""

        def __init__(self, num_classes):
            raise RuntimeError("too few")

        def forward(self, logits):
            return logits.mean()

    [line] = refused("mine")
    assert line.startswith("recipe: losses.1: loss 'mine' (")
    assert "failed: RuntimeError: too few" in line


def test_a_loss_that_couples_images_is_refused_with_parts_of_a_batch():
    @losses.register("mine")
    @couples_images
    def mine(logits):
        """It compares images."""
        return logits.var(1).mean()

    plan("mine")
    [line] = refused("mine", data={"batch_size": 40, "accumulate": 2})
    assert line.startswith("recipe: losses.1.name: 'mine' compares the images of a batch with each other")


@pytest.mark.parametrize("kind", ["learnt", "currents"])
def test_what_chunks_of_time_cannot_keep_is_refused(kind):
    class Learnt(nn.Module):
        """Batch norms in it would see each chunk twice."""

        def forward(self, student_features):
            return student_features[0].mean()

    def reads_currents(student_features, student_currents):
        """A current is a mean over time."""
        return (student_features[0] - student_currents[0]).mean()

    losses.register("mine")(over_time("steps")(Learnt if kind == "learnt" else reads_currents))
    student = {**PLAIN["student"], "timesteps": 4}
    plan("mine", student=student)
    [line] = refused("mine", student=student, distill={"epochs": 1, "time_chunk": 2})
    assert "has learnt parts or reads currents, and features step by step, which distill.time_chunk does not" in line


def test_a_number_that_breaks_in_a_learnt_part_is_found_there(tiny):
    @losses.register("mine")
    class Mine(nn.Module):
        """From its fourth call on it is given infinities."""

        def __init__(self, num_classes):
            super().__init__()
            self.linear, self.calls = nn.Linear(num_classes, 1), 0

        def forward(self, logits):
            self.calls += 1
            return self.linear(logits * (math.inf if self.calls > 3 else 1.0)).square().mean()

    with pytest.raises(
        MachineError, match=r"epoch 1, step 4 \(mine\); it began in the layer loss mine linear \(Linear\)"
    ):
        distill(tiny, overrides=['losses=[{name="cross-entropy"},{name="mine"}]', "teacher.epochs=1"])


def test_the_loss_of_the_docs_works():
    [code] = re.findall(
        r"```python\n(from torch import nn\nfrom lasnn import losses\n.*?)```", DOCS.read_text(), re.DOTALL
    )
    exec(code, {"__name__": "docs"})
    plan("my-regressor")
    plan("my-regressor", distill={"epochs": 1, "time_chunk": 1})


# The classifier


def test_the_teachers_classifier(tiny):
    seen = []

    @losses.register("mine")
    def mine(student_features, teacher_features, teacher_logits, teacher_classifier):
        """Whether it is the classifier of the pooled last feature."""
        weight, bias = teacher_classifier
        seen.append((teacher_features[-1].mean((2, 3)) @ weight.T + bias, teacher_logits, weight.requires_grad))
        return student_features[-1].mean()

    built = build(tiny, overrides=['losses=[{name="cross-entropy"},{name="mine"}]'], train_teacher=True)
    seen.clear()
    built.objective(*next(iter(built.batches(0))))
    [(logits, wanted, learns)] = seen
    torch.testing.assert_close(logits, wanted)
    assert not learns


def test_a_teacher_without_a_classifier():
    @losses.register("mine")
    def mine(logits, teacher_classifier):
        """It reads the classifier."""
        return (logits @ teacher_classifier[0]).mean()

    @architectures.register("pooled")
    def pooled(act, *, in_channels: int, num_classes: int):
        """A head without a linear layer."""
        stage = nn.Sequential(nn.Conv2d(in_channels, num_classes, 3), act(num_classes))
        return Staged({"stage1": stage}, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))

    [line] = refused("mine", teacher={"architecture": "pooled", "epochs": 1})
    assert line == "recipe: losses.1: the teacher's head has no nn.Linear, so that it has no classifier"


@pytest.mark.parametrize("attribute", ["fc", "classifier"])
def test_the_classifier_of_a_network_that_is_called_as_a_whole(attribute):
    class Elsewhere(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
            self.squeeze = nn.Linear(4, 4)
            setattr(self, attribute, nn.Linear(4, classes))

        def forward(self, x):
            return getattr(self, attribute)(self.squeeze(self.features(x).mean((2, 3))))

    network = Elsewhere(10)
    found = Teacher(HookedView(network, {"stage1": "features"}), (0.5,), (0.5,)).classifier
    assert torch.equal(found.weight, getattr(network, attribute).weight)
    assert not found.weight.requires_grad


def test_samd_needs_the_classifier_of_the_last_stage():
    plan("samd")
    twice = {"architecture": "resnet19", "width": 2, "epochs": 1}
    [line] = refused("samd", teacher=twice)
    assert line == (
        "recipe: losses.1: 'samd' weighs the channels of the teacher's last stage by its classifier: that has 8 "
        "inputs, the last pair's stage 16 channels; name the teacher's last stage last in distill.pairs, of a teacher "
        "whose head is one linear layer"
    )
    [line] = refused("samd", distill={"epochs": 1, "pairs": ["stage3", "stage1"]})
    assert "that has 8 inputs, the last pair's stage 2 channels" in line


def test_maps_of_one_pixel_are_said_to_teach_nothing():
    deep = {table: {"architecture": "vgg11", "width": 2} for table in ("student", "teacher")}
    deep["teacher"]["epochs"] = 1
    notes = plan("attention", **deep).notes
    line = "nothing is learnt from stage5: a map of one pixel is the same for every image once it is normalised"
    assert f"loss     'attention': {line}" in notes
    assert not any("nothing is learnt" in line for line in plan("feature-mse", **deep).notes)
    for loss, said in (
        ("attention", "losses.1.name: maps of one pixel are all the same once they are normalised; pair stages with"),
        ("samd", "losses.1.name: the last pair's map (stage5) has one pixel"),
    ):
        [line] = refused(loss, **deep, distill={"epochs": 1, "pairs": ["stage5"]})
        assert said in line
    coarse = {"name": "attention", "pool": 1}
    tables = PLAIN | {"losses": [{"name": "cross-entropy"}, coarse]}
    with pytest.raises(UserError, match=r"losses.1.pool: .* set pool = 2 or more, or compare by 'feature-mse'"):
        make_plan(Recipe.from_tables(tables))
    coarse["normalize"] = "none"
    make_plan(Recipe.from_tables(tables))


def test_a_lone_image_whose_rates_are_one_pixel_is_refused_for_a_learnt_loss():
    """The student has two steps for its own batch norms; a regressor's sees their mean."""
    frozen = {"architecture": "vgg5", "width": 2, "epochs": 1}
    student = {"architecture": "vgg11", "width": 2, "timesteps": 2}
    batches = {"batch_size": plan("attention", student=student, teacher=frozen).data.train_size - 1}
    options = {"student": student, "teacher": frozen, "data": batches}
    plan("attention", **options)
    [line] = refused("feature-regressor", **options)
    assert line.startswith("recipe: data.batch_size: the last batch has one image, and a stage one pixel")


# Currents


@pytest.fixture
def currents():
    @losses.register("currents")
    def currents(student_currents, teacher_currents):
        """It compares currents."""
        return (student_currents[0][0].mean() - teacher_currents[0].mean()).square()


def by_hand(unit: NormSpike, steps: int, batch: int, found: list):
    """A hook that normalises every step, adds the residual and takes the mean over time."""

    def hook(_, inputs, options):
        x, residual = inputs[0], options.get("residual")
        x = nn.functional.batch_norm(
            x, *([None] * 2 if unit.training else [unit.norm.running_mean, unit.norm.running_var]),
            unit.norm.weight, unit.norm.bias, unit.training, 0.0, unit.norm.eps,
        )  # fmt: skip

        def mean(y):
            return y if len(y) == batch and steps > 1 else y.unflatten(0, (steps, batch)).mean(0)

        found.append(mean(x) if residual is None else mean(x) + mean(residual))

    return unit.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("architecture", "stage", "last", "encoder"),
    [
        ("vgg5", "stage1", "stage1.1", "direct"),
        ("vgg5", "stage3", "stage3.4", "poisson"),
        ("resnet20", "stage2", "stage2.2.act2", "direct"),
    ],
)
def test_a_students_current_is_the_mean_of_norm_and_residual(architecture, stage, last, encoder, training):
    """Values, and the gradients of all weights: through the batch's statistics too."""
    torch.manual_seed(0)
    network = build_network(architecture, snn_units("lif"), in_channels=1, num_classes=3, width=3).double()
    student = Student(network, encoders.build(encoder, (0.5,), (0.5,)), 3).train(training)
    images, found = torch.rand(4, 1, 12, 12, dtype=torch.float64), []
    handle = by_hand(network.get_submodule(last), 3, 4, found)
    _, features = student.steps(images, [stage, f"{stage}.current"], generator("x"))
    handle.remove()
    got, [wanted] = features[f"{stage}.current"], found
    assert got.shape == (1, *wanted.shape)
    torch.testing.assert_close(got[0], wanted)
    parameters, weight = list(network.parameters()), torch.rand_like(wanted)
    gradients = [
        torch.autograd.grad((value * weight).sum(), parameters, retain_graph=True, allow_unused=True)
        for value in (got[0], wanted)
    ]
    torch.testing.assert_close(*gradients)
    assert sum(gradient is not None for gradient in gradients[0]) >= 3


def test_a_current_is_computed_only_where_it_is_asked_for():
    network = build_network("vgg5", snn_units("lif"), in_channels=1, num_classes=3, width=2)
    _, features = network(torch.rand(1, 2, 1, 8, 8), 2, ["stage1"])
    assert list(features) == ["stage1"]
    _, features = network(torch.rand(1, 2, 1, 8, 8), 2, ["stage2.current"])
    assert list(features) == ["stage2.current"]
    assert all(unit.on_call is None for unit in network.modules() if isinstance(unit, Unit))


def test_currents_in_half_precision_and_of_a_neuron_of_ones_own():
    class Own(LIF):
        """It runs behind the norm, not in the kernel."""

        def forward(self, current, v0=None, timesteps=None):
            return super().forward(current, v0, timesteps)

    torch.manual_seed(0)
    one = build_network("resnet20", snn_units("lif"), in_channels=1, num_classes=3, width=2)
    images = torch.rand(3, 2, 1, 8, 8)
    wanted = one(images, 3, ["stage2.current"])[1]["stage2.current"]
    for unit in one.modules():
        if isinstance(unit, NormSpike):
            unit.neuron.__class__ = Own
    assert not any(unit.fused for unit in one.modules() if isinstance(unit, NormSpike))
    torch.testing.assert_close(one(images, 3, ["stage2.current"])[1]["stage2.current"], wanted)
    for unit in one.modules():
        if isinstance(unit, NormSpike):
            unit.neuron.__class__ = LIF
    with torch.autocast("cpu", torch.bfloat16):
        half = one(images, 3, ["stage1.current"])[1]["stage1.current"]
    assert half.dtype == torch.float32


def test_a_teachers_current_is_what_enters_its_relu():
    torch.manual_seed(0)
    for name in ("vgg5", "resnet20"):
        network = build_network(name, ann_units(), in_channels=1, num_classes=3, width=3)
        teacher = Teacher(network, (0.5,), (0.5,)).eval()
        _, features = teacher.taps(torch.rand(4, 1, 12, 12), ["stage2", "stage2.current"])
        current = features["stage2.current"]
        assert current.min() < 0
        assert torch.equal(current.relu(), features["stage2"])
        assert not any(part.requires_grad for part in teacher.classifier)


def test_currents_in_chunks_of_time_are_the_same():
    torch.manual_seed(0)
    network = build_network("vgg5", snn_units("lif"), in_channels=1, num_classes=3, width=3)
    student = Student(network, encoders.build("poisson", (0.5,), (0.5,)), 11).eval()
    images, taps = torch.rand(4, 1, 12, 12), ["stage1", "stage2.current"]
    _, wanted = student.steps(images, taps, generator("x"))
    _, found, _ = student.in_chunks(images, 3, taps, generator("x"))
    torch.testing.assert_close(found["stage2.current"], wanted["stage2.current"])
    found["stage2.current"].sum().backward()
    assert network.stage2[1].weight.grad.abs().sum() > 0
    with torch.no_grad():
        _, long = student.steps(images, taps, generator("x"))
    torch.testing.assert_close(long["stage2.current"], wanted["stage2.current"])
    assert long["stage1"].shape == (11, *wanted["stage1"].shape[1:])


def test_a_stage_that_does_not_end_in_a_unit_has_no_current(currents):
    @architectures.register("pools-last")
    def pools_last(act, *, in_channels: int, num_classes: int):
        """Its second stage ends in pooling."""
        first = nn.Sequential(nn.Conv2d(in_channels, 2, 3), act(2))
        second = nn.Sequential(nn.Conv2d(2, 2, 3), act(2), nn.AvgPool2d(2))
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, num_classes))
        return Staged({"stage1": first, "stage2": second}, head)

    plan("currents")
    own = {"architecture": "pools-last"}
    [line] = refused("currents", student={**own, "timesteps": 2})
    assert line == (
        "recipe: losses.1: 'currents' compares currents; the student's stage2 does not end in a unit that act() made, "
        "so that it has no current: leave it out of distill.pairs, or compare features"
    )
    [line] = refused("currents", teacher={**own, "epochs": 1})
    assert "the teacher's stage2 does not end in a unit" in line
    plan("currents", student={**own, "timesteps": 2}, distill={"epochs": 1, "pairs": ["stage1"]})


def test_a_term_that_compares_steps_says_what_is_left_at_one_step():
    one = plan("ensemble-kd", student={**PLAIN["student"], "timesteps": 1})
    [note] = one.notes
    assert note.startswith("loss     'ensemble-kd' compares time steps, and T is 1: it is 0 for images that")
    assert not plan("ensemble-kd").notes


def test_ensemble_kd_at_one_step_is_what_the_note_says():
    logits = torch.tensor([[[2.0, 0.0], [2.0, 0.0]]], requires_grad=True)
    losses["ensemble-kd"].function(logits, torch.tensor([0, 1])).backward()
    assert logits.grad[0, 0].abs().max() < 1e-7
    assert logits.grad[0, 1, 0] > 0
