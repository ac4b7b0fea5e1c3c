"""Exports, each in its reader: equal to the student, whole or not there, and refused where something is wrong."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from common import ROOT, TINY_DATA, Command
from export_cases import ARCHITECTURES, ENCODERS, NEURONS, make_run
from lasnn import evaluate, exporters, load_run
from lasnn.console import print_export
from lasnn.errors import UserError
from lasnn.export import Disagreement, Exporter, Reader, export
from lasnn.export import verification as rule
from lasnn.export.plain import Plain
from lasnn.export.pt2 import DESCRIPTION, Pt2Exporter
from lasnn.export.verification import Verification, observe, samples

# Architecture, encoder, neuron, T: every encoder and most neurons once in the default run, the rest in `make test-all`.
CASES = [
    ("vgg5", "direct", "lif", 4),
    ("vgg5", "rate", "plif", 3),
    ("vgg5", "poisson", "decay", 2),
    ("vgg5", "direct", "soft", 1),
    # Deep networks take half a minute each.
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (
            ("resnet20", "direct", "if", 2),
            ("resnet20-sew", "direct", "lif", 2),
            ("resnet20-membrane", "direct", "if", 2),
            ("spikformer", "direct", "lif", 2),
        )
    ),
]
GRID = [
    pytest.param(a, e, n, 3, marks=pytest.mark.full)
    for i, a in enumerate(ARCHITECTURES)
    for j, e in enumerate(ENCODERS)
    for k, n in enumerate(NEURONS)
    # Every pair of two of them; the networks are deep, and each takes half a minute.
    if a.startswith("vgg") or (i + j + k) % 3 == 0
]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A run on the default neuron."""
    return make_run(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture
def broken():
    """An exporter whose file has other weights in one layer than the student."""

    @exporters.register("broken")
    class Broken(Pt2Exporter):
        """Adds to the weights of one layer."""

        def write(self, path):
            weights = self.student.network.stage2[1].weight
            with torch.no_grad():
                kept = weights.clone()
                weights += 0.1
                super().write(path)
                weights.copy_(kept)


def images(count, seed=0):
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


# Deep networks; others hold the same parts.
DEEP = ("resnet19", "resnet20-sew")


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.full] * (name in DEEP)) for name in ARCHITECTURES]
)
def test_the_plain_form_is_the_student_bit_for_bit(tmp_path, architecture):
    """For every encoder and neuron, at any batch size: the same logits, the same spikes, by the same names."""
    for encoder in ENCODERS:
        for neuron in NEURONS:
            student = load_run(make_run(tmp_path / f"{encoder}-{neuron}", architecture, encoder, neuron)).student
            for timesteps, batch in ((1, 1), (3, 2), (3, 7)):
                student.timesteps = timesteps
                batch = images(batch)
                encoded = student.encoder(batch, timesteps)
                plain = Plain(student)
                with torch.no_grad():
                    logits = plain(encoded if encoder == "poisson" else batch)
                wanted, spikes = observe(student, encoded)
                assert torch.equal(logits, wanted), (encoder, neuron)
                assert plain.trace.spikes.keys() == spikes.keys() == plain.units.keys()
                for name, found in plain.trace.spikes.items():
                    assert torch.equal(found, spikes[name].flatten(0, 1)), (encoder, neuron, name)
                rates = [found.mean().item() for found in spikes.values()]
                assert timesteps == 1 or min(rates) > 0.01, "neurons must fire in every layer, or nothing is compared"


def test_a_run_on_another_device_is_exported_without_its_images(plain_run):
    """What is exported is the student that was loaded, on the CPU, wherever it lies."""
    loaded = load_run(plain_run)
    elsewhere = loaded.recipe.data.model_copy(update={"root": "nowhere"})
    recipe = loaded.recipe.model_copy(update={"data": elsewhere})
    loaded = replace(loaded, recipe=recipe, device=torch.device("cuda"))
    found = export(loaded, "safetensors", out=plain_run / "elsewhere.safetensors", force=True)
    assert found["verified"]


def test_the_plain_form_is_the_student_on_two_threads(plain_run):
    student = load_run(plain_run).student
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            assert torch.equal(Plain(student)(images(7)), student(images(7)))
    finally:
        torch.set_num_threads(before)


