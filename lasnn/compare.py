"""`lasnn compare`: a recipe's student with and without its teacher, over seeds, and what the difference is worth.

Every run is an ordinary run folder, made by the command that stands beside its row. What is done is not done again.
"""

import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lasnn import files
from lasnn.callback import Callback
from lasnn.console import interval_said
from lasnn.errors import UserError, unknown
from lasnn.evaluation.iso_accuracy import (
    LONGEST,
    METHODS,
    accuracy_over_time,
    check_convertible,
    convert_until,
    furthest,
    match,
    qcfs_settings,
    say_ratio,
    say_reached,
    sentence,
)
from lasnn.markdown import markdown_table
from lasnn.open_run import finished
from lasnn.plan import Plan, make_plan, read_plan
from lasnn.recipe.check import teaches_classes
from lasnn.recipe.load import find, toml_value
from lasnn.recipe.paths import expanded
from lasnn.recipe.schema import LossTable, Recipe
from lasnn.registry import losses
from lasnn.run import CONDITIONS, RUNS, RunFolder, conditions_of
from lasnn.training.distill import distill
from lasnn.training.stop import Stopped

DISTILLED, ALONE = "distilled", "alone"
# What rows can be compared by: the key of summary.json, and what tables call it.
MEASURES = {
    "accuracy": "test accuracy",
    "validation_accuracy": "accuracy on the images held out",
    "validation_nll": "negative log-likelihood on the images held out (lower is better)",
}
# What a row has of its own, and the option that sets it.
OF_A_ROW = {"seed": "--seeds", "student.timesteps": "--timesteps"}


def slug(name: str) -> str:
    """A row's name as a part of a folder's."""
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.")


@dataclass(frozen=True)
class Arm:
    """One way to train the student: the recipe with some settings; a row of the table."""

    name: str
    settings: tuple[str, ...]
    timesteps: int

    def folder(self, seed: int) -> str:
        return f"{slug(self.name)}-T{self.timesteps}-seed{seed}"


@dataclass
class Conversion:
    """The teacher's conversions beside its student: by method and seed, what `convert_until` measured."""

    longest: int
    # QCFS's own teacher; None where the recipe's teacher is on QCFS itself, or none can be trained.
    qcfs: Arm | None
    methods: tuple[str, ...]
    curves: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    def teacher_of(self, method: str) -> str:
        """Whose conversion it is, in words."""
        return "its own, trained on QCFS" if method == "qcfs" and self.qcfs else "the student's teacher"


