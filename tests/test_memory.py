"""What trains in less memory trains the same: micro-batches, and time in chunks."""

import platform
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_distillation import StopAt, digest, without_times

from lasnn import Staged, cli, distill
from lasnn.encoder import Encoder
from lasnn.errors import UserError, out_of_memory
from lasnn.kernels import reference
from lasnn.loss import attention, reading_of
from lasnn.network import time
from lasnn.network.staged import build
from lasnn.network.student import Student
from lasnn.network.time import TimeContext
from lasnn.network.time_chunks import pool_running_statistics
from lasnn.network.units import snn_units
from lasnn.plan import micro_batches, read_plan
from lasnn.random import generator
from lasnn.registry import encoders, losses
from lasnn.training.stop import Stopped

pytestmark = pytest.mark.usefixtures("cached_teachers")

# Without batch norm a batch's gradient is the mean of its images' gradients, however they are grouped.
PLAIN = '''
from torch import nn
from lasnn import Staged, architectures


@architectures.register("plain")
def plain(act, *, in_channels: int, num_classes: int) -> Staged:
    """One stage without batch norm."""
    stage = nn.Sequential(nn.Conv2d(in_channels, 4, 3, stride=2), act())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, num_classes))
    return Staged({"stage1": stage}, head)
'''
SETTINGS = ['plugins=["tiny_clothes.py","plain.py"]', "student.architecture=plain", "student.width="]
SETTINGS += ["teacher.architecture=plain", "teacher.width=", "student.encoder=poisson"]


@pytest.fixture
def plain(tiny):
    (tiny.parent / "plain.py").write_text(PLAIN)
    return tiny


def test_the_gradient_is_the_mean_over_the_batch(plain):
    """400 images in batches of 150, the last of 100: in parts of 22 and 21, and of 20."""
    losses = 'losses=[{name="cross-entropy"},{name="attention",weight=1000.0}]'
    settings = [*SETTINGS, "data.batch_size=150", "teacher.clip_norm=0.5", losses]
    whole, parts = (distill(plain, overrides=[*settings, f"data.accumulate={n}"]) for n in (1, 7))
    # The teacher is smooth: its weights differ by rounding alone.
    teachers = [load_file(run / "teacher.safetensors") for run in (whole, parts)]
    for name, value in teachers[0].items():
        torch.testing.assert_close(value, teachers[1][name], rtol=1e-4, atol=1e-5)
    # The student's spikes may flip on rounding once the weights differ; before the first update nothing does.
    first = [distill(plain, overrides=[*settings, "data.batch_size=400", f"data.accumulate={n}"]) for n in (1, 7)]
    losses = [run.metrics()[2]["losses"] for run in first]
    assert losses[0]["cross-entropy"] == pytest.approx(losses[1]["cross-entropy"], rel=1e-4)
    assert losses[0]["attention"] == pytest.approx(losses[1]["attention"], rel=1e-3), "the same poisson spikes"


@pytest.mark.parametrize(
    ("images", "batch", "accumulate", "parts"), [(100, 100, 3, 3), (7, 100, 3, 1), (10, 10, 10, 10)]
)
def test_how_many_parts(tiny, images, batch, accumulate, parts):
    recipe = read_plan(tiny, [f"data.batch_size={batch}", f"data.accumulate={accumulate}"]).recipe
    assert micro_batches(images, recipe) == parts


def test_more_parts_than_images(tiny):
    with pytest.raises(UserError, match=r"data\.accumulate: 60 parts of a batch of 50 images"):
        read_plan(tiny, ["data.accumulate=60"])


def test_the_memory_estimate_follows_the_micro_batch(tiny):
    whole, parts = (read_plan(tiny, [f"data.accumulate={n}"]).memory_bytes for n in (1, 5))
    assert parts < 0.3 * whole


def test_a_batch_has_no_more_images_than_there_are(tiny):
    """400 images: the estimate is that of all of them at once, and the plan says what becomes of the batch."""
    whole, more, parts = (
        read_plan(tiny, [f"data.batch_size={batch}", f"data.accumulate={count}"])
        for batch, count in ((400, 1), (4000, 1), (4000, 10))
    )
    assert more.memory_bytes == parts.memory_bytes == whole.memory_bytes
    assert more.ann_memory_bytes == whole.ann_memory_bytes
    said = "data.batch_size = 4000: more than the 400 training images, so that an epoch is one step"
    assert said in more.notes
    assert not any("one step" in note for note in whole.notes)