def test_potentials_are_what_the_threshold_is_compared_with(plain_run):
    student = load_run(plain_run).student
    plain, encoded = Plain(student), student.encoder(images(3), 3)
    _, spikes = observe(student, encoded)
    for name, h in plain.potentials(encoded).items():
        assert torch.equal((h >= plain.units[name].threshold).float(), spikes[name])


@pytest.mark.parametrize(("architecture", "encoder", "neuron", "timesteps"), CASES + GRID)
def test_files_agree_with_the_student(tmp_path, architecture, encoder, neuron, timesteps):
    """In both graph formats: every layer is compared, no spike differs, batches of any size run as a user runs them."""
    import onnx
    import onnxruntime

    run = load_run(make_run(tmp_path / "run", architecture, encoder, neuron, timesteps))
    student, total = run.student, 0
    for sample in samples(student, run.data.load()[1], 0):
        total += sum(spikes.numel() for spikes in sample.spikes.values())
    for form in ("pt2", "onnx"):
        result = export(run, form)
        [found] = result["agreements"]
        assert result["verified"]
        assert (found["images"], found["same_class"], found["spikes"]) == (64, 64, total)
        if form == "pt2" or architecture == "vgg5":
            assert found["flipped"] == 0
            assert found["logit_difference"] < (1e-5 if form == "onnx" else 1e-30)
        else:
            # A few potentials of a deep network lie near enough to the threshold.
            assert found["flipped"] <= 0.005 * total
            assert (found["margin"] or 0) < 1e-5
    assert sorted(path.name for path in run.folder.path.iterdir() if "t" + str(timesteps) in path.name) == [
        f"student-t{timesteps}.onnx",
        f"student-t{timesteps}.pt2",
    ]

    program = torch.export.load(run.folder.path / f"student-t{timesteps}.pt2")
    assert {n.target.namespace for n in program.graph.nodes if hasattr(n.target, "namespace")} == {"aten"}
    file = run.folder.path / f"student-t{timesteps}.onnx"
    session = onnxruntime.InferenceSession(file)
    [feed] = session.get_inputs()
    assert feed.name == ("spikes" if encoder == "poisson" else "images")
    assert feed.shape[1 if encoder == "poisson" else 0] == "batch"
    for count in (1, 2, 7):
        batch = images(count)
        if encoder == "poisson":
            batch = student.encoder(batch, timesteps)
            wanted, _ = observe(student, batch)
        else:
            wanted = student(batch).detach()
        assert torch.equal(program.module()(batch), wanted)
        [logits] = session.run(None, {feed.name: batch.numpy()})
        assert torch.allclose(torch.from_numpy(logits), wanted, atol=1e-5 if architecture == "vgg5" else 0.1)

    model = onnx.load(file)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert [output.name for output in model.graph.output] == ["logits"]
    properties = {property.key: property.value for property in model.metadata_props}
    assert int(properties["timesteps"]) == timesteps
    assert properties["encoder"] == encoder
    assert json.loads(properties["classes"]) == list(run.data.classes)
    assert (json.loads(properties["mean"]), json.loads(properties["std"])) == (list(run.data.mean), list(run.data.std))
    assert "[T, B, C, H, W]" in properties["takes"] if encoder == "poisson" else "[0, 1]" in properties["takes"]
    for form in ("onnx", "pt2"):
        content = (run.folder.path / f"student-t{timesteps}.{form}").read_bytes()
        assert str(ROOT).encode() not in content
        assert b"site-packages" not in content


