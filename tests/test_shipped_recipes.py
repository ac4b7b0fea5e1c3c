"""Every shipped recipe says where it comes from, dry-runs without data, and trains on files in its data format."""

import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as published

from lasnn import evaluate, load_run
from lasnn.data.archive import md5
from lasnn.data.cifar import Cifar10, Cifar100
from lasnn.data.fashion_mnist import FashionMnist, FashionMnistMini
from lasnn.data.idx import write_idx
from lasnn.data.tiny_imagenet import TinyImageNet
from lasnn.errors import UserError
from lasnn.recipe.load import shipped, summary
from lasnn.recipe.schema import Recipe
from lasnn.training.distill import distill

TRAIN, TEST, BATCH = 20, 10, 10
# Of Tiny ImageNet, with one image each.
CLASSES = 20


@pytest.mark.parametrize("name", shipped())
def test_dry_run(name, lasnn):
    plan = lasnn.json("distill", name, "--dry-run", "--set", "device=cpu")
    assert plan["recipe"] == name
    assert plan["teacher_parameters"]
    assert plan["pairs"]
    for pair in plan["pairs"]:
        assert pair["student_shape"][1:] == pair["teacher_shape"][1:]


@pytest.mark.parametrize("name", shipped())
def test_header(name):
    path = shipped()[name]
    assert 20 < len(summary(path)) < 120
    recipe = Recipe.load(name)
    assert f"T = {recipe.student.timesteps}" in summary(path) or name == "quickstart"
    assert name == "quickstart" or f"{recipe.student.encoder_table.name} encoding" in summary(path)
    header = path.read_text().partition("\nseed")[0]
    assert "measured" in header, "the header says what was measured with the recipe, or that nothing was"
    assert "Where the settings come from" in header


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with small files in the formats of all data sets, and the sizes and checksums changed to theirs."""
    root, draws = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    patch = pytest.MonkeyPatch()
    for kind in (Cifar10, Cifar100, FashionMnist, FashionMnistMini, TinyImageNet):
        patch.setattr(kind, "train_size", CLASSES if kind is TinyImageNet else TRAIN)
        patch.setattr(kind, "test_size", CLASSES if kind is TinyImageNet else TEST)
    patch.setattr(TinyImageNet, "classes", tuple(map(str, range(CLASSES))))
    for kind in (Cifar10, Cifar100):
        known = getattr(published, kind.torchvision_name)
        (root / known.base_folder).mkdir()
        for which, size in (("train_list", TRAIN), ("test_list", TEST)):
            files = []
            for file, _ in getattr(known, which):
                count = size // len(getattr(known, which))
                labels = (np.arange(count) % len(kind.classes)).tolist()
                batch = {"data": draws.integers(0, 256, (count, 3072), np.uint8), kind.labels_key: labels}
                path = root / known.base_folder / file
                path.write_bytes(pickle.dumps(batch, protocol=2))
                files.append([file, md5(path)])
            patch.setattr(known, which, files)
    for folder in (root, root / "mini"):
        folder.mkdir(exist_ok=True)
        for split, count in (("train", TRAIN), ("t10k", TEST)):
            write_idx(folder / f"{split}-images-idx3-ubyte.gz", draws.integers(0, 256, (count, 28, 28), np.uint8))
            write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    patch.setattr("lasnn.data.fashion_mnist.MINI", root / "mini")
    tiny = root / "tiny-imagenet-200"
    wnids = [f"n{number:08}" for number in range(CLASSES)]
    (tiny / "val/images").mkdir(parents=True)
    (tiny / "wnids.txt").write_text("\n".join(wnids))
    lines = []
    for number, wnid in enumerate(wnids):
        (tiny / "train" / wnid / "images").mkdir(parents=True)
        image = Image.fromarray(draws.integers(0, 256, (64, 64, 3), np.uint8))
        image.save(tiny / "train" / wnid / "images" / f"{wnid}_0.JPEG", "JPEG")
        image.convert("L").save(tiny / "val/images" / f"val_{number}.JPEG", "JPEG")
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (tiny / "val/val_annotations.txt").write_text("".join(lines))
    yield root
    patch.undo()


def test_classes_that_only_the_images_name_are_compared_once_they_are_read(data, tmp_path, monkeypatch):
    """Tiny ImageNet's stand on disk: its networks can be measured, teach and be started from."""
    monkeypatch.chdir(tmp_path)
    kept = ["data.name=tiny-imagenet", f"data.root={data}", "data.augment=[]", "device=cpu", "student.timesteps=1"]
    kept += [f"{table}.{setting}" for table in ("teacher", "student") for setting in ("architecture=vgg5", "width=4")]
    kept += [f"data.batch_size={CLASSES // 2}", "losses=[{name='cross-entropy'}]"]
    short = [f"{table}.{setting}" for table in ("teacher", "distill") for setting in ("epochs=1", "warmup_epochs=0.0")]
    distill("quickstart", "first", overrides=kept + short)
    run = load_run("first")
    assert run.description.classes[0] == "n00000000"
    assert evaluate("first", 1)[0]["timesteps"] == 1
    taught = ["teacher={checkpoint='first',architecture='vgg5',width=4}", "student.init=first/student.safetensors"]
    distill("quickstart", "second", overrides=[*kept, *taught, *short[2:]])
    # Compared they are, once they are known.
    wnids = data / "tiny-imagenet-200" / "wnids.txt"
    text = wnids.read_text()
    first, second, *others = text.split()
    wnids.write_text("\n".join([second, first, *others]))
    try:
        for attempt in (
            lambda: evaluate("first", 1),
            lambda: distill("quickstart", "third", overrides=kept + taught + short[2:]),
        ):
            with pytest.raises(UserError, match="class"):
                attempt()
    finally:
        wnids.write_text(text)


@pytest.mark.parametrize("name", shipped())
def test_two_steps_of_training(name, data, tmp_path, monkeypatch):
    """Narrow networks, and one epoch of two steps for teacher and student each; all else as the recipe says."""
    monkeypatch.chdir(tmp_path)
    size = CLASSES // 2 if "tinyimagenet" in name else BATCH
    settings = [f"data.root={data}", f"data.batch_size={size}", "device=cpu", "precision=fp32"]
    for table in ("teacher", "student"):
        settings.append(f"{table}.width=4")
    for table in ("teacher", "distill"):
        settings += [f"{table}.epochs=1", f"{table}.warmup_epochs=0.0", f"{table}.lr=0.01"]
    run = distill(name, tmp_path / "run", overrides=settings)
    found = run.read_json("summary.json")
    assert 0 <= found["accuracy"] <= 1
    assert found["firing_rate"] > 0
    phases = {epoch["phase"]: epoch for epoch in run.metrics()}
    assert phases.keys() == {"teacher", "student"}
    assert phases["student"]["losses"].keys() == {loss.name for loss in Recipe.load(name).losses}