@pytest.mark.parametrize("temporal", ["rate", "step", "map"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_attention_loss_is_in_fp32_under_autocast(temporal, dtype):
    draws = generator(0)
    student = (torch.rand(3, 2, 5, 8, 8, generator=draws) < 0.3).to(dtype).requires_grad_()
    teacher = (100 * torch.rand(2, 5, 4, 4, generator=draws)).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = attention([student], [teacher], temporal=temporal)
    assert loss.dtype == torch.float32
    wide = student.detach().float().requires_grad_()
    expected = attention([wide], [teacher.float()], temporal=temporal)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    # Its gradient is rounded once, to the features' type.
    torch.testing.assert_close(student.grad, wide.grad.to(dtype), rtol=2e-2, atol=1e-6)


# Time in chunks


def student(encoder, architecture="vgg5", neuron="lif", timesteps=10, **options):
    torch.manual_seed(0)
    architecture, _, residual = architecture.partition("-")
    options = options or ({"width": 4} if architecture == "vgg5" or residual else {})
    options |= {"residual": residual} if residual else {}
    network = build(architecture, snn_units(neuron), in_channels=1, num_classes=10, **options)
    return Student(network, encoders.build(encoder, (0.3,), (0.3,)), timesteps).double().train()


IMAGES = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=generator("images"))
TAPS = ("stage1", "stage3")


CHUNKED = [("vgg5", "plif"), ("resnet20", "lif"), ("resnet20-sew", "lif"), ("resnet20-membrane", "lif")]


def gradients(net, chunk, of_steps=None):
    """Logits, gradients and buffers of a pass in chunks whose loss reads logits, mean features and `of_steps`."""
    logits, features, found = net.in_chunks(IMAGES, chunk, TAPS, generator(1), of_steps=of_steps)
    loss = (logits * torch.linspace(-1, 1, 10)).square().mean() + sum(f.square().mean() for f in features.values())
    if found is not None:
        loss = loss + found
    loss.backward()
    values = {name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())
    return {"logits": logits.detach(), **{name: f.detach() for name, f in features.items()}, **values}


def assert_equal(one, other, atol=1e-10):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=name)


def keep_everything(monkeypatch):
    """Plain autograd in the place of what is computed again in the backward pass."""

    def plain(function, *inputs, use_reentrant, context_fn, **options):
        return function(*inputs, **options)

    monkeypatch.setattr("lasnn.network.time_chunks.checkpoint", plain)


@pytest.mark.parametrize("encoder", ["direct", "poisson", "rate"])
@pytest.mark.parametrize(("architecture", "neuron"), CHUNKED)
def test_chunks_have_the_gradient_of_the_chunked_network(encoder, architecture, neuron, monkeypatch):
    """Against all chunks under plain autograd: nothing computed again, the neuron by its definition."""

    def of_steps(logits, features):
        return (features["stage1"].sum(2) * torch.linspace(0, 1, 8)).square().mean() + logits.square().mean()

    chunked = gradients(student(encoder, architecture, neuron), 4, of_steps)
    keep_everything(monkeypatch)
    for op in ("lif", "norm_lif"):
        monkeypatch.setattr(f"lasnn.neuron.{op}", getattr(reference, op))
    plain = gradients(student(encoder, architecture, neuron), 4, of_steps)
    assert max(value.abs().max() for name, value in plain.items() if name.endswith("weight")) > 1e-3
    assert_equal(chunked, plain)


def test_gradients_flow_through_the_carried_voltages(monkeypatch):
    whole = gradients(student("poisson"), 4)
    carried = time.TimeContext.carry_state

    def cut(self, voltages, start=0):
        return carried(self, {name: value.detach() for name, value in voltages.items()}, start)

    monkeypatch.setattr(time.TimeContext, "carry_state", cut)
    detached = gradients(student("poisson"), 4)
    name = "network.stage1.0.weight"
    assert torch.equal(whole["logits"], detached["logits"])
    assert (whole[name] - detached[name]).abs().max() > 1e-4


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
def test_one_chunk_is_the_unchunked_network(encoder):
    one, whole = student(encoder), student(encoder)
    chunked = gradients(one, 10)
    logits, features = whole.steps(IMAGES, TAPS, generator(1))
    loss = (logits * torch.linspace(-1, 1, 10)).square().mean() + sum(
        feature.mean(0).square().mean() for feature in features.values()
    )
    loss.backward()
    torch.testing.assert_close(chunked["logits"], logits.detach(), rtol=0, atol=1e-10)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=0, atol=1e-10, msg=name)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(chunked[name], buffer, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [1, 3, 4, 10])
