"""Runs what of the study is not in its results yet, one unit after the other, and appends a line for each.

    python docs/study/run.py --list
    OMP_NUM_THREADS=1 nice -n 19 python docs/study/run.py --minutes 60 teacher/

Run it from a checkout that stays as it is meanwhile: a line names the commit that it was made with.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy
import torch
from units import CONVERSIONS, TEACHERS, units

from lasnn import build, distill, load_run
from lasnn.evaluation.evaluate import conversions
from lasnn.evaluation.measure import measure, teacher_accuracy
from lasnn.run import environment
from lasnn.training.diagnostics import norm

HERE = Path(__file__).resolve().parent
# Where students that are trained for long are measured besides their own T.
TIMESTEPS = (1, 2, 4, 8)
# A term's weight that is to be found: so much of cross-entropy's gradient.
SHARE = re.compile(r'weight = "share ([\d.]+)"')
BATCHES = 8


def train_teacher(unit: str, settings: list[str]) -> dict:
    """Trains an ANN and keeps its weights beside this file."""
    built = build(HERE / "study.toml", overrides=settings, train_teacher=True)
    [trained] = Path("runs/teachers").glob("*/teacher.safetensors")
    TEACHERS.mkdir(exist_ok=True)
    kept = TEACHERS / f"{unit.removeprefix('teacher/').replace('/', '-')}.safetensors"
    shutil.move(trained, kept)
    accuracy = teacher_accuracy(built.teacher, built.test, batch_size=500)
    return {"accuracy": accuracy, "digest": digest(kept)}


def train_student(unit: str, settings: list[str]) -> dict:
    """Distils a student and measures it on all test images; `correct` has a bit of each, packed, base64."""
    settings, weight = with_weight(settings)
    run = distill(HERE / "study.toml", "run", overrides=settings, progress=None)
    loaded = load_run(run.path)
    own = loaded.recipe.student.timesteps
    correct = []

    def watch(means: torch.Tensor, labels: torch.Tensor, _: torch.Tensor) -> None:
        correct.append(means[own - 1].argmax(-1) == labels)

    timesteps = TIMESTEPS if unit.startswith(("student/", "longer")) else (own,)
    results = measure(
        loaded.student, loaded.images.test, timesteps, batch_size=500, seed=loaded.recipe.seed, watch=watch
    )
    summary = run.read_json("summary.json")
    kept = ("accuracy", "teacher_accuracy", "validation_accuracy", "validation_nll", "firing_rate", "energy_uj")
    epochs = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return {
        **weight,
        **{name: summary[name] for name in kept if name in summary},
        "accuracy_by_timesteps": {str(result["timesteps"]): result["accuracy"] for result in results},
        "diagnostics": [epoch["diagnostics"] for epoch in epochs if "diagnostics" in epoch],
        "correct": base64.b64encode(numpy.packbits(torch.cat(correct).numpy())).decode(),
        "digests": digests(settings),
    }


def convert_twin(unit: str, settings: list[str]) -> dict:
    """Converts an ANN, and measures it on all test images at every T from 1 on."""
    method = unit.split("/")[1]
    built = build(HERE / "study.toml", overrides=settings)
    timesteps = range(1, CONVERSIONS[method] + 1)
    results = [
        result
        for converted, steps in conversions(built.teacher, method, built.train, timesteps, batch_size=500)
        for result in measure(converted, built.test, steps, batch_size=500, seed=0)
    ]
    return {
        "teacher_accuracy": teacher_accuracy(built.teacher, built.test, batch_size=500),
        "accuracy_by_timesteps": {str(result["timesteps"]): result["accuracy"] for result in results},
        "energy_uj_by_timesteps": {str(result["timesteps"]): result["energy_uj"] for result in results},
        "digests": digests(settings),
    }


def digests(settings: list[str]) -> dict[str, str]:
    """Of the weights that settings name."""
    files = [Path(setting.partition("=")[2]) for setting in settings if ".checkpoint=" in setting]
    return {str(file.relative_to(HERE)): digest(file) for file in files}


def with_weight(settings: list[str]) -> tuple[list[str], dict[str, float]]:
    """The settings with the weight that gives a term the share asked for of cross-entropy's gradient on the student's
    parameters, by the median of a few batches where the training starts.
    """
    [share] = [float(found.group(1)) for setting in settings if (found := SHARE.search(setting))] or [None]
    if share is None:
        return settings, {}
    built = build(HERE / "study.toml", overrides=[SHARE.sub("weight = 1.0", setting) for setting in settings])
    learnt = list(built.student.parameters())
    ratios = []
    for step, (images, targets) in zip(range(BATCHES), built.batches(0), strict=False):
        terms = built.objective(images, targets, 0, step)
        # The last one, before their sum.
        *_, term, _ = terms
        ratios.append(norm(terms[term], learnt) / norm(terms["cross-entropy"], learnt))
    weight = float(f"{share / statistics.median(ratios):.3g}")
    return [SHARE.sub(f"weight = {weight}", setting) for setting in settings], {"weight": weight}


# By the first part of a unit's name; the others are students.
MAKERS = {"teacher": train_teacher, "conversion": convert_twin}


def read(file: Path) -> dict[str, dict]:
    """What is done, by unit."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {line["unit"]: line for line in map(json.loads, lines)}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def conditions() -> dict:
    """What the figures of a run depend on."""
    known = environment(torch.device("cpu"))
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    names = ("lasnn", "torch", "python")
    return {
        "commit": commit.stdout.strip(),
        **{name: known[name] for name in names},
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="?", default="", help="units whose name this regular expression begins")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--minutes", type=float, default=1e9, help="no unit is begun after these")
    parser.add_argument("--list", action="store_true", help="say which units there are, and which are done")
    options = parser.parse_args()
    options.results = options.results.absolute()
    begun = time.monotonic()
    # What comes later may follow from what is done now.
    while True:
        results = read(options.results)
        wanted = {unit: settings for unit, settings in units(results).items() if re.match(options.which, unit)}
        if options.list:
            print("\n".join(f"{'done' if unit in results else 'open'} {unit}" for unit in wanted))
            return
        unit = next((unit for unit in wanted if unit not in results), None)
        if unit is None or time.monotonic() - begun > 60 * options.minutes:
            return
        settings = wanted[unit]
        folder = Path("runs/study") / unit.replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        home, start = Path.cwd(), time.monotonic()
        os.chdir(folder)
        try:
            result = MAKERS.get(unit.partition("/")[0], train_student)(unit, settings)
        finally:
            os.chdir(home)
        seconds = round(time.monotonic() - start)
        known = [setting.replace(f"{HERE}/", "") for setting in settings]
        line = {"unit": unit, "settings": known, **result, "seconds": seconds, **conditions()}
        with options.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
