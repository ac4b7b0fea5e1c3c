"""Trains the quickstart with other settings and measures it on images held out: the first 10,000 training images of the
full Fashion-MNIST that are not among the 5,000 that ship.

    OMP_NUM_THREADS=1 python docs/study/held_out.py 10 teacher.epochs=28 distill.epochs=6

The seed, then settings as after `--set`; a line is appended to quickstart.jsonl beside this file.
"""

import json
import sys
import tempfile
from pathlib import Path

from run import conditions

from lasnn import datasets, distill, load_run
from lasnn.data import Images
from lasnn.evaluation.measure import measure, teacher_accuracy

RESULTS = Path(__file__).resolve().with_name("quickstart.jsonl")
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
COUNT = 10_000


def held_out(shipped: Images) -> Images:
    """The first images of the full training set that do not ship."""
    full, _ = datasets["fashion-mnist"].function(root=FASHION_MNIST).load()
    known = {pixels.numpy().tobytes() for pixels in shipped.pixels}
    kept = [n for n, pixels in enumerate(full.pixels[: 2 * COUNT]) if pixels.numpy().tobytes() not in known][:COUNT]
    return Images(full.pixels[kept], full.labels[kept])


def main(seed: str, *settings: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(distill("quickstart", folder, overrides=[*settings, f"seed={seed}"], progress=None).path)
        steps, images = run.recipe.student.timesteps, held_out(run.images.train)
        [result] = measure(run.student, images, (steps,), batch_size=500, seed=0)
        line = {
            "settings": settings,
            "seed": int(seed),
            "timesteps": steps,
            "held_out": result["accuracy"],
            "teacher_held_out": teacher_accuracy(run.teacher, images, batch_size=500),
            **conditions(),
        }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