def test_pt2_runs_where_lasnn_is_not_installed(plain_run, tmp_path):
    file = tmp_path / "student.pt2"
    export(plain_run, "pt2", out=file)
    torch.save(images(7), tmp_path / "images.pt")
    code = f"""
import sys
for name in ("lasnn", "einops", "triton"):
    sys.modules[name] = None
import json, torch
torch.set_num_threads({torch.get_num_threads()})
kept = {{{DESCRIPTION!r}: ""}}
program = torch.export.load("student.pt2", extra_files=kept)
torch.save(program.module()(torch.load("images.pt")).detach(), "logits.pt")
print(json.loads(kept[{DESCRIPTION!r}])["timesteps"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"
    assert torch.equal(torch.load(tmp_path / "logits.pt"), load_run(plain_run).student(images(7)))


def test_safetensors_is_read_by_lasnn_and_by_safetensors(plain_run):
    result = export(plain_run, "safetensors", timesteps=5)
    file = plain_run / "student-t5.safetensors"
    assert result["file"] == str(file)
    run, again = load_run(plain_run), load_run(file)
    assert again.student.timesteps == again.recipe.student.timesteps == 5
    run.student.timesteps = 5
    assert torch.equal(again.student(images(4)), run.student(images(4)))
    assert again.teacher is None
    assert again.summary == {}
    with safe_open(file, framework="pt") as opened:
        weights = run.student.network.state_dict()
        assert set(opened.keys()) == set(weights)
        assert all(torch.equal(opened.get_tensor(name), value) for name, value in weights.items())
        description = json.loads(opened.metadata()["lasnn"])
    assert (description["timesteps"], description["encoder"], description["lasnn"]) == (5, "direct", "0.1.0")
    assert description["classes"] == list(run.data.classes)
    assert "[student]" in description["recipe"]
    assert evaluate(file, 5)[0]["accuracy"] == evaluate(plain_run, 5)[0]["accuracy"]
    # A run of one file exports as any other, beside it.
    assert export(file, "safetensors", out=plain_run / "again.safetensors")["timesteps"] == 5


def test_a_file_needs_its_plugins_beside_it(plain_run, tmp_path):
    """Of the recipe in its metadata; nothing is unpacked from the file itself."""
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((plain_run / "student.safetensors").read_bytes())
    with pytest.raises(
        UserError, match=r"alone.safetensors.*no file .*tiny_clothes.py; a plugin is a Python file beside"
    ):
        load_run(alone)
    (tmp_path / "tiny_clothes.py").write_text(TINY_DATA)
    assert torch.equal(load_run(alone).student(images(2)), load_run(plain_run).student(images(2)))


def test_a_file_elsewhere_is_verified_with_the_runs_plugins_and_says_that_it_needs_them(plain_run, tmp_path, capsys):
    result = export(plain_run, "safetensors", out=tmp_path / "there.safetensors")
    assert (result["verified"], result["needs"]) == (True, ["tiny_clothes.py"])
    print_export(Console(width=200), result)
    assert "needs    tiny_clothes.py beside it" in capsys.readouterr().out
    (tmp_path / "tiny_clothes.py").write_text(TINY_DATA)
    assert torch.equal(load_run(result["file"]).student(images(2)), load_run(plain_run).student(images(2)))


def test_a_file_that_is_no_run_is_refused(plain_run, tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="has no recipe in its metadata; give a run folder, or what `lasnn export"):
        load_run(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((plain_run / "student.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_run(tmp_path / "cut.safetensors")


# The rule, on readers that are the student but for a difference made on purpose.


def verify(run, change, exact=False, count=8, exact_layers=0):
    """The agreement of a reader that returns what `change` makes of the student's logits and spikes."""

    def read(sample):
        logits, spikes = sample.logits.clone(), {name: value.clone() for name, value in sample.spikes.items()}
        change(logits, spikes, sample)
        return logits, spikes

    check = Verification(Reader("reader 1", read, exact, exact_layers), run.student)
    encoded = run.student.encoder(images(count), run.student.timesteps)
    check.add(rule.Sample(images(count), encoded, *observe(run.student, encoded)))
    return check.agreement()


def flip(spikes, layer, t, image, neuron):
    plane = spikes[layer][t, image].view(-1)
    plane[neuron] = 1 - plane[neuron]