def test_a_stage_that_is_constant_in_time_has_its_mean_in_chunks_too(chunk):
    """Before the first unit, under direct encoding, one step stands for all."""
    act = snn_units()
    stages = {"stage1": torch.nn.Conv2d(1, 2, 3), "stage2": torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), act(2))}
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(2, 10))
    net = Student(Staged(stages, head), encoders.build("direct", (0.3,), (0.3,)), 10).double().train()
    _, whole = net.steps(IMAGES, ("stage1",))
    _, means, _ = net.in_chunks(IMAGES, chunk, ("stage1",))
    assert whole["stage1"].shape[0] == means["stage1"].shape[0] == 1
    torch.testing.assert_close(means["stage1"], whole["stage1"], rtol=1e-12, atol=1e-12)


class OneSpike(Encoder):
    """Each pixel spikes once, at a step that is drawn."""

    random = spiking = True

    def encode(self, images, timesteps, generator):
        step = torch.randint(timesteps, images.shape, generator=generator)
        return torch.nn.functional.one_hot(step, timesteps).movedim(-1, 0).to(images.dtype)


def test_a_long_run_of_an_encoder_that_draws_is_cut_from_one_draw():
    seen = []
    net = Student(student("direct").network, OneSpike((0.3,), (0.3,)), 20).double().eval()
    net.network.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0].view(-1, *IMAGES.shape)))
    drawn = []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        with torch.no_grad():
            net(IMAGES)
        assert len(seen) == 3
        drawn.append(torch.cat(seen))
        assert torch.equal(drawn[-1].sum(0), torch.ones_like(IMAGES))
        seen.clear()
    assert not torch.equal(drawn[0], drawn[1]), "each call draws anew"
    assert torch.equal(drawn[0], drawn[2])


def test_running_statistics_are_those_of_all_steps_and_updated_once():
    net = student("poisson", timesteps=7)
    seen = []
    conv = net.network.stage1[0]
    conv.register_forward_hook(lambda *hook: seen.append(hook[2].detach()))
    logits, _, _ = net.in_chunks(IMAGES, 3, (), generator(1))
    everything = torch.cat(seen)
    assert [len(part) for part in seen] == [9, 9, 3]
    logits.sum().backward()
    assert len(seen) == 6, "each chunk was computed again"
    norm = net.network.stage1[1].norm
    expected = torch.nn.BatchNorm2d(everything.shape[1]).double()
    expected(everything)
    torch.testing.assert_close(norm.running_mean, expected.running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.running_var, expected.running_var, rtol=0, atol=1e-12)
    assert norm.num_batches_tracked == 1
    assert norm.momentum == 0.1


