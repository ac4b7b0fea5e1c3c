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

from lasnn import checkpoint
from lasnn.display import Progress, Silent
from lasnn.distillation import Stopped, distill
from lasnn.errors import UserError
from lasnn.plan import Plan, read_plan
from lasnn.recipe import LossTable, Recipe, find, toml_value
from lasnn.registry import losses
from lasnn.run import RUNS, RunFolder, environment, finished

DISTILLED, ALONE = "distilled", "alone"


@dataclass(frozen=True)
class Arm:
    """One way to train the student: the recipe with some settings; a row of the table."""

    name: str
    settings: tuple[str, ...]
    timesteps: int

    def folder(self, seed: int) -> str:
        slug = re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")
        return f"{slug}-T{self.timesteps}-seed{seed}"


@dataclass
class Comparison:
    """What a comparison ran and found; `as_json` and `as_markdown` say it."""

    recipe: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    folder: Path
    summaries: dict[tuple[Arm, int], dict[str, Any]] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)

    def command(self, arm: Arm, seed: int | str) -> str:
        """The command that makes one of a row's runs."""
        sets = [part for setting in (*arm.settings, f"seed={seed}") for part in ("--set", setting)]
        return shlex.join(["lasnn", "distill", self.recipe, *sets])

    def accuracies(self, arm: Arm, key: str = "accuracy") -> dict[int, float]:
        """{seed: value} of the runs that are done and have the value."""
        found = {seed: self.summaries.get((arm, seed), {}).get(key) for seed in self.seeds}
        return {seed: value for seed, value in found.items() if value is not None}

    def row(self, arm: Arm) -> dict[str, Any]:
        """An arm over the seeds; the deviation is the sample's, over n - 1, and None for one seed."""
        found = self.accuracies(arm)
        values, teachers = list(found.values()), list(self.accuracies(arm, "teacher_accuracy").values())
        return {
            "name": arm.name,
            "timesteps": arm.timesteps,
            "settings": list(arm.settings),
            "command": self.command(arm, "SEED").replace("'seed=SEED'", "seed=SEED"),
            "accuracy": {str(seed): value for seed, value in found.items()},
            "mean": mean(values) if values else None,
            "deviation": stdev(values) if len(values) > 1 else None,
            "teacher_mean": mean(teachers) if teachers else None,
            **{
                key: mean(self.accuracies(arm, key).values()) if self.accuracies(arm, key) else None
                for key in ("firing_rate", "energy_uj", "seconds")
            },
        }

    def gains(self) -> list[dict[str, Any]]:
        """The distilled student over every other arm at the same T, paired by seed; and beside its teacher."""
        found = []
        for arm in self.arms:
            if arm.name != DISTILLED:
                continue
            ours = self.accuracies(arm)
            for other in self.arms:
                if other is not arm and other.timesteps == arm.timesteps:
                    found.append(paired_gain(DISTILLED, other.name, arm.timesteps, ours, self.accuracies(other)))
            teacher = self.accuracies(arm, "teacher_accuracy")
            if teacher:
                found.append(paired_gain(DISTILLED, "its teacher", arm.timesteps, ours, teacher))
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "recipe": self.recipe,
            "seeds": list(self.seeds),
            "folder": str(self.folder),
            "conditions": self.conditions,
            "arms": [self.row(arm) for arm in self.arms],
            "gains": self.gains(),
        }

    def as_markdown(self) -> str:
        """The tables, the conditions and the commands."""
        known = self.as_json()
        seeds = known["seeds"]
        head = ["student", "T", *(f"seed {seed}" for seed in seeds), "mean", "sd", "teacher", "spikes/neuron/step"]
        lines = [
            [
                row["name"],
                str(row["timesteps"]),
                *(number(row["accuracy"].get(str(seed))) for seed in seeds),
                f"**{number(row['mean'])}**",
                number(row["deviation"]),
                number(row["teacher_mean"]),
                number(row["firing_rate"], 3),
            ]
            for row in known["arms"]
        ]
        text = [f"Test accuracy of the last epoch, `{self.recipe}`.", "", table(head, lines)]
        gains = [
            [f"{gain['name']} over {gain['over']}", str(gain["timesteps"]), signed(gain["mean"]), within(gain)]
            for gain in known["gains"]
        ]
        if gains:
            intro = "Gains in accuracy, paired by seed, with the 95 % interval of Student's t."
            text += ["", intro, "", table(["gain", "T", "mean", "interval"], gains)]
        where = known["conditions"]
        if where:
            text += [
                "",
                f"Conditions: {where['device']} ({where['device_name']}), {where['threads']} threads, "
                f"lasnn {where['lasnn']}, torch {where['torch']}, Python {where['python']}; {where['images']:,} test "
                "images.",
            ]
        text += ["", "The commands of the rows:", "", "```sh"]
        text += [row["command"].replace("seed=SEED", "seed=$seed") for row in known["arms"]]
        return "\n".join([*text, "```", ""])


