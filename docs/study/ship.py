"""Makes a student of the study one that ships: a run folder under models/, with its card.

    python docs/study/ship.py RUN NAME UNIT

RUN is the run's folder, UNIT its name in results.jsonl. It needs the whole data set.
"""

import json
import shutil
import sys
import tomllib
from pathlib import Path

from lasnn import evaluate, load_run
from lasnn.files import write
from lasnn.recipe.load import dump_toml

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent.parent / "models"
KEPT = ("data.json", "metrics.jsonl", "student.safetensors", "summary.json", "teacher.json", "teacher.safetensors")
TIMESTEPS = (1, 2, 4, 8)
CARD = """# {title}

{sentence}
Neither the teacher's logits nor its attention maps are in the objective.
Images of 28 x 28 in [0, 1] in, logits of ten classes out; {parameters:,} parameters, {neuron} neurons, direct encoding,
trained at T = {timesteps}. Its teacher, an ANN of the same architecture: {teacher:.4f}. One seed, the last epoch.

| T | all 10,000 test images | the 2,000 that ship with lasnn | spikes per neuron and step | µJ an image |
|---|---|---|---|---|
{rows}

µJ: 45 nm operation counts, without memory accesses. With them a student of this size takes less than its teacher
in fp32 at T = 1 and more at T = 4; in int8 more at both (docs/energy.md).
It was trained at T = {timesteps} alone, and its batch norms have the statistics of that T.

```sh
lasnn evaluate model:{name} --timesteps 1,2,4
lasnn evaluate model:{name} --data FOLDER        # the whole of Fashion-MNIST
lasnn export model:{name} --format onnx
```

- Data: Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747; MIT licence), 60,000 training images, flips.
- Recipe: `recipe.toml` here, which also says how its teacher was trained. Run `{unit}` of
  docs/study/results.jsonl.
- Conditions: fp32 on an x86-64 CPU, one thread, seed {seed}, {seconds:,} s beside other work; lasnn {lasnn} at
  {commit}, torch {torch}, Python {python}.
- Licence: MIT, as lasnn.
"""


def main(run: Path, name: str, unit: str) -> None:
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in KEPT:
        shutil.copy(run / file, folder / file)
    recipe = tomllib.loads((run / "recipe.toml").read_text())
    shared = tomllib.loads((HERE / "study.toml").read_text())
    # The teacher's own training in the place of the file that it was read from.
    del recipe["teacher"]["checkpoint"]
    recipe["teacher"] |= {key: shared["teacher"][key] for key in ("epochs", "lr", "warmup_epochs")}
    recipe["data"]["root"], recipe["device"] = "data", "auto"
    write(folder / "recipe.toml", dump_toml(recipe))
    line = next(
        line for line in map(json.loads, (HERE / "results.jsonl").read_text().splitlines()) if line["unit"] == unit
    )
    summary = json.loads((folder / "summary.json").read_text())
    # A card comes first: a model is listed by its title.
    student = recipe["student"]
    name_of = student["architecture"].upper().replace("VGG", "VGG-")
    title = f"A spiking {name_of} for Fashion-MNIST, T = {student['timesteps']}"
    write(folder / "README.md", f"# {title}\n")
    whole = evaluate(load_run(f"model:{name}", data_root=shared["data"]["root"]), TIMESTEPS, include_speed=False)
    part = evaluate(f"model:{name}", TIMESTEPS, include_speed=False)
    rows = [
        f"| {a['timesteps']} | {a['accuracy']:.4f} | {b['accuracy']:.4f} "
        f"| {a['firing_rate']:.3f} | {a['energy_uj']:.2f} |"
        for a, b in zip(whole, part, strict=True)
    ]
    network = load_run(f"model:{name}").student
    card = CARD.format(
        title=title,
        sentence="It starts from its teacher's weights and learns from the labels alone (cross-entropy, 10 epochs).",
        parameters=sum(value.numel() for value in network.parameters()),
        neuron=student["neuron"]["name"].upper(),
        timesteps=student["timesteps"],
        teacher=summary["teacher_accuracy"],
        rows="\n".join(rows),
        name=name,
        unit=unit,
        seed=recipe["seed"],
        **{key: line[key] for key in ("seconds", "lasnn", "commit", "torch", "python")},
    )
    write(folder / "README.md", card)
    print(card)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
