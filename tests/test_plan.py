import sys

import pytest
import torch
from safetensors.torch import save_file

from common import TINY
from lasnn import augmentations, losses
from lasnn.errors import UserError
from lasnn.factory import pick_device, pick_precision
from lasnn.network.staged import build
from lasnn.network.units import ann_units
from lasnn.plan import make_plan
from lasnn.recipe.schema import Recipe
from lasnn.weights import save_weights


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text(TINY.replace("tiny-clothes", "fashion-mnist-mini"))
    return path


def plan(path, *overrides):
    return make_plan(Recipe.load(path, overrides))


def problems(path, *overrides):
    with pytest.raises(UserError) as caught:
        plan(path, *overrides)
    return list(caught.value.problems)


def test_plan_of_a_recipe(plain):
    found = plan(plain, "student.architecture=vgg9", "teacher.width=8").summary()
    assert found["teacher_parameters"] > found["student_parameters"] / 4
    assert found["steps_per_epoch"] == 100
    assert found["teacher_steps"] == found["student_steps"] == 200
    assert found["pairs"][1] == {
        "student": "stage2",
        "teacher": "stage2",
        "student_shape": [8, 14, 14],
        "teacher_shape": [16, 14, 14],
    }
    assert found["losses"] == {"cross-entropy": 1.0}


def test_memory_grows_with_batch_and_time(plain):
    def memory(*overrides):
        return plan(plain, *overrides).memory_bytes

    assert 1.8 < memory("data.batch_size=400") / memory("data.batch_size=200") < 2.2
    assert 1.5 < memory("student.timesteps=8") / memory("student.timesteps=4") < 2.2
    assert memory("precision=bf16") < memory()


def test_memory_of_the_teachers_own_training(plain):
    """A wide ANN and a student of few steps: what is short of memory is the ANN."""
    found = plan(plain, "student.timesteps=1", "teacher.width=64")
    assert found.ann_memory_bytes.keys() == {"teacher"}
    assert found.ann_memory_bytes["teacher"] > found.memory_bytes
    assert found.summary()["ann_memory_bytes"] == found.ann_memory_bytes


def test_memory_counts_what_a_loss_learns(plain):
    """A 3x3 convolution and a batch norm for each pair: weight, gradient and SGD's momentum."""

    def memory(loss):
        labels = '{name="cross-entropy"}'
        return plan(plain, f'losses=[{labels},{{name="{loss}"}}]').memory_bytes

    channels = [(pair.student_shape[0], pair.teacher_shape[0]) for pair in plan(plain).pairs]
    learnt = sum(9 * ours * theirs + 2 * theirs for ours, theirs in channels)
    assert memory("feature-regressor") - memory("similarity") == 4 * 3 * learnt


def test_memory_is_of_the_size_of_what_autograd_keeps(plain):
    """The estimate on the meta device is what a real forward pass saves."""
    from lasnn.factory import make_data, make_student

    recipe = Recipe.load(plain)
    student = make_student(recipe, make_data(recipe)).train()
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student.steps(torch.rand(50, 1, 28, 28))
    estimate = plan(plain).memory_bytes
    assert 0.8 < estimate / sum(kept.values()) < 1.4


def test_taps_that_do_not_exist(plain):
    [first, second] = problems(plain, 'distill.pairs=["stage9","stage1:stag2"]')[:2]
    assert "distill.pairs: 'stage9': unknown stage of the student 'stage9'; did you mean 'stage" in first
    assert "known: stage1, stage2, stage3" in first
    assert "unknown stage of the teacher" in second


def test_pairs_by_name(plain):
    [pair] = plan(plain, 'distill.pairs=["stage1:stage2"]').pairs
    assert (pair.student, pair.teacher) == ("stage1", "stage2")


def test_mistakes_of_building_come_together(plain):
    found = problems(
        plain,
        'distill.pairs=["stage7"]',
        "student.neuron.v_reset=2",
        "teacher.checkpoint=gone.safetensors",
        "device=cuda:99",
        "teacher.epochs=1",
    )
    assert len(found) == 1, "what contradicts itself in the recipe's text comes first"
    text = plain.read_text().replace("epochs = 2\n", "", 1)
    plain.write_text(text)
    found = problems(
        plain,
        'distill.pairs=["stage7"]',
        "student.neuron.v_reset=2",
        "teacher.checkpoint=gone.safetensors",
        "device=cuda:99",
    )
    for key in ("device", "student.neuron", "teacher.checkpoint", "distill.pairs"):
        assert any(f": {key}: " in line for line in found), (key, found)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "tpu"])
def test_unknown_device(plain, device):
    assert any("is not a device" in line for line in problems(plain, f"device={device}"))


def test_fp16_needs_a_gpu(plain):
    assert any("needs a GPU" in line for line in problems(plain, "precision=fp16", "device=cpu"))


def test_pair_weights_and_channels(plain):
    losses = 'losses=[{name="cross-entropy"},{name="attention",pair_weights=[1.0]},{name="feature-mse"}]'
    found = problems(plain, losses, "teacher.width=8")
    assert any("losses.1.pair_weights: 1 weights for 3 pairs" in line for line in found)
    assert any("'feature-mse' needs equal channels; 'stage1' has 4, the teacher's 'stage1' 8" in line for line in found)


def test_init_from_a_teacher_of_another_shape(plain):
    found = problems(plain, "student.init=teacher", "teacher.width=8")
    assert any("student.init" in line and "teacher.width = 8, student.width = 4" in line for line in found)
    plan(plain, "student.init=teacher", "student.neuron.name=plif")


