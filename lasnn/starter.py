"""A first recipe for a folder of pictures: what is found in it decides what is proposed."""

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from lasnn import files
from lasnn.data.folders import is_text
from lasnn.data.image_files import each
from lasnn.data.image_folder import LOOKED_AT, ImageFolder
from lasnn.data.picture import formats
from lasnn.errors import UserError, printable
from lasnn.plan import Plan, make_plan
from lasnn.recipe.json_schema import FILE
from lasnn.recipe.load import parse, shipped, toml_value
from lasnn.recipe.paths import expanded
from lasnn.recipe.schema import Recipe

# Modes of pictures that have no colours.
GREY_MODES = {"1", "L", "LA", "I", "F"}
# Updates of the weights that a first training makes, as far as the bounds on its epochs allow.
STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 3000, 10, 60


@dataclass(frozen=True)
class Pictures:
    """What lies in a folder of pictures.

    Args:
        root: the folder.
        classes: their names.
        train, test: how many pictures.
        side: the shorter side in the median of those looked at, in pixels.
        grey: whether all of those looked at are.
    """

    root: Path
    classes: tuple[str, ...]
    train: int
    test: int
    side: int
    grey: bool


@dataclass(frozen=True)
class Choices:
    """What a first recipe is asked about; None leaves it to `propose`."""

    size: int | None = None
    architecture: str | None = None
    timesteps: int | None = None
    epochs: int | None = None


# The questions, by the name of the choice.
QUESTIONS = {
    "size": "Scale the pictures to how many pixels a side?",
    "architecture": "Which network, as teacher and as student?",
    "timesteps": "How many time steps shall the student take for a picture?",
    "epochs": "How many epochs of training, for the teacher and for the student each?",
}


