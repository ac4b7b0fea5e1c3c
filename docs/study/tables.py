"""Makes the study's tables from its results: Markdown, on standard output.

    python docs/study/tables.py

A difference is paired by teacher and seed. Its interval is that of Student's t over the pairs, at 95 %, which holds for
these teachers; beside it are that over the teachers' own means, which is wide, since they are few, and a bootstrap over
the test images, of the mean of the pairs. Its p-value is that of the exact sign-flip test over the pairs, and those of
the secondary contrasts are also given as Holm corrects them.
"""

import base64
import itertools
import math
from pathlib import Path
from statistics import mean, median, stdev

import numpy
from run import read
from units import CONVERSIONS, SCREENING_SEEDS

from lasnn.compare import student_t

HERE = Path(__file__).resolve().parent
DRAWS = 2000
# T of the conversions' table.
SHOWN = (1, 2, 4, 8, 12, 16, 32, 64)
# (name, of where, this, less that); the first is the primary contrast.
CONTRASTS = (
    ("C - B", "converted/T1", "C", "B"),
    ("B - A", "converted/T1", "B", "A"),
    ("C - A", "converted/T1", "C", "A"),
    ("D - B", "converted/T1", "D", "B"),
    ("C - D", "converted/T1", "C", "D"),
    ("C - E", "converted/T1", "C", "E"),
    ("C - B", "converted/T4", "C", "B"),
    ("C - B", "random/T1", "C", "B"),
    ("D - B", "random/T1", "D", "B"),
    ("C - D", "random/T1", "C", "D"),
    ("C - E", "random/T1", "C", "E"),
    ("C - B", "resnet20/T1", "C", "B"),
)


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> list[str]:
    return [row(*names), row(*["---"] * len(names))]


def screened(results: dict[str, dict]) -> list[str]:
    """What was chosen among, by its mean over the seeds."""
    lines = head("screened", *(f"nll, seed {seed}" for seed in SCREENING_SEEDS), "mean", "accuracy", "weight")
    found: dict[str, dict[int, dict]] = {}
    for unit, result in results.items():
        if unit.startswith("screen/"):
            name, _, seed = unit.removeprefix("screen/").rpartition("/")
            found.setdefault(name, {})[int(seed)] = result
    for name, of in found.items():
        nll = {seed: of[seed]["validation_nll"] for seed in SCREENING_SEEDS if seed in of}
        weights = ", ".join(f"{one['weight']:g}" for one in of.values() if "weight" in one)
        accuracy = mean(one["validation_accuracy"] for one in of.values())
        each = (f"{nll[seed]:.4f}" if seed in nll else "–" for seed in SCREENING_SEEDS)
        lines.append(row(name, *each, f"{mean(nll.values()):.4f}", f"{accuracy:.4f}", weights))
    return lines


def confirmed(results: dict[str, dict]) -> list[str]:
    """Every arm of the confirmation: the mean over its runs, and what the diagnostics say of its last epoch."""
    lines = head("start, T", "arm", "runs", "accuracy", "sd", "by teacher", "spikes/neuron/step", "gradient of terms")
    for (where, arm), of in grouped(results).items():
        values = [one["accuracy"] for one in of.values()]
        blocks = {block: [] for block, _ in of}
        for (block, _), one in of.items():
            blocks[block].append(one["accuracy"])
        last = [one["diagnostics"][-1].get("gradient", {}) for one in of.values()]
        terms = ", ".join(f"{name} {mean(each[name] for each in last):.2f}" for name in last[0])
        lines.append(
            row(
                where,
                arm,
                len(values),
                f"{mean(values):.4f}",
                f"{stdev(values):.4f}" if len(values) > 1 else "–",
                ", ".join(f"{mean(of_block):.4f}" for of_block in blocks.values()),
                f"{mean(one['firing_rate'] for one in of.values()):.3f}",
                terms or "–",
            )
        )
    return lines


def diagnosed(results: dict[str, dict]) -> list[str]:
    """Of every arm, by stage, in its last epoch: how far its maps are from the teacher's, and how it spikes."""
    lines = head("start, T", "arm", "1 - cos of maps", "spikes/neuron/step", "silent neurons")
    for (where, arm), of in grouped(results).items():
        last = [one["diagnostics"][-1] for one in of.values()]
        # Those that are paired; a stem has neurons but no map.
        stages = last[0]["attention_distance"]
        cells = (
            ", ".join(f"{mean(one[what][stage] for one in last):.3f}" for stage in stages)
            for what in ("attention_distance", "firing_rate", "silent")
        )
        lines.append(row(where, arm, *cells))
    return lines


