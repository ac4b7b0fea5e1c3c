"""What trains in less memory trains the same: micro-batches."""

import signal

import pytest
import torch
from safetensors.torch import load_file
from test_distillation import StopAt, digest, without_times

from lasnn import distill
from lasnn.distillation import Stopped
from lasnn.errors import UserError
from lasnn.loss import attention
from lasnn.plan import parts_of, read_plan
from lasnn.random import generator

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
    settings = [*SETTINGS, "data.batch_size=150", "teacher.clip_norm=0.5"]
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
    assert parts_of(images, recipe) == parts


def test_a_stopped_run_in_micro_batches_resumes(tiny):
    settings = ["data.accumulate=3", "student.encoder=poisson"]
    whole = distill(tiny, "whole", overrides=settings)
    with pytest.raises(Stopped):
        distill(tiny, "out", overrides=settings, progress=StopAt("student", 1, signal.SIGTERM))
    resumed = distill(tiny, "out", resume=True, overrides=settings)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())


def test_more_parts_than_images(tiny):
    with pytest.raises(UserError, match=r"data\.accumulate: 60 parts of a batch of 50 images"):
        read_plan(tiny, ["data.accumulate=60"])


def test_the_memory_estimate_follows_the_micro_batch(tiny):
    whole, parts = (read_plan(tiny, [f"data.accumulate={n}"]).memory_bytes for n in (1, 5))
    assert parts < 0.3 * whole


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