def compare(
    recipe: str | Path,
    seeds: int = 5,
    *,
    overrides: Sequence[str] = (),
    timesteps: Sequence[int] = (),
    variants: Mapping[str, Sequence[str]] | None = None,
    ablation: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
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
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    base = read_plan(name, list(overrides)).recipe
    arms = rows(base, overrides, timesteps, variants or {}, ablation)
    numbers = tuple(range(base.seed, base.seed + seeds))
    plans = plan_all(name, arms, numbers)
    folder = RUNS / "compare" / find(name).stem if out is None else Path(out)
    found = Comparison(name, numbers, tuple(arms), folder)
    found.conditions = {**environment(plans[arms[0], numbers[0]].device), "images": base_images(plans)}

    # Seed by seed, so that a comparison that is stopped early has pairs.
    todo = [(arm, seed) for seed in numbers for arm in arms]
    done = {key: finished(plans[key].recipe, folder / key[0].folder(key[1])) for key in todo}
    for at, (arm, seed) in enumerate(todo, start=1):
        path = folder / arm.folder(seed)
        where = f"{at}/{len(todo)}  {arm.name}, T = {arm.timesteps}, seed {seed}"
        if not done[arm, seed]:
            tell(f"{where}: {path}")
            distill(plans[arm, seed].recipe, path, resume=True, progress=progress or Silent())
        summary = RunFolder(path).read_json("summary.json")
        found.summaries[arm, seed] = summary
        tell(f"{where}: accuracy {summary['accuracy']:.4f}" + (" (done before)" if done[arm, seed] else ""))
        write(found)
    return found


def base_images(plans: Mapping[Any, Plan]) -> int:
    """Test images of the comparison's data set."""
    return next(iter(plans.values())).data.test_size


def rows(
    recipe: Recipe,
    overrides: Sequence[str],
    timesteps: Sequence[int],
    variants: Mapping[str, Sequence[str]],
    ablation: bool,
) -> list[Arm]:
    """The arms of a recipe: distilled, alone, those of the ablation, and the variants, at each T.

    Raises:
        UserError: the recipe has no teacher to compare with and no variant, or a variant's name is taken.
    """
    settings: dict[str, tuple[str, ...]] = {DISTILLED: ()}
    if recipe.teacher is not None:
        settings[ALONE] = without_teacher(recipe)
        if ablation:
            settings |= ablations(recipe)
    elif not variants:
        raise UserError(f"{recipe.name}: it has no [teacher] to compare with; give --variant NAME:KEY=VALUE")
    taken = [name for name in variants if name in settings]
    if taken:
        raise UserError(*(f"--variant {name}: there is a row of this name; choose another" for name in taken))
    settings |= {name: tuple(given) for name, given in variants.items()}
    return [
        Arm(name, (*overrides, *given, *([f"student.timesteps={steps}"] if timesteps else [])), steps)
        for steps in timesteps or [recipe.student.timesteps]
        for name, given in settings.items()
    ]


def without_teacher(recipe: Recipe) -> tuple[str, ...]:
    """Settings that take the teacher away and leave all else: its losses, its weights, itself."""
    kept = [loss for loss in recipe.losses if not needs_teacher(loss.name)]
    given = [f"losses={toml_value([entry(loss) for loss in kept] or [{'name': 'cross-entropy'}])}"]
    if recipe.student.init == "teacher":
        given.append("student.init=random")
    if recipe.distill.pairs is not None:
        given.append("distill.pairs=")
    return (*given, "teacher=")


def ablations(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Name -> settings of the recipe without one of what comes from the teacher; none where that is one thing only."""
    found = {}
    for left_out in (loss for loss in recipe.losses if needs_teacher(loss.name)):
        kept = [loss for loss in recipe.losses if loss is not left_out]
        if any("logits" in losses[loss.name].inputs for loss in kept):
            found[f"without {left_out.name}"] = (f"losses={toml_value([entry(loss) for loss in kept])}",)
    if recipe.student.init == "teacher":
        found["without the teacher's weights"] = ("student.init=random",)
    return found if len(found) > 1 else {}


def needs_teacher(loss: str) -> bool:
    return any(name.startswith("teacher_") for name in losses[loss].inputs)


def entry(loss: LossTable) -> dict[str, Any]:
    return loss.model_dump(exclude_none=True)


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
            problems += [f"{arm.name}, T = {arm.timesteps}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return plans


def write(found: Comparison) -> None:
    """Write the tables beside the runs."""
    RunFolder(found.folder).write_json("compare.json", found.as_json())
    checkpoint.write(found.folder / "compare.md", found.as_markdown())


def paired_gain(
    name: str, over: str, timesteps: int, ours: Mapping[int, float], theirs: Mapping[int, float]
) -> dict[str, Any]:
    """The mean difference over common seeds and half its 95 % interval, None where there are fewer than two."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    n = len(differences)
    half = student_t(n - 1) * stdev(differences) / math.sqrt(n) if n > 1 else None
    gain = mean(differences) if n else None
    return {"name": name, "over": over, "timesteps": timesteps, "mean": gain, "half_width": half, "seeds": n}


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """The two-sided quantile of Student's t distribution.

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
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return high


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def within(gain: Mapping[str, Any]) -> str:
    return "one seed" if gain["half_width"] is None else f"± {gain['half_width']:.4f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


__all__ = ["Comparison", "Stopped", "compare"]