@dataclass
class Comparison:
    """What a comparison ran and found; `as_json` and `as_markdown` say it."""

    recipe: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    folder: Path
    summaries: dict[tuple[Arm, int], dict[str, Any]] = field(default_factory=dict)
    environments: dict[tuple[Arm, int], dict[str, Any]] = field(default_factory=dict)
    """The `env.json` of each run that is done."""
    images: int = 0
    """How many images the rows are compared on."""
    conversion: "Conversion | None" = None
    measure: str = "accuracy"
    """What the rows are compared by, one of `MEASURES`."""

    def command(self, arm: Arm, seed: int | str) -> str:
        """The command that makes one of a row's runs."""
        sets = [part for setting in (*arm.settings, f"seed={seed}") for part in ("--set", setting)]
        return shlex.join(["lasnn", "distill", self.recipe, *sets])

    def values(self, arm: Arm, key: str | None = None) -> dict[int, float]:
        """{seed: value} of the runs that are done and have the value; without a key what the rows are compared by."""
        found = {seed: self.summaries.get((arm, seed), {}).get(key or self.measure) for seed in self.seeds}
        return {seed: value for seed, value in found.items() if value is not None}

    def row(self, arm: Arm) -> dict[str, Any]:
        """An arm over the seeds; the deviation is the sample's, over n - 1, and None for one seed."""
        found = self.values(arm)
        values, teachers = list(found.values()), list(self.values(arm, f"teacher_{self.measure}").values())
        return {
            "name": arm.name,
            "timesteps": arm.timesteps,
            "settings": list(arm.settings),
            "command": self.command(arm, "SEED"),
            self.measure: {str(seed): value for seed, value in found.items()},
            "mean": mean(values) if values else None,
            "deviation": stdev(values) if len(values) > 1 else None,
            "teacher_mean": mean(teachers) if teachers else None,
            **{
                key: mean(self.values(arm, key).values()) if self.values(arm, key) else None
                for key in ("firing_rate", "energy_uj", "seconds")
            },
        }

    def gains(self) -> list[dict[str, Any]]:
        """The distilled student over every other arm at the same T, paired by seed; and beside its teacher."""
        found = []
        for arm in self.arms:
            if arm.name != DISTILLED:
                continue
            ours = self.values(arm)
            for other in self.arms:
                if other is not arm and other.timesteps == arm.timesteps:
                    found.append(paired_gain(DISTILLED, other.name, arm.timesteps, ours, self.values(other)))
            teacher = self.values(arm, f"teacher_{self.measure}")
            if teacher:
                found.append(paired_gain(DISTILLED, "its teacher", arm.timesteps, ours, teacher))
        return found

    def matches(self) -> list[dict[str, Any]]:
        """For each distilled row and method the T at which the conversion reaches the student's accuracy."""
        if self.conversion is None:
            return []
        found = []
        for arm in self.arms:
            if arm.name == DISTILLED:
                for method, curves in self.conversion.curves.items():
                    ours = match(
                        method, arm.timesteps, self.values(arm), curves, furthest(method, self.conversion.longest)
                    )
                    found.append(ours | {"teacher": self.conversion.teacher_of(method)})
        return found

    def conversion_said(self) -> list[str]:
        """The matches in lines of text, and what a reader of them must know."""
        return [] if self.conversion is None else [*map(sentence, self.matches()), *self.notes()]

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        conversion = {}
        if self.conversion is not None:
            conversion = {
                "matched_accuracy": self.matches(),
                "converted_accuracy": {
                    method: {str(t): value for t, value in accuracy_over_time(curves.values()).items()}
                    for method, curves in self.conversion.curves.items()
                },
                "conversion_notes": self.notes(),
            }
        conditions = self.conditions()
        return {
            "recipe": self.recipe,
            "seeds": list(self.seeds),
            "folder": str(self.folder),
            "measure": self.measure,
            "conditions": {key: value for key, (value, *others) in conditions.items() if not others}
            | {"images": self.images},
            # Of each value, how many runs have it.
            "mixed_conditions": {
                key: {str(value): runs for value, runs in counts.items()}
                for key, counts in conditions.items()
                if len(counts) > 1
            },
            "arms": [self.row(arm) for arm in self.arms],
            "gains": self.gains(),
            **conversion,
        }

    def notes(self) -> list[str]:
        """What a reader of the conversions must know."""
        conversion = self.conversion
        notes = []
        if conversion.qcfs:
            command = self.command(conversion.qcfs, "SEED")
            notes.append(f"QCFS's own teacher is trained by `{command}`; the student of that run is of no use.")
        elif "qcfs" not in conversion.methods:
            notes.append(
                "QCFS is left out: it needs a teacher trained on its activation, and this recipe's is read from a file."
            )
        return notes

    def as_markdown(self) -> str:
        """The tables, the conditions and the commands."""
        known = self.as_json()
        seeds = known["seeds"]
        head = ["student", "T", *(f"seed {seed}" for seed in seeds), "mean", "sd", "teacher", "spikes/neuron/step"]
        lines = [
            [
                row["name"],
                str(row["timesteps"]),
                *(number(row[self.measure].get(str(seed))) for seed in seeds),
                "" if row["mean"] is None else f"**{number(row['mean'])}**",
                number(row["deviation"]),
                number(row["teacher_mean"]),
                number(row["firing_rate"], 3),
            ]
            for row in known["arms"]
        ]
        said = MEASURES[self.measure]
        text = [f"{said[0].upper()}{said[1:]} of the last epoch, `{self.recipe}`.", "", *markdown_table(head, lines)]
        gains = [
            [f"{gain['name']} over {gain['over']}", str(gain["timesteps"]), signed(gain["mean"]), interval_said(gain)]
            for gain in known["gains"]
        ]
        if gains:
            what = "accuracy" if self.measure == "accuracy" else said
            intro = f"Gains in {what}, paired by seed, with the 95 % interval of Student's t."
            text += ["", intro, "", *markdown_table(["gain", "T", "mean", "interval"], gains)]
        text += self._conditions_as_markdown()
        if self.conversion is not None:
            text += ["", *self._conversion_as_markdown(known)]
        text += ["", "The commands of the rows:", "", "```sh"]
        text += [row["command"].replace("seed=SEED", "seed=$seed") for row in known["arms"]]
        return "\n".join([*text, "```", ""])

    def conditions(self) -> dict[str, dict[Any, int]]:
        """What the runs that are done were made with, by what: how many runs have each value."""
        found: dict[str, dict[Any, int]] = {}
        for known in self.environments.values():
            for key, values in conditions_of(known).items():
                counts = found.setdefault(key, {})
                value = values[0] if len(values) == 1 else ", then ".join(map(str, values))
                counts[value] = counts.get(value, 0) + 1
        return found

    def warnings(self) -> list[str]:
        """A line where the rows cannot be compared as they stand: the runs were made under different conditions."""
        mixed = any(len(counts) > 1 for counts in self.conditions().values())
        within = (values for known in self.environments.values() for values in conditions_of(known).values())
        if not mixed and all(len(values) == 1 for values in within):
            return []
        return [
            "The runs were not made under the same conditions, and a difference between rows may come from that; give "
            "another --out to make all of them anew."
        ]

    def _conditions_as_markdown(self) -> list[str]:
        """What the runs were made with, value by value where it differs."""
        said = []
        for key, counts in self.conditions().items():
            form = CONDITIONS[key]
            if len(counts) == 1:
                said.append(form.format(*counts))
            else:
                said.append(" or ".join(f"{form.format(value)} ({runs} runs)" for value, runs in counts.items()))
        if not said:
            return []
        images = f"{self.images:,} {'test images' if self.measure == 'accuracy' else 'images held out'}"
        text = f"Conditions: {', '.join(said)}; {images}."
        return ["", text, *(line for warning in self.warnings() for line in ("", warning))]

    def _conversion_as_markdown(self, known: Mapping[str, Any]) -> list[str]:
        head = ["conversion", "ANN", "accuracy of the ANN", "student's T", "accuracy of the student"]
        head += [f"smallest T, seeds {', '.join(map(str, known['seeds']))}", "ratio (median)"]
        lines = [
            [
                found["method"],
                found["teacher"],
                number(found["teacher_accuracy"]),
                str(found["timesteps"]),
                number(found["accuracy"]),
                say_reached(found),
                say_ratio(found),
            ]
            for found in known["matched_accuracy"]
        ]
        intro = "The smallest T at which a conversion, without training, reaches the distilled student's accuracy."
        curves = known["converted_accuracy"]
        steps = sorted({int(t) for curve in curves.values() for t in curve})
        over_time = [
            [method, *("" if str(t) not in curve else number(curve[str(t)]) for t in steps)]
            for method, curve in curves.items()
        ]
        return [
            *(intro, "", *markdown_table(head, lines), ""),
            *("Accuracy of the conversions over T, mean of the seeds.", ""),
            *markdown_table(["conversion", *map(str, steps)], over_time),
            *(line for note in known["conversion_notes"] for line in ("", note)),
        ]