def test_pooled_statistics_are_left_as_they_were_by_a_failure():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    mean = net[0].running_mean

    def broken():
        with pool_running_statistics(net, TimeContext()):
            net(torch.rand(4, 2, 3, 3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert net[0].running_mean is mean
    assert not mean.any()
    assert net[0].num_batches_tracked == 0
    assert net[0].momentum == 0.1
    assert not net[0]._forward_hooks


def test_what_layers_draw_is_the_same_again(monkeypatch):
    nets = [student("poisson") for _ in range(2)]
    values = []
    for net in nets:
        net.network.head.insert(0, torch.nn.Dropout(0.5))
        net.train()
        torch.manual_seed(3)
        values.append(gradients(net, 4))
        keep_everything(monkeypatch)
    assert_equal(*values)


@pytest.mark.parametrize("temporal", ["rate", "step"])
def test_each_term_is_what_it_is_of_all_steps_together(plain, temporal):
    """Without batch norm the division of time changes nothing; before the first update no spike flips."""
    terms = ['name="cross-entropy",readout="step"', f'name="attention",temporal="{temporal}"', 'name="tet"']
    terms += ['name="feature-mse"', 'name="logit-kd"']
    settings = [*SETTINGS, f"losses=[{','.join(f'{{{term}}}' for term in terms)}]", "student.timesteps=4"]
    settings += ["data.batch_size=400", "distill.epochs=1"]
    first, *chunked = (distill(plain, overrides=[*settings, f"distill.time_chunk={n}"]).metrics()[2] for n in (0, 1, 3))
    assert list(first["losses"]) == ["cross-entropy", "attention", "tet", "feature-mse", "logit-kd"]
    for line in chunked:
        assert list(line["losses"]) == list(first["losses"])
        assert line["losses"] == pytest.approx(first["losses"], rel=1e-4)


def test_a_stopped_run_in_chunks_resumes(tiny):
    settings = ["student.timesteps=5", "distill.time_chunk=2", "student.encoder=poisson", "data.accumulate=2"]
    settings.append("teacher.epochs=1")
    whole = distill(tiny, "whole", overrides=settings)
    with pytest.raises(Stopped):
        distill(tiny, "out", overrides=settings, progress=StopAt("student", 1, signal.SIGTERM))
    resumed = distill(tiny, "out", resume=True, overrides=settings)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())


LOSS = """
from lasnn import losses


@losses.register("first-step")
def first_step(student_features):
    \"\"\"Of the first step alone.\"\"\"
    return student_features[0][0].mean()
"""


def test_losses_that_need_all_steps_are_refused(tiny):
    (tiny.parent / "mine.py").write_text(LOSS)
    settings = ['plugins=["tiny_clothes.py","mine.py"]', "distill.time_chunk=2", "student.timesteps=5"]
    settings.append('losses=[{name="cross-entropy"},{name="attention",temporal="map"},{name="first-step"}]')
    with pytest.raises(UserError) as caught:
        read_plan(tiny, settings)
    attention_line, mine = caught.value.problems
    assert "'attention' reads its features at all time steps together" in attention_line
    assert 'set time_chunk = 0, or temporal = "rate" or "step"' in attention_line
    assert "'first-step' reads its features" in mine
    # In one chunk they are all there.
    read_plan(tiny, [*settings, "student.timesteps=2"])


def test_every_loss_of_features_says_how_it_reads_them():
    entries = [losses[name] for name in losses if "student_features" in losses[name].inputs]
    readings = {entry.name: reading_of(entry.function, {}) for entry in entries}
    assert readings.pop("cka") == "steps"
    assert readings == dict.fromkeys(["attention", "feature-mse", "feature-regressor", "samd", "similarity"], "mean")


NEURON = """
from torch import nn
from lasnn import neurons


@neurons.register("forgetful")
class Forgetful(nn.Module):
    \"\"\"It cannot go on from a voltage.\"\"\"

    def __init__(self):
        super().__init__()

    def forward(self, current, timesteps=None):
        return (current > 1).to(current.dtype) + 0 * current, current[-1]
"""


def test_a_neuron_that_cannot_go_on_is_refused(tiny):
    (tiny.parent / "mine.py").write_text(NEURON)
    settings = ['plugins=["tiny_clothes.py","mine.py"]', "student.neuron.name=forgetful", "student.timesteps=5"]
    settings.append("student.encoder=poisson")
    read_plan(tiny, settings)
    with pytest.raises(UserError, match=r"student\.neuron.*'forgetful' .* failed: TypeError.*'v0'"):
        read_plan(tiny, [*settings, "distill.time_chunk=2"])


def test_the_memory_estimate_follows_the_chunk(tiny):
    settings = ["student.encoder=poisson", "data.batch_size=400"]
    memory = {
        (t, chunk): read_plan(tiny, [*settings, f"student.timesteps={t}", f"distill.time_chunk={chunk}"]).memory_bytes
        for t, chunk in ((8, 0), (100, 0), (100, 8))
    }
    assert memory[100, 0] > 10 * memory[8, 0]
    assert memory[100, 8] < 2.2 * memory[8, 0]


# Out of memory


SETTINGS_THAT_HELP = ("data.accumulate", "data.batch_size", "distill.time_chunk", 'precision = "bf16"')


def limited():
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, 64 * 2**30))


def test_a_cpu_without_memory_for_the_step(tiny, lasnn):
    settings = ["teacher=", "student.encoder=rate", "student.timesteps=10000000"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    error = lasnn("distill", "tiny.toml", *arguments, code=1, preexec_fn=limited).stderr
    assert "lasnn: out of memory (" in error
    assert "allocate memory" in error
    assert all(setting in error for setting in SETTINGS_THAT_HELP)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_kind_names_the_settings_that_help(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert all(setting in said for setting in SETTINGS_THAT_HELP)
    assert said.count("\n") == 1


def test_other_errors_are_not_taken_for_it():
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert out_of_memory(ValueError("out of memory")) is None


FAULTS = """
import resource, sys, torch
from lasnn import distill

distill("tiny.toml", overrides=sys.argv[1:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")
@pytest.mark.parametrize("chunk", [0, pytest.param(1, marks=pytest.mark.full)])
def test_freed_memory_is_used_again_or_goes_back_where_time_is_in_chunks(chunk, tiny):
    """Of a block of 4 MiB that is allocated and freed again and again, a training on a CPU behind it."""
    settings = ["teacher=", "distill.epochs=1", "data.batch_size=400", f"distill.time_chunk={chunk}"]
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *settings], cwd=tiny.parent, check=True, capture_output=True, text=True
    )
    faults, pages = int(done.stdout.split()[-1]), 4 * 2**20 // resource.getpagesize()
    assert faults >= pages if chunk else faults < pages / 4