def look(folder: str | Path) -> Pictures:
    """Look into a folder of pictures; nothing is decoded.

    Raises:
        UserError: it is no folder with a folder a class in it; everything that is wrong.
    """
    root = expanded(folder, "the folder").absolute()
    if not root.is_dir():
        what = "a file, not a folder" if root.exists() else "not there"
        raise UserError(f"{root} is {what}; give the folder of the pictures, with a folder a class in it")
    if not is_text(str(root)):
        raise UserError(f"{printable(str(root))}: the name is no UTF-8, which a recipe could not hold; rename it")
    images = ImageFolder(root)
    train, test = images.splits
    paths = [*train.paths, *test.paths]
    seen = [one for one in each(paths[:: -(-len(paths) // LOOKED_AT)], _header) if isinstance(one, tuple)]
    if not seen:
        raise UserError(f"{root}: none of the pictures looked at can be opened; lasnn reads what Pillow reads")
    side = int(statistics.median(side for side, _ in seen))
    return Pictures(root, images.classes, len(paths) - len(test.paths), len(test.paths), side, all(g for _, g in seen))


def _header(path: Path) -> tuple[int, bool] | None:
    """The shorter side of a picture and whether it is grey, as its header says; None where it says nothing."""
    try:
        with Image.open(path, formats=formats()) as image:
            return min(image.size), image.mode.partition(";")[0] in GREY_MODES
    except Exception:
        # Whoever decodes it says what is wrong.
        return None


def batch_size(pictures: Pictures) -> int:
    """Images a step: fewer where there are few pictures, so that an epoch has some steps."""
    return next((size for size, below in ((16, 500), (32, 2000), (64, 10000)) if pictures.train < below), 128)


def propose(pictures: Pictures, given: Choices = Choices()) -> Choices:
    """What is left to lasnn: a network and a training that end within minutes on a CPU.

    Pictures keep their size up to 64 pixels. A VGG-5 sees features of a quarter of the image; larger images in a number
    that a deeper network can learn from get a VGG-9.
    """
    size = min(64, max(16, pictures.side // 4 * 4)) if given.size is None else given.size
    steps = -(-pictures.train // batch_size(pictures))
    proposed = {
        "size": size,
        "architecture": "vgg9" if size > 40 and pictures.train >= 10000 else "vgg5",
        "timesteps": 4,
        "epochs": min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(STEPS / steps))),
    }
    return Choices(**proposed | {name: value for name, value in vars(given).items() if value is not None})


def ask(proposed: Choices, given: Choices, answer: Callable[[str, Any], Any]) -> Choices:
    """Ask for what was not given.

    Args:
        proposed: the answers that are proposed.
        given: what is known already, and not asked for.
        answer: asks a question, with a proposal; returns the answer.
    """
    for name, question in QUESTIONS.items():
        if getattr(given, name) is None:
            proposed = replace(proposed, **{name: answer(question, getattr(proposed, name))})
    return proposed


def recipe_text(pictures: Pictures, choices: Choices, file: str) -> str:
    """A recipe with comments.

    Args:
        pictures: what it is for.
        choices: all of them made.
        file: how its commands call it.
    """
    command = shlex.quote(file)
    batch = batch_size(pictures)
    names = ", ".join(pictures.classes[:6]) + (", ..." if len(pictures.classes) > 6 else "")
    schema = next(iter(shipped().values())).parent / FILE
    name = toml_value(choices.architecture)
    # That of the quickstart's teacher, halved for small batches.
    rate = 0.1 if batch >= 64 else 0.05
    return f"""#:schema {schema}
# {printable_line(pictures.root.name)}: {len(pictures.classes)} classes ({printable_line(names)}), \
{pictures.train:,} training and {pictures.test:,} test pictures.
#
#   lasnn distill {command} --dry-run    checks it and prints the plan
#   lasnn distill {command}              trains the teacher, then the student under it
#   lasnn report{" " * (len(command) + 16)}shows what became of it
#
# What a part takes: lasnn list. The optimiser and the neuron are those of the shipped quickstart; batches, rates and
# epochs go by the number of pictures, and were not tuned on these.
seed = 0

[data]
name = "image-folder"
root = {toml_value(str(pictures.root))}
# Pixels a side; the shorter side of the pictures is {pictures.side} in the median.
size = {choices.size}
grey = {toml_value(pictures.grey)}
batch_size = {batch}
# "flip" mirrors pictures and "crop" shifts them; take them where that does not change the class.
augment = []

# The ANN, trained first, and kept for further runs.
[teacher]
architecture = {name}
width = 32
epochs = {choices.epochs}
lr = {rate}
warmup_epochs = 1.0

# The spiking network. Fewer time steps are faster; lasnn evaluate shows the accuracy after each.
[student]
architecture = {name}
width = 32
timesteps = {choices.timesteps}
# The image itself at every step; its first layer is computed once.
encoder = "direct"
# It starts from the teacher's weights, converted for its neurons and its T (init is left out).

[student.neuron]
name = "lif"
tau = 2.0

[distill]
epochs = {choices.epochs}
lr = {rate}
warmup_epochs = 1.0

# Without [[losses]] it learns from the labels alone, which is safe on pictures that nobody has measured. To let it
# also look where its teacher looks, stage by stage, write the objective down; a weight that is too large drowns the
# labels.
#
# [[losses]]
# name = "cross-entropy"
#
# [[losses]]
# name = "attention"
# weight = 100.0
# power = 1.0
"""


def printable_line(text: str) -> str:
    """Text for a comment: what does not print is escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def write(pictures: Pictures, choices: Choices, out: str | Path | None = None) -> tuple[Path, Plan]:
    """Write a recipe that was checked as `lasnn distill --dry-run` checks it; where it cannot work nothing is written.

    Args:
        pictures: what it is for.
        choices: all of them made.
        out: the file; None is `<folder>.toml` in the working directory.

    Returns:
        The file and its plan.

    Raises:
        UserError: the file exists or cannot be written, or a choice does not suit the pictures.
    """
    path = expanded(out or f"{pictures.root.name or 'pictures'}.toml", "--out")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file, as {path / 'recipe.toml'}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    if path.exists():
        raise UserError(f"{path} is there already; choose another name with --out, or remove it")
    text = recipe_text(pictures, choices, str(path))
    plan = make_plan(Recipe.from_tables(parse(text.encode(), str(path)), source=str(path)))
    files.write(path, text)
    return path, plan