def test_the_rule_accepts_what_rounding_explains(plain_run, monkeypatch):
    run = load_run(plain_run)
    assert verify(run, lambda *_: None).problem is None
    encoded = run.student.encoder(images(8), 3)
    h = Plain(run.student).potentials(encoded)["stage2.2"]
    neuron = (h[1, 5].flatten() - 1).abs().argmin().item()
    margin = (h[1, 5].flatten()[neuron] - 1).abs().item()

    def change(logits, spikes, sample):
        # A flip at the threshold, what follows in the same neuron, and in layers behind, however far off.
        flip(spikes, "stage2.2", 1, 5, neuron)
        flip(spikes, "stage2.2", 2, 5, neuron)
        flip(spikes, "stage3.2", 2, 5, 3)
        logits[5] *= 1.001

    monkeypatch.setattr(rule, "MARGIN", margin * 1.01)
    found = verify(run, change)
    assert found.problem is None
    assert (found.flipped, found.first_layer, found.margin) == (3, "stage2.2", pytest.approx(margin))
    # In a network that the reader takes for shallow none of it is accepted: vgg5 has four spiking layers.
    assert "none may where 4 layers or fewer spike" in verify(run, change, exact_layers=4).problem
    assert verify(run, change, exact_layers=3).problem is None
    monkeypatch.setattr(rule, "MARGIN", margin * 0.99)
    assert "which is not by rounding" in verify(run, change).problem


def test_the_rule_refuses_what_it_does_not(plain_run):
    run = load_run(plain_run)
    far = (Plain(run.student).potentials(run.student.encoder(images(8), 3))["stage2.2"][0] - 1).abs()[2].argmax().item()

    def elsewhere(logits, spikes, sample):
        flip(spikes, "stage3.2", 0, 1, 0)
        flip(spikes, "stage2.2", 0, 2, far)

    found = verify(run, elsewhere)
    # Two images, two beginnings: the first of the layers is named.
    assert found.first_layer == "stage2.2"
    assert "which is not by rounding" in found.problem
    assert found.margin > 0.1

    found = verify(run, lambda logits, spikes, sample: logits[3].add_(0.01))
    assert found.first_layer == "the head"
    assert "where no spike does" in found.problem
    found = verify(run, lambda logits, spikes, sample: logits.fill_(torch.nan))
    assert found.problem

    def hidden(logits, spikes, sample):
        spikes.clear()
        logits += 0.01

    assert verify(run, hidden).first_layer == "a layer that the reader does not show"


def test_the_rule_bounds_flips_and_wants_every_class(plain_run, monkeypatch):
    run = load_run(plain_run)
    monkeypatch.setattr(rule, "MARGIN", torch.inf)

    def many(logits, spikes, sample):
        spikes["stage3.2"][:] = 1 - spikes["stage3.2"]

    assert "of spikes differ, more than 0.5%" in verify(run, many).problem

    def another(logits, spikes, sample):
        flip(spikes, "stage3.2", 0, 2, 0)
        logits[2, logits[2].argmin()] = 100

    found = verify(run, another)
    assert found.problem == "another class on 1 of 8 images"
    assert found.same_class == 7


def test_an_exact_reader_may_not_differ_at_all(plain_run):
    run = load_run(plain_run)
    found = verify(run, lambda logits, spikes, sample: logits[0, 0].mul_(1 + 1e-6), exact=True)
    assert (found.first_layer, found.same_class) == ("the head", 8)
    assert found.problem
    found = verify(run, lambda logits, spikes, sample: flip(spikes, "stage3.4", 0, 0, 0), exact=True)
    assert (found.first_layer, found.problem) == ("stage3.4", "it must be equal bit for bit")


def test_samples_are_spread_over_the_test_set(plain_run):
    run = load_run(plain_run)
    test = run.data.load()[1]
    found = list(samples(run.student, test, 0))
    assert [len(sample.images) for sample in found] == [1, 2, 5, *[8] * 7]
    shown = torch.cat([sample.images for sample in found])
    assert torch.equal(shown[0], test.pixels[0].float() / 255)
    assert torch.equal(shown[-1], test.pixels[-1].float() / 255)
    few = type(test)(test.pixels[:3], test.labels[:3])
    assert [len(sample.images) for sample in samples(run.student, few, 0)] == [1, 2]


def test_a_file_that_its_reader_disagrees_on_is_kept_aside(tmp_path, broken):
    folder = make_run(tmp_path / "run")
    place = folder / "student-t3.pt2"
    place.write_bytes(b"what was there")
    with pytest.raises(
        Disagreement, match=r"first layer that differs is stage2\.2.*kept as .*student-t3\.pt2\.unverified"
    ) as e:
        export(folder, "broken", force=True)
    assert place.read_bytes() == b"what was there"
    assert sorted(path.name for path in folder.glob("*t3*")) == ["student-t3.pt2", "student-t3.pt2.unverified"]
    assert not e.value.result["verified"]
    assert e.value.result["agreements"][0]["first_layer"] == "stage2.2"
    # What is kept is the file that was read.
    program = torch.export.load(folder / "student-t3.pt2.unverified")
    assert not torch.equal(program.module()(images(2)), load_run(folder).student(images(2)))


