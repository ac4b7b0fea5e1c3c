"""`compile = true`: the student's training pass in one graph, its spikes those of the pass as it is."""

import pytest
import torch
from torch import nn

from common import TINY, TINY_DATA
from lasnn import distill
from lasnn.errors import UserError
from lasnn.factory import make_student
from lasnn.plan import read_plan

SMALL = ["student.width=4", "teacher.width=4", "student.timesteps=3", "device=cpu"]
OPAQUE = """
import torch

from lasnn import neurons


@neurons.register("opaque")
class Opaque(torch.nn.Module):
    '''A part of it is kept out of compiled code.'''

    def forward(self, x, timesteps=None):
        h = x.expand(timesteps or len(x), *x.shape[1:]).cumsum(0)
        return squash(h), h[-1]


@torch.compiler.disable
def squash(h):
    return torch.sigmoid(4 * (h - 1))
"""


def first_spikes(student, images, compiled):
    """Logits of each step, and the spikes and currents of all stages, in training mode."""
    torch.compiler.reset()
    student.train()
    if compiled:
        student.compile_training()
    stages = ["stage1", "stage2", "stage3"]
    return student.steps(images, [*stages, *(f"{stage}.current" for stage in stages)])


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["vgg5", "resnet20"])
def test_on_dyadic_numbers_every_spike_is_the_same(architecture):
    settings = [f"{who}.architecture={architecture}" for who in ("teacher", "student")]
    plan = read_plan("quickstart", [*SMALL, *settings, 'distill.pairs=["stage1","stage2","stage3"]'])
    images = torch.randint(0, 3, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0)) / 2
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student = make_student(plan.recipe, plan.data)
        for name, value in student.network.named_parameters():
            # Few bits: sums of products are exact in any order.
            if value.ndim > 1:
                nn.init._no_grad_uniform_(value, -1, 1)
                value.data.mul_(4).round_().div_(8)
            assert name
        found.append(first_spikes(student, images, compiled))
    (wanted, taps), (got, compiled_taps) = found
    # The first stage's statistics are exact too; later ones are within a rounding at the threshold.
    assert torch.equal(taps["stage1"], compiled_taps["stage1"])
    torch.testing.assert_close(taps["stage1.current"], compiled_taps["stage1.current"])
    spikes = [name for name in taps if not name.endswith(".current")]
    flipped = max((taps[name] != compiled_taps[name]).float().mean().item() for name in spikes)
    assert flipped < 1e-3
    assert (wanted - got).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.full
def test_a_run_with_it_is_that_without_it(tmp_path):
    """But for roundings: the same weights within what two epochs make of them, under the names that are saved ever."""
    (tmp_path / "tiny_clothes.py").write_text(TINY_DATA)
    (tmp_path / "tiny.toml").write_text('plugins = ["tiny_clothes.py"]\n' + TINY)
    accuracies = {}
    for compiled in ("false", "true"):
        run = distill(tmp_path / "tiny.toml", tmp_path / compiled, overrides=[f"compile={compiled}"], progress=None)
        summary, metrics = run.read_json("summary.json"), run.metrics()
        accuracies[compiled] = (summary["accuracy"], metrics[-1]["losses"]["cross-entropy"])
    assert accuracies["true"] == pytest.approx(accuracies["false"], abs=0.1)


@pytest.mark.full
def test_what_cannot_be_compiled_is_a_line(tmp_path):
    (tmp_path / "tiny_clothes.py").write_text(TINY_DATA)
    (tmp_path / "opaque.py").write_text(OPAQUE)
    (tmp_path / "tiny.toml").write_text('plugins = ["tiny_clothes.py", "opaque.py"]\n' + TINY)
    with pytest.raises(UserError, match=r"compile: the student cannot be compiled in one graph: .*set compile = false"):
        distill(
            tmp_path / "tiny.toml",
            tmp_path / "run",
            overrides=["compile=true", "student.neuron={name='opaque'}", "student.init=random"],
            progress=None,
        )


def test_it_does_not_go_with_time_chunks():
    with pytest.raises(UserError, match="compile: does not go with distill.time_chunk"):
        read_plan("quickstart", [*SMALL, "compile=true", "distill.time_chunk=1"])