def contrasts(results: dict[str, dict]) -> list[str]:
    """The differences between arms."""
    runs, found = grouped(results), []
    for name, where, this, that in CONTRASTS:
        ours, theirs = runs.get((where, this), {}), runs.get((where, that), {})
        pairs = [pair for pair in ours if pair in theirs]
        if len(pairs) < 2:
            continue
        differences = [ours[pair]["accuracy"] - theirs[pair]["accuracy"] for pair in pairs]
        blocks: dict[str, list[float]] = {}
        for (block, _), difference in zip(pairs, differences, strict=True):
            blocks.setdefault(block, []).append(difference)
        halves = [half_width(differences), half_width([mean(of_block) for of_block in blocks.values()])]
        images = numpy.mean([bits(ours[pair]) - bits(theirs[pair]) for pair in pairs], axis=0)
        found.append((name, where, differences, halves, bootstrap(images), sign_flips(differences)))
    # For as many as were named, also while some are not there yet.
    corrected = holm([p for *_, p in found[1:]] + [1.0] * (len(CONTRASTS) - len(found)))
    intervals = [f"95 % of the {what}" for what in ("pairs", "teachers", "images")]
    lines = head("contrast", "start, T", "pairs", "mean", *intervals, "p", "p, Holm")
    for number, (name, where, differences, halves, (low, high), p) in enumerate(found):
        lines.append(
            row(
                f"**{name}**" if number == 0 else name,
                where,
                len(differences),
                f"{mean(differences):+.4f}",
                *(f"± {half:.4f}" for half in halves),
                f"{low:+.4f} to {high:+.4f}",
                f"{p:.4f}",
                "primary" if number == 0 else f"{corrected[number - 1]:.4f}",
            )
        )
    return lines


def longer(results: dict[str, dict]) -> list[str]:
    """Students of arm B that were trained for as many epochs as their twins: how far below these they stay."""
    lines = head(
        "teacher", "T", "students", "mean", "sd", "twins", "below the twin", "mean, 95 %", "spikes/neuron/step"
    )
    teachers = {"longer": "VGG-9", "longer-own-teacher": "the twin"}
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for unit, result in results.items():
        name, *rest = unit.split("/")
        if name in teachers:
            steps, block = rest
            found.setdefault((name, steps), {})[block] = result
    for (name, steps), of in found.items():
        of = dict(sorted(of.items()))
        refuse_mixed(f"{name}/{steps}", list(of.values()))
        students = [one["accuracy"] for one in of.values()]
        twins = [results[f"teacher/vgg5/{block}"]["accuracy"] for block in of]
        below = [twin - student for twin, student in zip(twins, students, strict=True)]
        spread = len(of) > 1
        lines.append(
            row(
                teachers[name],
                steps.removeprefix("T"),
                ", ".join(f"{one:.4f}" for one in students),
                f"{mean(students):.4f}",
                f"{stdev(students):.4f}" if spread else "–",
                ", ".join(f"{one:.4f}" for one in twins),
                ", ".join(f"{one:.4f}" for one in below),
                f"{mean(below):.4f} ± {half_width(below):.4f}" if spread else "–",
                f"{mean(one['firing_rate'] for one in of.values()):.3f}",
            )
        )
    return lines


def matched(results: dict[str, dict]) -> list[str]:
    """Where conversions of the twin reach students, the mean of their seeds, by block; and the energy."""
    columns = ("T", "student", "accuracy", "energy, µJ", "conversion", "its T", "its energy, µJ")
    lines, rows = head(*columns, "times T", "times energy"), []
    for (steps, name), students in converted_starts(results).items():
        blocks = sorted(students)
        accuracy = {block: mean(one["accuracy"] for one in of) for block, of in students.items()}
        energy = mean(one["energy_uj"] for of in students.values() for one in of)
        for method in CONVERSIONS:
            curves = {block: results.get(f"conversion/{method}/{block}") for block in blocks}
            if not all(curves.values()):
                continue
            reached = [first_reaching(curves[block], accuracy[block]) for block in blocks]
            longest = CONVERSIONS[method]
            found = [f"> {longest}" if one is None else str(one[0]) for one in reached]
            middle = median(math.inf if one is None else one[0] for one in reached)
            spent = [f"{one[1]:.1f}" if one else "–" for one in reached]
            ratio = f"{middle / steps:g}" if math.isfinite(middle) else f"> {longest / steps:g}"
            times = f"{mean(one[1] for one in reached) / energy:.1f}" if all(reached) else "–"
            cells = (method, ", ".join(found), ", ".join(spent), ratio, times)
            shown = row(steps, name, f"{mean(accuracy.values()):.4f}", f"{energy:.2f}", *cells)
            rows.append((steps, name, middle, shown))
    return [*lines, *(line for *_, line in sorted(rows)), "", *over_time(results)]