def test_an_exporter_that_fails_leaves_nothing(tmp_path):
    @exporters.register("failing")
    class Failing(Exporter):
        """Fails."""

        suffix = ".bin"

        def write(self, path):
            path.write_bytes(b"half")
            raise RuntimeError("no more")

        def readers(self, path):
            return []

    folder = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"format 'failing' \(.*test_export.py.*failed: RuntimeError: no more"):
        export(folder, "failing")
    assert not list(folder.glob("*.bin")) + list(folder.glob(".*"))


OWN = '''
import torch
from torch import nn

from lasnn import Staged, architectures, neurons
from lasnn.kernels import lif


@neurons.register("plain-own")
class PlainOwn(nn.Module):
    """Fires at every step at which the current is positive."""

    def __init__(self):
        super().__init__()

    def forward(self, current, v0=None, timesteps=None):
        spikes = (current > 0).expand(timesteps, *current.shape[1:])
        return spikes, current[-1]


@neurons.register("kernel-own")
class KernelOwn(nn.Module):
    """LIF by the kernel."""

    def __init__(self):
        super().__init__()

    def forward(self, current, v0=None, timesteps=None):
        return lif(current, v0, timesteps=timesteps)


@architectures.register("own")
def own(act, *, in_channels: int, num_classes: int, width: int = 4) -> Staged:
    """One stage that looks at its values."""

    class Looks(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else x * 2

    stage = nn.Sequential(nn.Conv2d(in_channels, width, 3), act(width), Looks())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    return Staged({"stage1": stage}, head)
'''


def test_parts_of_your_own(tmp_path):
    """A neuron of plain operators is exported; one of lasnn's ops, and a network that cannot be traced, are named."""

    def made(name, **student):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(OWN)
        return make_run(tmp_path / name, plugins=["own.py"], **student)

    for form in ("pt2", "onnx"):
        assert export(made(form, neuron={"name": "plain-own"}), form)["agreements"][0]["flipped"] == 0
    with pytest.raises(UserError, match=r"would need lasnn\.lif\.default, which is not PyTorch's"):
        export(made("kernel", neuron={"name": "kernel-own"}), "pt2")
    with pytest.raises(UserError, match=r"architecture 'own' \(.*own\.py:\d+\) cannot be exported: "):
        export(made("looks", architecture="own"), "onnx")


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onxx",), r"unknown format 'onxx'; did you mean 'onnx'\? known: .*onnx, pt2, safetensors"),
        (("pt2", {"timesteps": 0}), "must be a whole number of at least 1, not 0"),
        (("pt2", {"out": "none/s.pt2"}), "none/s.pt2: there is no folder none; make it first"),
        (("pt2", {"out": "s.onnx"}), r"s.onnx: a file of format 'pt2' ends in \.pt2"),
        (("safetensors", {"out": "student.safetensors"}), "exists; --force replaces it, --out names another file"),
    ],
)
def test_bad_input(plain_run, monkeypatch, arguments, message):
    monkeypatch.chdir(plain_run)
    form, options = arguments[0], arguments[1] if len(arguments) > 1 else {}
    before = sorted(plain_run.iterdir())
    with pytest.raises(UserError, match=message):
        export(plain_run, form, **options)
    assert sorted(plain_run.iterdir()) == before


def test_a_folder_is_no_file(plain_run, tmp_path):
    (tmp_path / "x.pt2").mkdir()
    with pytest.raises(UserError, match="is a folder; name a file"):
        export(plain_run, "pt2", out=tmp_path / "x.pt2")


def test_a_missing_package_is_named_with_all_else(plain_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError) as error:
        export(plain_run, "onnx", timesteps=-1, out="none/x.onnx")
    assert error.value.problems == (
        "timesteps (--timesteps) must be a whole number of at least 1, not -1",
        "format 'onnx' needs onnxruntime, not installed here: pip install 'lasnn[onnx]'",
        "none/x.onnx: there is no folder none; make it first",
    )


