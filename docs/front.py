"""Draw the README's picture of a run: its accuracy over T, and maps of teacher and student side by side.

python docs/front.py RUN docs/front.png
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from lasnn import evaluate, load_run
from lasnn.kernels import attention_map

STAGE = "stage2"


def draw(folder: str, out: str) -> None:
    """Write the picture; it shows the first two test images of different classes."""
    run = load_run(folder)
    trained = run.recipe.student.timesteps
    results = evaluate(run, timesteps=range(1, 2 * trained + 1), include_speed=False)
    test = run.images.test
    other = next(i for i in range(len(test)) if test.labels[i] != test.labels[0])
    images = test.pixels[[0, other]] / 255
    with torch.no_grad():
        theirs = run.teacher.taps(images, taps=[STAGE])[1][STAGE][None]
        run.student.timesteps = trained
        ours = run.student.steps(images, taps=[STAGE])[1][STAGE]

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure = plt.figure(figsize=(9, 2.9), dpi=130, layout="constrained")
    curve, maps = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    axis = curve.subplots()
    axis.plot(
        [r["timesteps"] for r in results],
        [r["accuracy"] for r in results],
        "o-",
        color="#c8551f",
        label="spiking student",
    )
    axis.axhline(results[0]["teacher_accuracy"], color="#2f6fb0", linestyle="--", label="its teacher, an ANN")
    axis.axvline(trained, color="0.8", linewidth=0.8, zorder=0)
    axis.set(xlabel=f"time steps T (trained at {trained})", ylabel="test accuracy")
    axis.legend(frameon=False, loc="lower right")

    grid = maps.subplots(2, 3)
    for row, image, one in zip(grid, range(2), (0, other), strict=True):
        row[0].imshow(test.pixels[one, 0], cmap="gray")
        for axis, feature in zip(row[1:], (theirs, ours), strict=True):
            axis.imshow(attention_map(feature, power=1)[image].view(feature.shape[-2:]), cmap="magma")
    for axis, title in zip(grid[0], ("image", "teacher looks", "student looks"), strict=True):
        axis.set_title(title, fontsize=9)
    for axis in grid.flat:
        axis.axis("off")
    figure.savefig(out, facecolor="white")


if __name__ == "__main__":
    draw(*sys.argv[1:])