def test_checkpoints_that_do_not_fit(plain, tmp_path):
    plain.write_text(plain.read_text().replace("epochs = 2\n", "", 1))
    path = tmp_path / "t.safetensors"

    def checked():
        [line] = problems(plain, f"teacher.checkpoint={path}")
        return line

    assert "no file" in checked()
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert "is not a whole safetensors file" in checked()
    save_file({"a": torch.zeros(1)}, path)
    missing = "'stage1.0.weight', 'stage1.1.norm.weight', 'stage1.1.norm.bias' and 19 more"
    assert f"t.safetensors has missing keys: {missing}; unexpected keys: 'a'; is it another" in checked()
    save_weights(path, {"a": torch.zeros(1)}, {"num_classes": 100})
    assert "was trained for 100 classes; the data set has 10" in checked()
    other = tmp_path / "t.onnx"
    other.write_bytes(b"x")
    assert "t.onnx is an ONNX model: " in problems(plain, f"teacher.checkpoint={other}")[0]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_teacher_file_of_another_architecture_says_which_keys_differ(plain, tmp_path, suffix):
    plain.write_text(plain.read_text().replace("epochs = 2\n", "", 1))
    path = tmp_path / f"t.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save

    def checked(architecture, **options):
        network = build(architecture, ann_units(), in_channels=1, **{"num_classes": 10, **options})
        save(network.state_dict(), path)
        return problems(plain, f"teacher.checkpoint={path}")

    [line] = checked("resnet20", width=4)
    assert f"teacher.checkpoint: {path} has missing keys: 'stage1.0.weight'" in line
    assert "; unexpected keys: 'st" in line
    assert line.endswith(" more; is it another architecture?")
    [line] = checked("vgg5", width=8)
    assert "has other shapes: 'stage1.0.weight' [8, 1, 3, 3], not [4, 1, 3, 3], " in line
    assert "missing" not in line
    [line] = checked("vgg5", width=4, num_classes=100)
    assert (
        "was trained for 100 classes; the data set has 10: train its last layer (head.2) anew with 10 outputs" in line
    )
    network = build("vgg5", ann_units(), in_channels=1, num_classes=10, width=4)
    old = {name: value for name, value in network.state_dict().items() if not name.endswith("tracked")}
    save(old, path)
    assert plan(plain, f"teacher.checkpoint={path}").anns["teacher"].checkpoint == path


def test_init_from_a_teacher_that_only_teaches(plain):
    found = problems(
        plain, "student.init=teacher", "teacher.architecture=torchvision", "teacher.model=resnet18", "teacher.width="
    )
    [line] = [line for line in found if "student.init" in line]
    said = (
        "the weights of the teacher do not fit the student: the teacher is a torchvision, the student a vgg5; leave it"
    )
    assert said in line


def test_augmentations_are_tried_before_the_first_batch(plain):
    @augmentations.register("half")
    def half(images, generator):
        """Half an image."""
        return images[..., ::2]

    @augmentations.register("broken")
    def broken(images, generator, *, size: int = 3):
        """Does not work."""
        raise IndexError("no such pixel")

    found = problems(plain, 'data.augment=["flip", "half"]')
    assert found[0].endswith("images are torch.float32 [2, 1, 28, 14]; they must be torch.float32 [2, 1, 28, 28]")
    found = problems(plain, 'data.augment=[{name="broken", size=2}]')
    assert "augmentation 'broken' (" in found[0]
    assert "failed: IndexError: no such pixel" in found[0]
    found = problems(plain, 'data.augment=[{name="random-erasing", min_area=0.9}]')
    assert "data.augment: random-erasing: min_area 0.9 is above max_area 0.4" in found[0]


def test_a_loss_that_cannot_take_mixed_targets(plain):
    @losses.register("indices-only")
    def indices_only(logits, targets):
        """Needs class indices."""
        return -logits.mean(0).gather(1, targets[:, None]).mean()

    objective = 'losses=[{name="indices-only"}]'
    plan(plain, objective)
    [line] = problems(plain, objective, 'data.augment=["mixup"]')
    assert "losses.0: loss 'indices-only'" in line
    assert "failed: RuntimeError" in line
    plan(plain, 'data.augment=["flip", {name="cutmix", alpha=0.5}]')


def test_a_gpu_without_triton_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("auto", "cuda", "cuda:0"):
        with pytest.raises(UserError, match="lasnn's ops need Triton >= 3.4 on a GPU, found none: pip install"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu"


def test_a_precision_that_the_device_decides(plain, monkeypatch):
    """bf16 on a GPU that has it, else fp32; the plan says which."""
    assert make_plan(Recipe.load(plain, ["device=cpu"])).precision == "fp32"
    assert make_plan(Recipe.load(plain, ["device=cpu"])).summary()["precision"] == "fp32"
    cuda = torch.device("cuda")
    for has_it in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert pick_precision(Recipe.load(plain), cuda) == ("bf16" if has_it else "fp32")
        assert pick_precision(Recipe.load(plain, ["precision=fp16"]), cuda) == "fp16"


def test_a_precision_that_the_device_emulates_is_said(plain, monkeypatch):
    """bf16 without instructions for it runs, slower than fp32: that is what a user would not expect."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for capability, slow in (("AVX2", True), ("DEFAULT", True), ("AVX512", False), ("AMX", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        for precision in ("bf16", "fp32"):
            notes = plan(plain, "device=cpu", f"precision={precision}").notes
            assert any("several times as long" in note for note in notes) == (slow and precision == "bf16")
    # Of other processors it is not known.
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not any("several times" in note for note in plan(plain, "device=cpu", "precision=bf16").notes)