def test_a_run_without_a_student(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "student.safetensors").unlink()
    with pytest.raises(UserError, match="has no student yet; finish it with `lasnn distill"):
        export(folder, "pt2")


BROKEN = '''
import torch
from lasnn import exporters
from lasnn.export.pt2 import Pt2Exporter


@exporters.register("broken")
class Broken(Pt2Exporter):
    """A format whose file has another threshold."""

    def write(self, path):
        self.student.network.stage1[1].neuron.options["threshold"] = 1.1
        super().write(path)
        self.student.network.stage1[1].neuron.options["threshold"] = 1.0
'''


def test_the_command(tmp_path):
    """As a process: what is printed, the exit codes, and `--json` alone on standard output."""
    lasnn = Command(tmp_path)
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "broken.py").write_text(BROKEN)
    make_run(run, plugins=["broken.py"])
    said = lasnn("export", "--format", "safetensors").stdout
    assert "runs/x/student-t3.safetensors: safetensors, T = 3, " in said
    assert "takes    images in [0, 1], [B, C, H, W] = [1, 28, 28]" in said
    assert "64 test images, arg-max equal on 64/64, largest logit difference 0, 0 of " in said
    assert "exists; --force" in lasnn("export", "--format", "safetensors", code=2).stderr
    answer = lasnn.json("export", "runs/x", "--format", "pt2", "--force", "--timesteps", "2", "--out", "y.pt2")
    assert (answer["file"], answer["timesteps"], answer["verified"]) == ("y.pt2", 2, True)
    assert answer["bytes"] == (tmp_path / "y.pt2").stat().st_size
    failed = lasnn("export", "--format", "broken", "--out", "z.pt2", "--json", code=1)
    assert "the first layer that differs is stage1.1" in failed.stderr
    assert json.loads(failed.stdout)["file"] == "z.pt2.unverified"
    assert (tmp_path / "z.pt2.unverified").is_file()
    assert not (tmp_path / "z.pt2").exists()


def test_the_page_is_right(tmp_path, monkeypatch):
    """The commands of docs/export.md run in their order, then its snippets."""
    lasnn = Command(tmp_path)
    make_run(tmp_path / "mine", timesteps=4)
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for language, text in blocks if language == "sh" for line in text.splitlines()]
    for _, *words in commands:
        # Readers of NIR are heavy; test_export_nir.py has them.
        if words[0] == "export" and "nir" not in words:
            assert "verified in" in lasnn(*words).stdout
    monkeypatch.chdir(tmp_path)
    snippets = [text for language, text in blocks if language == "python" and "nir" not in text]
    assert len(snippets) >= 5
    for text in snippets:
        exec(compile(text, "docs/export.md", "exec"), {})


# Streams.


@pytest.mark.parametrize("architecture", ["vgg5", "resnet20"])
@pytest.mark.parametrize("encoder", ["direct", "poisson"])
def test_a_stream_is_the_run_for_every_neuron(tmp_path, architecture, encoder):
    """T steps with the voltages passed on by the caller: the run's spikes exactly, its logits to the last bits."""
    for neuron in NEURONS:
        student = load_run(make_run(tmp_path / neuron, architecture, encoder, neuron)).student
        student.timesteps = 4
        encoded = student.encoder(images(5), 4, torch.Generator().manual_seed(1))
        logits, spikes = observe(student, encoded)
        seen = {name: [] for name in spikes}
        for name, unit in student.network.named_modules():
            if name in spikes:
                unit.register_forward_hook(lambda _u, _i, output, name=name, seen=seen: seen[name].append(output))
        draws, voltages, steps = torch.Generator().manual_seed(1), None, []
        for _ in range(4):
            step, voltages = student.step(images(5), voltages, draws)
            steps.append(step)
        assert voltages.keys() == spikes.keys()
        for name, found in seen.items():
            assert torch.equal(torch.stack(found), spikes[name]), (neuron, name)
        assert min(found.mean() for found in spikes.values()) > 0.01
        assert torch.allclose(torch.stack(steps).mean(0), logits, atol=1e-6, rtol=1e-6)
