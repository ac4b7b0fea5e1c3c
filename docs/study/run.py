"""Runs what of the study is not in its results yet, one unit after the other, and appends a line for each.

    python docs/study/run.py --list
    OMP_NUM_THREADS=1 nice -n 19 python docs/study/run.py --minutes 60 teacher/

Run it from a checkout that stays as it is meanwhile: a line names the commit that it was made with.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

from lasnn import build, distill, evaluate
from lasnn.evaluation.measure import teacher_accuracy
from lasnn.run import environment

HERE = Path(__file__).absolute().parent
TEACHERS = HERE / "teachers"
# The networks that are trained first: a twin of the student, and the wider one that teaches.
NETWORKS = {"vgg5": ["teacher.architecture=vgg5"], "vgg9": ["teacher.architecture=vgg9"]}
UNITS = {
    f"teacher/{name}/{seed}": [*settings, f"seed={seed}", "student.init=random"]
    for seed in range(3)
    for name, settings in NETWORKS.items()
}
# A student of copied weights and cross-entropy alone: the control, and what ships.
UNITS |= {
    f"student/copied/T{steps}/{seed}": [
        "teacher.architecture=vgg5",
        f"teacher.checkpoint={TEACHERS / f'vgg5-{seed}.safetensors'}",
        "student.init=teacher",
        f"student.timesteps={steps}",
        "distill.lr=0.05",
        f"seed={seed}",
    ]
    for seed in range(3)
    for steps in (1, 4, 2)
}
# Where a student's accuracy is measured besides.
TIMESTEPS = (1, 2, 4, 8)


def train_teacher(unit: str, settings: list[str]) -> dict:
    """Trains an ANN and keeps its weights beside this file."""
    built = build(HERE / "study.toml", overrides=settings, train_teacher=True)
    [trained] = Path("runs/teachers").glob("*/teacher.safetensors")
    TEACHERS.mkdir(exist_ok=True)
    kept = TEACHERS / f"{unit.removeprefix('teacher/').replace('/', '-')}.safetensors"
    shutil.move(trained, kept)
    accuracy = teacher_accuracy(built.teacher, built.test, batch_size=500)
    return {"accuracy": accuracy, "digest": hashlib.sha256(kept.read_bytes()).hexdigest()[:16]}


def train_student(unit: str, settings: list[str]) -> dict:
    """Distils a student and measures it at several T."""
    run = distill(HERE / "study.toml", "run", overrides=settings, progress=None)
    results = evaluate(run.path, TIMESTEPS, include_speed=False)
    summary = run.read_json("summary.json")
    kept = ("accuracy", "teacher_accuracy", "firing_rate", "energy_uj")
    by_steps = {str(result["timesteps"]): result["accuracy"] for result in results}
    return {**{name: summary[name] for name in kept}, "accuracy_by_timesteps": by_steps}


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
    for unit, settings in UNITS.items():
        if not re.match(options.which, unit):
            continue
        lines = options.results.read_text().splitlines() if options.results.exists() else []
        done = unit in {json.loads(line)["unit"] for line in lines}
        if options.list:
            print("done" if done else "open", unit)
        if done or options.list or time.monotonic() - begun > 60 * options.minutes:
            continue
        folder = Path("runs/study") / unit.replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        home, start = Path.cwd(), time.monotonic()
        os.chdir(folder)
        try:
            result = (train_teacher if unit.startswith("teacher/") else train_student)(unit, settings)
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