def converted_starts(results: dict[str, dict]) -> dict[tuple[int, str], dict[str, list[dict]]]:
    """The students of arms B and C that start from the twin, and those of B that were trained for longer: by T, what
    the table calls them, and block.
    """
    found: dict[tuple[int, str], dict[str, list[dict]]] = {}
    for (where, arm), of in grouped(results).items():
        if arm in ("B", "C") and where.startswith("converted/"):
            for (block, _), one in of.items():
                found.setdefault((int(where.removeprefix("converted/T")), arm), {}).setdefault(block, []).append(one)
    for unit, one in results.items():
        if unit.startswith("longer/"):
            _, steps, block = unit.split("/")
            found.setdefault((int(steps.removeprefix("T")), "B, 20 epochs"), {})[block] = [one]
    return found


def over_time(results: dict[str, dict]) -> list[str]:
    """Accuracy of the conversions at some T, the mean of the twins."""
    lines = head("conversion", "ANN", *map(str, SHOWN))
    for method in CONVERSIONS:
        runs = [result for unit, result in results.items() if unit.startswith(f"conversion/{method}/")]
        if not runs:
            continue
        curves = [run["accuracy_by_timesteps"] for run in runs]
        cells = [
            f"{mean(curve[str(steps)] for curve in curves):.4f}" if str(steps) in curves[0] else "" for steps in SHOWN
        ]
        lines.append(row(method, f"{mean(run['teacher_accuracy'] for run in runs):.4f}", *cells))
    return lines


def first_reaching(curve: dict, accuracy: float) -> tuple[int, float] | None:
    """The smallest T of a conversion that has this accuracy, and its energy."""
    for steps, reached in curve["accuracy_by_timesteps"].items():
        if reached >= accuracy:
            return int(steps), curve["energy_uj_by_timesteps"][steps]
    return None


def grouped(results: dict[str, dict]) -> dict[tuple[str, str], dict[tuple[str, str], dict]]:
    """The confirmation's results: {(where, arm): {(block, seed): result}}."""
    found: dict[tuple[str, str], dict[tuple[str, str], dict]] = {}
    made: dict[str, list[dict]] = {}
    for unit, result in results.items():
        if unit.startswith("confirm/"):
            _, start, steps, arm, block, seed = unit.split("/")
            found.setdefault((f"{start}/{steps}", arm), {})[block, seed] = result
            made.setdefault(f"{start}/{steps}", []).append(result)
    for where, of in made.items():
        refuse_mixed(where, of)
    return dict(sorted(found.items()))


def refuse_mixed(where: str, runs: list[dict]) -> None:
    """Stops where runs are of several commits or versions."""
    if len(made := {(run["commit"], run["torch"]) for run in runs}) > 1:
        raise SystemExit(f"the runs of {where} are of several commits or versions, and cannot be compared: {made}")


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of their mean, by Student's t."""
    return student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def bits(result: dict) -> numpy.ndarray:
    """1 for each test image that is classified correctly, else 0."""
    return numpy.unpackbits(numpy.frombuffer(base64.b64decode(result["correct"]), numpy.uint8)).astype(float)


def bootstrap(values: numpy.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean over images that are drawn again."""
    draws = numpy.random.default_rng(0)
    means = [values[draws.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)]
    return tuple(numpy.quantile(means, [0.025, 0.975]))


def sign_flips(differences: list[float]) -> float:
    """The two-sided p-value of a mean difference, over all signs that its pairs could have had."""
    values = numpy.array(differences)
    seen = abs(values.sum()) - 1e-12
    return float(numpy.mean([abs(values @ signs) >= seen for signs in itertools.product((-1, 1), repeat=len(values))]))


def holm(values: list[float]) -> list[float]:
    """p-values, corrected for their number."""
    order, largest, found = sorted(range(len(values)), key=values.__getitem__), 0.0, [0.0] * len(values)
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[number]))
        found[number] = largest
    return found


if __name__ == "__main__":
    done = read(HERE / "results.jsonl")
    print("\n\n".join("\n".join(table(done)) for table in (screened, confirmed, contrasts, diagnosed, longer, matched)))