def compare(
    recipe: str | Path,
    seeds: int = 5,
    *,
    overrides: Iterable[str] = (),
    timesteps: int | Sequence[int] = (),
    variants: Mapping[str, Sequence[str]] | None = None,
    ablation: bool = False,
    against_conversion: bool = False,
    longest: int = LONGEST,
    by: str = "accuracy",
    out: str | Path | None = None,
    progress: Callback | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Train a recipe's student with and without its teacher, over seeds.

    Args:
        recipe: a TOML file or a shipped recipe's name.
        seeds: how many; they count up from the recipe's own.
        overrides: `key.path=value` settings of every run.
        timesteps: T of each row; none is the recipe's.
        variants: further rows, name -> settings on top of the recipe's.
        ablation: further rows, each without one of the things that the teacher gives.
        against_conversion: convert the teacher of each seed as well, and QCFS's own, and find the T at which the
            conversions reach the distilled students' accuracy.
        longest: T at which a conversion is given up.
        by: what the rows are compared by: "accuracy" on the test images; "validation_accuracy" or "validation_nll" on
            the training images that `data.validation` holds out, so that the test images choose nothing.
        out: where the run folders and the tables go; None is `runs/compare/<recipe>`. What is done there is kept.
        progress: what is told about each run's progress; None is nobody.
        tell: gets a line as each run begins and ends.

    Returns:
        The comparison, also written to `compare.json` and `compare.md` after every run.

    Raises:
        UserError: something in a row's recipe cannot work; raised before the first run, for all rows together.
        Stopped: a signal came; the same call goes on.
    """
    name = str(recipe)
    if seeds < 1 or longest < 1:
        key, value = ("--seeds", seeds) if seeds < 1 else ("--longest", longest)
        raise UserError(f"{key} must be at least 1, got {value}")
    if by not in MEASURES:
        raise UserError(unknown("--by", by, MEASURES))
    if by != "accuracy" and against_conversion:
        raise UserError(f"--by {by}: conversions are compared by their accuracy on the test images; leave one out")
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    timesteps = [timesteps] if isinstance(timesteps, int) else timesteps
    base = read_plan(name, overrides).recipe
    arms = rows(base, overrides, timesteps, variants or {}, ablation)
    if ablation and not ablations(base):
        tell(f'--ablation adds no row: the teacher gives one thing only, and the row "{ALONE}" is without it')
    numbers = tuple(range(base.seed, base.seed + seeds))
    plans = plan_all(name, arms, numbers)
    if by != "accuracy":
        check_held_out(plans, by)
    folder = RUNS / "compare" / find(name).stem if out is None else expanded(out, "--out")
    found = Comparison(name, numbers, tuple(arms), folder, measure=by)
    found.images = base_images(plans, by)
    if against_conversion:
        found.conversion = plan_conversion(base, name, overrides, arms, numbers, longest, plans)

    # Seed by seed, so that a comparison that is stopped early has pairs.
    own = [found.conversion.qcfs] if found.conversion and found.conversion.qcfs else []
    todo = [(arm, seed) for seed in numbers for arm in (*arms, *own)]
    done = {key: finished(plans[key].recipe, folder / key[0].folder(key[1])) for key in todo}
    for at, (arm, seed) in enumerate(todo, start=1):
        path = folder / arm.folder(seed)
        where = f"{at}/{len(todo)}  {arm.name}, T = {arm.timesteps}, seed {seed}"
        if not done[arm, seed]:
            tell(f"{where}: {path}")
            distill(plans[arm, seed].recipe, path, resume=True, progress=progress)
        summary = RunFolder(path).read_json("summary.json")
        found.summaries[arm, seed] = summary
        if by == "accuracy":
            # Where pictures cannot be read there are fewer than the plan knows of.
            found.images = summary["images"]
        found.environments[arm, seed] = RunFolder(path).read_json("env.json") or {}
        tell(f"{where}: {by.replace('_', ' ')} {summary[by]:.4f}" + (" (done before)" if done[arm, seed] else ""))
        if found.conversion and arm == (*arms, *own)[-1]:
            convert_teachers(found, seed, tell)
        write(found)
    for warning in found.warnings():
        tell(warning)
    return found


def plan_conversion(
    recipe: Recipe,
    name: str,
    overrides: Sequence[str],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    longest: int,
    plans: dict[tuple[Arm, int], Plan],
) -> Conversion:
    """What is to be converted; adds the plans of QCFS's own teacher.

    Raises:
        UserError: there is no teacher, or one that cannot be converted.
    """
    if recipe.teacher is None:
        raise UserError(f"{recipe.name}: it has no [teacher] to convert; leave --against-conversion out")
    settings = qcfs_settings(recipe)
    qcfs = Arm("teacher on QCFS", (*overrides, *settings), 1) if settings else None
    if qcfs:
        plans |= plan_all(name, [qcfs], seeds)
    methods = METHODS if settings is not None else tuple(method for method in METHODS if method != "qcfs")
    first = plans[next(arm for arm in arms if arm.name == DISTILLED), seeds[0]]
    check_convertible({method: plans[qcfs, seeds[0]] if method == "qcfs" and qcfs else first for method in methods})
    return Conversion(longest, qcfs, methods)


def convert_teachers(found: Comparison, seed: int, tell: Callable[[str], None]) -> None:
    """Measure a seed's conversions until they reach its best student."""
    conversion = found.conversion
    students = [arm for arm in found.arms if arm.name == DISTILLED]
    best = max(found.summaries[arm, seed]["accuracy"] for arm in students)
    for method in conversion.methods:
        arm = conversion.qcfs if method == "qcfs" and conversion.qcfs else students[0]
        tell(f"the teacher of seed {seed}, converted by {method}, until it reaches {best:.4f}")
        kept = found.folder / f"converted-{method}-seed{seed}.json"
        curve = convert_until(found.folder / arm.folder(seed), method, best, conversion.longest, kept)
        conversion.curves.setdefault(method, {})[seed] = curve
        reached = curve["results"][-1]
        tell(f"  accuracy {reached['accuracy']:.4f} at T = {reached['timesteps']}")


def base_images(plans: Mapping[Any, Plan], by: str) -> int:
    """How many images the rows are compared on."""
    first = next(iter(plans.values()))
    return first.data.test_size if by == "accuracy" else first.recipe.data.validation


def check_held_out(plans: Mapping[tuple[Arm, int], Plan], by: str) -> None:
    """Check that every row holds out the same number of images, and some.

    Raises:
        UserError: it does not.
    """
    counts = {arm.name: plan.recipe.data.validation for (arm, _), plan in plans.items()}
    if not all(counts.values()):
        raise UserError(f"--by {by} needs images to hold out: set data.validation, as --set data.validation=1000")
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise UserError(f"--by {by}: the rows hold out different numbers of images ({said}); set one for all")


def rows(
    recipe: Recipe,
    overrides: Sequence[str],
    timesteps: Sequence[int],
    variants: Mapping[str, Sequence[str]],
    ablation: bool,
) -> list[Arm]:
    """The arms of a recipe: distilled, alone, those of the ablation, and the variants, at each T.

    Raises:
        UserError: the recipe has no teacher to compare with and no variant, a variant's name is taken or no name for a
            folder, or it sets what other options do.
    """
    settings: dict[str, tuple[str, ...]] = {DISTILLED: ()}
    if recipe.teacher is not None:
        settings[ALONE] = without_teacher(recipe)
        if ablation:
            settings |= ablations(recipe)
    elif not variants:
        raise UserError(f"{recipe.name}: it has no [teacher] to compare with; give --variant NAME:KEY=VALUE")
    elif ablation:
        raise UserError(f"{recipe.name}: it has no [teacher] to leave things out of; leave --ablation out")
    problems, taken = [], {slug(name) for name in settings}
    for name, given in variants.items():
        if not slug(name):
            problems.append(f"--variant {name}: its runs have no name for their folder; give it letters or digits")
        elif slug(name) in taken:
            problems.append(f"--variant {name}: there is a row of this name, or of this folder; choose another")
        taken.add(slug(name))
        keys = [setting.partition("=")[0].strip() for setting in given]
        problems += [f"--variant {name}: {key} is set by {OF_A_ROW[key]}" for key in keys if key in OF_A_ROW]
    if problems:
        raise UserError(*problems)
    settings |= {name: tuple(given) for name, given in variants.items()}
    return [
        Arm(name, (*overrides, *given, *([f"student.timesteps={steps}"] if timesteps else [])), steps)
        for steps in dict.fromkeys(timesteps or [recipe.student.timesteps])
        for name, given in settings.items()
    ]


def without_teacher(recipe: Recipe) -> tuple[str, ...]:
    """Settings that take the teacher away and leave all else: its losses, its weights, itself.

    Labels whose weights sum to less than 1 make room for the teacher's terms. Alone they have 1: under SGD half the
    weight is half the rate.
    """
    kept = [loss for loss in recipe.losses if not needs_teacher(loss.name)]
    of_labels = [loss for loss in kept if teaches_classes(loss.name)]
    weight = sum(loss.weight for loss in of_labels if loss.schedule == "constant")
    if not weight or not any(map(teaches_to_the_end, kept)):
        # Labels whose weight falls to 0 left the rest of the training to the teacher.
        kept = [loss for loss in kept if loss.weight and loss not in of_labels]
    raised = 1 / weight if 0 < weight < 1 else 1.0
    terms = [entry(loss) | ({"weight": loss.weight * raised} if raised > 1 else {}) for loss in kept]
    if not any(map(teaches_to_the_end, kept)):
        terms.append({"name": "cross-entropy"})
    given = [f"losses={toml_value(terms)}"]
    if recipe.start is None and recipe.student.init in ("teacher", "copied", "converted"):
        given += from_random(recipe)
    if recipe.distill.pairs is not None:
        given.append("distill.pairs=")
    return (*given, "teacher=")


def teaches_to_the_end(loss: LossTable) -> bool:
    """Whether a term says which class an image is of for as long as the training lasts."""
    return teaches_classes(loss.name) and loss.weight > 0 and loss.schedule == "constant"


def ablations(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Name -> settings of the recipe without one of what comes from the teacher; none where that is one thing only."""
    found = {}
    for left_out in (loss for loss in recipe.losses if needs_teacher(loss.name)):
        kept = [loss for loss in recipe.losses if loss is not left_out]
        if any(map(teaches_to_the_end, kept)):
            found[f"without {left_out.name}"] = (f"losses={toml_value([entry(loss) for loss in kept])}",)
    if recipe.start:
        found["without the start's weights"] = (*from_random(recipe), "start=")
    elif make_plan(recipe).start.source == "teacher":
        found["without the teacher's weights"] = from_random(recipe)
    return found if len(found) > 1 else {}


def from_random(recipe: Recipe) -> tuple[str, ...]:
    """Settings of a random start, in which nothing is calibrated."""
    calibrated = "calibration" in recipe.student.model_fields_set
    return "student.init=random", *(["student.calibration="] if calibrated else [])


def needs_teacher(loss: str) -> bool:
    return any(name.startswith("teacher_") for name in losses[loss].inputs)


def entry(loss: LossTable) -> dict[str, Any]:
    """A term as the recipe has it, without what it leaves out."""
    return loss.model_dump(exclude_none=True, exclude_unset=True)


def plan_all(recipe: str, arms: Iterable[Arm], seeds: Iterable[int]) -> dict[tuple[Arm, int], Plan]:
    """A checked plan for every run.

    Raises:
        UserError: what is wrong, once for each arm.
    """
    plans, problems = {}, []
    for arm in arms:
        try:
            for seed in seeds:
                plans[arm, seed] = read_plan(recipe, [*arm.settings, f"seed={seed}"])
        except UserError as error:
            # What a row sets, by --variant or of itself, comes as overrides do.
            lines = [problem.removeprefix("--set: ") for problem in error.problems]
            problems += [f"{arm.name}, T = {arm.timesteps}: {line}" for line in lines]
    if problems:
        raise UserError(*problems)
    return plans


def write(found: Comparison) -> None:
    """Write the tables beside the runs."""
    RunFolder(found.folder).write_json("compare.json", found.as_json())
    files.write(found.folder / "compare.md", found.as_markdown())


def paired_gain(
    name: str, over: str, timesteps: int, ours: Mapping[int, float], theirs: Mapping[int, float]
) -> dict[str, Any]:
    """The mean difference over common seeds and half its 95 % interval: None where there are fewer than two, or where
    all are the same, as on few images; their deviation of 0 says nothing of other seeds.
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    n = len(differences)
    # Equal differences of rounded figures are equal but for the last bits.
    differ = n > 1 and max(differences) - min(differences) > 1e-9
    half = student_t(n - 1) * stdev(differences) / math.sqrt(n) if differ else None
    gain = mean(differences) if n else None
    return {"name": name, "over": over, "timesteps": timesteps, "mean": gain, "half_width": half, "seeds": n}


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution.

    The probability within +-t is a finite sum for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3
    and 26.7.4); it is inverted by bisection.
    """

    def probability(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = freedom % 2
        term = cosine if odd else 1.0
        total = 0.0 if freedom == 1 else term
        for k in range(3 if odd else 2, freedom - 1, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < 0.95 else (low, middle)
    return high


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


__all__ = ["Comparison", "Stopped", "compare"]
