"""A last batch of one image, made by pictures that are skipped: found before anything is trained."""

import numpy as np
import pytest
from PIL import Image

from lasnn.errors import UserError
from lasnn.factory import load_data
from lasnn.plan import check_batches, read_plan
from lasnn.probe import Probed

RECIPE = """
[data]
name = "image-folder"
root = "{root}"
size = 16
batch_size = 4
skip_unreadable = true
[teacher]
architecture = "vgg5"
epochs = 1
width = 4
[student]
architecture = "vgg5"
width = 4
timesteps = {timesteps}
[distill]
epochs = 1
pairs = ["stage1"]
"""


@pytest.mark.parametrize("left", [4, 5])
def test_the_batches_are_checked_again_once_the_images_are_loaded(tmp_path, left, monkeypatch):
    for split, count in (("train", 3), ("val", 1)):
        for name in ("a", "b"):
            for number in range(count):
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number + len(split + name)).integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(path)
    for number in range(6 - left):
        (tmp_path / "train/a" / f"{number}.png").write_bytes(b"x")
    recipe = tmp_path / "own.toml"
    recipe.write_text(RECIPE.format(root=tmp_path, timesteps=2))
    plan = read_plan(recipe)
    load_data(plan.recipe, plan.data, plan.device)
    assert plan.data.train_size == left
    check_batches(plan)
    monkeypatch.setattr("lasnn.plan.probe", lambda *_: Probed({"stage": (4, 1, 1)}))
    if left == 4:
        check_batches(plan)
        return
    with pytest.raises(UserError, match="data.batch_size: the last batch has one image, and a stage one pixel"):
        check_batches(plan)
