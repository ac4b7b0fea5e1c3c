"""The facts of a report as plain values and small arrays: everything is measured here, nothing is drawn.

Shapes: T time steps, B batch, C channels, H x W pixels, K classes.
"""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lasnn.data import Batches
from lasnn.errors import UserError
from lasnn.evaluation.conversion import Method
from lasnn.evaluation.energy import break_even_rate, in_each_precision, multiply_additions_of, teacher_layers
from lasnn.evaluation.evaluate import check_conversion, conversion_line, conversions
from lasnn.evaluation.measure import measure
from lasnn.evaluation.metrics import CONFIDENCE_BINS, AccuracyMetrics, EarlyExit
from lasnn.evaluation.operations import PJ_MULTIPLY_ADD, teacher_energy_uj
from lasnn.loaded_run import Run
from lasnn.memory import count_parameters
from lasnn.network.staged import Staged
from lasnn.network.units import NormActivate, Product
from lasnn.recipe.schema import LossTable
from lasnn.report.attention import measure_attention
from lasnn.run import changed_conditions, environment, sessions

# Attention is measured on at most so many test images, drawn once by the run's seed.
ATTENTION_IMAGES = 1000
MISTAKES_SHOWN = 18
CONFUSIONS_SHOWN = 10
EXITS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

Tell = Callable[[str], None]


def gather(
    run: Run, timesteps: Sequence[int] | None, method: Method | None, longest: int, tell: Tell
) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        run: a finished run.
        timesteps: T of the student's curve; None is 1 to twice the training's T.
        method: how the teacher is converted; None leaves the conversion out.
        longest: T up to which it is measured.
        tell: called with a line before each part that takes time.

    Raises:
        UserError: the data is missing or broken.
    """
    train, test = run.images.train, run.images.test
    trained_t = run.recipe.student.timesteps
    chosen = sorted({trained_t, *(timesteps or default_timesteps(trained_t, run.student.encoder.causal))})
    tell(f"student: {len(test):,} test images, up to T = {chosen[-1]}")
    begin = time.perf_counter()
    student, results = measure_student(run, test, chosen)
    step_seconds = (time.perf_counter() - begin) / (chosen[-1] if run.student.encoder.causal else sum(chosen))
    at_t = next(result for result in results if result["timesteps"] == trained_t)
    teacher = layers = None
    if run.teacher is not None:
        tell(f"teacher: {len(test):,} test images")
        teacher, layers = measure_teacher(run, test)
    conversion = convert_teacher(run, train, test, method, longest, step_seconds, tell)
    count = min(ATTENTION_IMAGES, len(test))
    tell(f"attention maps: {count:,} test images")
    return {
        "name": run.folder.model or run.folder.path.resolve().name,
        "title": title(run),
        "plugins": run.recipe.plugins,
        "run": str(run.folder),
        "data": run.images_recipe.data.name,
        "data_changes": run.images.changes,
        "classes": list(run.description.classes),
        "images": len(test),
        "timesteps": trained_t,
        "causal": run.student.encoder.causal,
        "random": run.student.encoder.random,
        "summary": run.summary,
        "recipe": recipe_in_short(run),
        "recipe_text": (run.folder / "recipe.toml").read_text(encoding="utf-8"),
        "results": results,
        "student": student,
        "teacher": teacher,
        "layers": by_layer(run, at_t, layers),
        "energy": energies(run, at_t),
        "conversion": conversion,
        "attention": measure_attention(run, test, count),
        "confusions": worst_confusions(at_t["confusion"]),
        "mistakes": mistakes(test, student, teacher),
        "training": training(run),
        "environment": run.folder.read_json("env.json"),
        "reporting": environment(run.device),
        "commands": commands(run),
    }


def at_trained(facts: dict[str, Any]) -> dict[str, Any]:
    """The student's result at the training's T."""
    return next(result for result in facts["results"] if result["timesteps"] == facts["timesteps"])


def default_timesteps(trained: int, causal: bool) -> list[int]:
    """1 to twice the training's T; where each T is a run of its own, the powers of two among them."""
    longest = max(trained, min(2 * trained, 16))
    if causal:
        return list(range(1, longest + 1))
    return [2**power for power in range(longest.bit_length()) if 2**power <= longest]


class Answers:
    """What a network answers on each test image, in the images' order."""

    def __init__(self, classes: int):
        self.tally = AccuracyMetrics(classes)
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, K] and labels [B]."""
        self.tally.add(logits, labels)
        confidence, answer = logits.float().softmax(-1).max(-1)
        self.batches.append((labels.cpu(), answer.cpu(), confidence.cpu()))

    def result(self) -> dict[str, Any]:
        """`AccuracyMetrics.result`, the `bins` of confidence; `labels`, `answers`, `confidences` of all images [N]."""
        labels, answers, confidences = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        count, confidence, right = self.tally.bins.tolist()
        bins = [
            {"from": i / CONFIDENCE_BINS, "images": int(n), "confidence": c / n, "accuracy": r / n} if n else None
            for i, (n, c, r) in enumerate(zip(count, confidence, right, strict=True))
        ]
        return {
            **self.tally.result(),
            "bins": [one for one in bins if one],
            "labels": labels,
            "answers": answers,
            "confidences": confidences,
        }


def measure_student(run: Run, test: Any, timesteps: list[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The student's answers at the training's T, with `exits` where it can stop early, and `measure`'s results."""
    trained, causal = run.recipe.student.timesteps, run.student.encoder.causal
    answers = Answers(len(run.description.classes))
    exits = [EarlyExit(threshold) for threshold in EXITS] if causal and trained > 1 else []

    def watch(means: Tensor, labels: Tensor, energy: Tensor) -> None:
        if len(means) != trained and not causal:
            return
        answers.add(means[trained - 1], labels)
        for early in exits:
            early.add(means[:trained], labels, energy[:trained])

    options = {"batch_size": run.recipe.data.batch_size, "seed": run.recipe.seed, "watch": watch}
    try:
        results = measure(run.student, test, timesteps, **options)
    finally:
        run.student.timesteps = trained
    return {**answers.result(), "exits": [early.result() for early in exits]}, results


@torch.no_grad()
def measure_teacher(run: Run, test: Any) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The teacher's answers with its `energy_uj`; and by layer the share of its activations above 0, and energy."""
    answers, image = (
        Answers(len(run.description.classes)),
        (run.description.channels, run.description.height, run.description.width),
    )
    # Values above 0, and values.
    active: dict[str, tuple[int, int]] = {}
    energy: dict[str, float] = {}
    network = run.teacher.network

    def count_active(name: str, _: nn.Module, output: Tensor) -> None:
        above, values = active.get(name, (0, 0))
        active[name] = above + int((output > 0).sum()), values + output.numel()

    with hooked(network, (NormActivate, nn.ReLU), count_active):
        for batch, labels in Batches(test, run.recipe.data.batch_size, seed=0, epoch=0, shuffle=False):
            answers.add(run.teacher(batch), labels)

    def count(name: str, layer: nn.Module, output: Tensor) -> None:
        energy[name] = energy.get(name, 0.0) + 1e-6 * PJ_MULTIPLY_ADD * multiply_additions_of(layer, output)

    with hooked(network, (nn.Conv2d, nn.Linear, Product), count):
        run.teacher(torch.zeros(1, *image, device=run.device))
    rates = {name: above / count for name, (above, count) in active.items()}
    result = {**answers.result(), "energy_uj": teacher_energy_uj(run.teacher, image)}
    return result, {"rates": rates, "energy": energy}


@contextmanager
def hooked(network: Staged, kinds: tuple[type, ...], see: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Within the block `see` is called with the name, module and output of each module of these kinds that runs.

    A unit's own activation is not told beside the unit.
    """
    hooks = []
    for modules in network.modules_by_part().values():
        units = tuple(f"{name}." for name, module in modules.items() if isinstance(module, NormActivate))
        for name, module in modules.items():
            if isinstance(module, kinds) and not name.startswith(units):
                hooks.append(module.register_forward_hook(lambda m, _, output, name=name: see(name, m, output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def energies(run: Run, result: dict[str, Any]) -> list[dict[str, Any]]:
    """By precision, the energy with memory accesses: `student` and `teacher` (see `energy_with_memory`), `below`, the
    firing rate below which the student takes less; the last two are None where there is no teacher.
    """
    image = (run.description.channels, run.description.height, run.description.width)
    theirs = None if run.teacher is None else in_each_precision(teacher_layers(run.teacher, image))
    found = []
    for name, student in result["energy_with_memory"].items():
        teacher = None if theirs is None else theirs[name]
        below = None if teacher is None else break_even_rate(result["firing_rate"], student, teacher["energy_uj"])
        found.append({"precision": name, "student": student, "teacher": teacher, "below": below})
    return found


def by_layer(run: Run, result: dict[str, Any], teacher: dict[str, dict[str, float]] | None) -> list[dict[str, Any]]:
    """Of stem, stages and head: their `rates` and `energy`, rows of (layer, student's, teacher's); None has none."""
    theirs = teacher or {"rates": {}, "energy": {}}
    names = list(run.student.network.modules_by_part())
    if run.teacher is not None:
        names = list(dict.fromkeys([*names[:-1], *run.teacher.network.modules_by_part(), names[-1]]))
        names.sort(key=lambda name: name == "head")
    found = []
    for part in names:
        rows = {}
        for kind, ours in (("rates", result["firing_rate_by_layer"]), ("energy", result["energy_uj_by_layer"])):
            both = dict.fromkeys(name for name in [*ours, *theirs[kind]] if name == part or name.startswith(f"{part}."))
            rows[kind] = [(name, ours.get(name), theirs[kind].get(name)) for name in both]
        if rows["rates"] or rows["energy"]:
            found.append({"part": part, **rows})
    return found


def convert_teacher(
    run: Run, train: Any, test: Any, method: Method | None, longest: int, step_seconds: float, tell: Tell
) -> dict[str, Any]:
    """The converted teacher at T = 1, 2, 4, ...: `method` and `results`, or the `reason` why there is none.

    `step_seconds` is what a step on all test images took the student, from which the time is foretold.
    """
    if method is None:
        return {"reason": "it was left out (--converted none)"}
    try:
        check_conversion(run, method)
    except UserError as error:
        return {"reason": str(error).replace("\n", "; ")}
    timesteps = sorted({longest, *(2**power for power in range(longest.bit_length()) if 2**power <= longest)})
    about = timedelta(seconds=round(longest * step_seconds))
    tell(f"{conversion_line(method, len(test), longest)}, about {about} (--longest)")
    batch_size = run.recipe.data.batch_size
    results = []
    for converted, steps in conversions(run.teacher, method, train, timesteps, batch_size=batch_size):
        results += measure(converted, test, steps, batch_size=batch_size, seed=run.recipe.seed)
    known = {key: value for key, value in converted.description.items() if key != "thresholds"}
    return {**known, "results": results}


def worst_confusions(confusion: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The pairs of classes that are confused most often: `label`, `answer`, `images`, `share` of the true class."""
    matrix = torch.tensor(confusion, dtype=torch.float64)
    wrong = matrix.clone().fill_diagonal_(0)
    found = []
    for place in wrong.flatten().argsort(descending=True, stable=True)[:CONFUSIONS_SHOWN].tolist():
        label, answer = divmod(place, len(matrix))
        count = int(wrong[label, answer])
        if count:
            found.append(
                {"label": label, "answer": answer, "images": count, "share": count / float(matrix[label].sum())}
            )
    return found


def mistakes(test: Any, student: dict[str, Any], teacher: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The student's most confident wrong answers, the surest first."""
    wrong = student["answers"] != student["labels"]
    order = (student["confidences"] * wrong).argsort(descending=True, stable=True)[
        : min(MISTAKES_SHOWN, int(wrong.sum()))
    ]
    if not len(order):
        return []
    [(pixels, _)] = test.batches([order])
    return [
        {
            "image": image,
            "pixels": pixels[place].cpu(),
            "label": int(student["labels"][image]),
            "answer": int(student["answers"][image]),
            "confidence": float(student["confidences"][image]),
            "teacher": None if teacher is None else int(teacher["answers"][image]),
        }
        for place, image in enumerate(order.tolist())
    ]


def training(run: Run) -> dict[str, Any]:
    """The epochs of each phase, with each term times its weight, and why a phase has none."""
    epochs = run.folder.metrics()
    recipe, found = run.recipe, {}

    def weight(name: str, epoch: dict[str, Any]) -> float:
        losses = recipe.losses if epoch["phase"] == "student" else ()
        return next(
            (loss.weight_in(epoch["epoch"], recipe.distill.epochs) for loss in losses if loss.name == name), 1.0
        )

    for phase in ("teacher", "start", "student"):
        found[phase] = [
            {
                **epoch,
                "terms": {name: weight(name, epoch) * value for name, value in epoch.get("losses", {}).items()},
            }
            for epoch in epochs
            if epoch["phase"] == phase
        ]
    found["weights"] = {loss.name: loss.weight for loss in recipe.losses}
    teacher = recipe.teacher
    found["why_no_teacher"] = (
        "there is no teacher"
        if teacher is None
        else f"the teacher was not trained in this run: it was read from {teacher.checkpoint}"
        if teacher.checkpoint
        else "the teacher was not trained: its own code gives it its weights"
        if not trained(run)
        else "metrics.jsonl has no epochs of the teacher"
    )
    return found


def title(run: Run) -> str:
    """What was distilled into what, on which images."""
    recipe = run.recipe
    how = "trained without a teacher"
    if recipe.teacher:
        # torchvision's networks share one architecture, and are told apart by the model.
        how = " ".join(["distilled from", recipe.teacher.architecture, recipe.teacher.options.get("model", "")]).strip()
    return f"A spiking {recipe.student.architecture} {how}, on {recipe.data.name}"


def recipe_in_short(run: Run) -> list[tuple[str, str]]:
    """The recipe as a few lines, (what, how)."""
    recipe, data = run.recipe, run.description
    table, teacher, distill = recipe.student, recipe.teacher, recipe.distill
    encoder = table.encoder_table
    size = f"{data.channels} × {data.height} × {data.width}"
    lines = [
        (
            "data",
            f"{recipe.data.name}: {data.train_size:,} training and {data.test_size:,} test images, {size}, "
            f"{len(data.classes)} classes",
        ),
        ("teacher", "none: the student was trained alone"),
        (
            "student",
            f"{described(table.architecture, table.options)}, {count_parameters(run.student.network):,} parameters, "
            + started(run),
        ),
        ("neuron", described(table.neuron.name, table.neuron.options)),
        ("input", f"{described(encoder.name, encoder.options)} encoding, T = {table.timesteps}"),
        (
            "objective",
            " + ".join(f"{loss.weight:g} × {described(loss.name, scheduled(loss))}" for loss in recipe.losses),
        ),
        ("training", how_trained(distill) + f", batches of {recipe.data.batch_size}"),
        ("seed", f"{recipe.seed}, {run.folder.read_json('env.json').get('precision', recipe.precision)}"),
    ]
    if teacher is not None:
        how = f"from {teacher.checkpoint}" if teacher.checkpoint else how_trained(teacher)
        if not trained(run) and not teacher.checkpoint:
            how = "with the weights that its own code gives it"
        known = f"{described(teacher.architecture, teacher.options)} on {teacher.activation}"
        parameters = f"{count_parameters(run.teacher.network):,} parameters, " if run.teacher is not None else ""
        lines[1] = ("teacher", f"{known}, {parameters}{how}")
    if start := recipe.start:
        how = f"from {start.checkpoint}" if start.checkpoint else how_trained(start)
        if not trained(run, "start") and not start.checkpoint:
            how = "with the weights that its own code gives it"
        lines.insert(2, ("start", f"{described(start.architecture, start.options)} on {start.activation}, {how}"))
    if run.recipe.plugins:
        lines.append(("plugins", ", ".join(run.recipe.plugins)))
    return lines


def trained(run: Run, name: str = "teacher") -> bool:
    """Whether the teacher was trained, in this run or for the cache."""
    return run.folder.read_json(f"{name}.json").get("seconds") != 0.0


def started(run: Run) -> str:
    """Where the student's weights started."""
    return f"starts from {run.summary.get('init', run.recipe.student.init)}"


def described(name: str, options: dict[str, Any]) -> str:
    """A part with its options."""
    said = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    return f"{name} ({said})" if said else name


def scheduled(loss: LossTable) -> dict[str, Any]:
    """A term's options, and its schedule where the weight does not stay."""
    return loss.options | ({} if loss.schedule == "constant" else {"schedule": loss.schedule, "until": loss.until})


def how_trained(table: Any) -> str:
    """Epochs, optimiser and rate of a training."""
    epochs = f"{table.epochs} epoch" + "s" * (table.epochs != 1)
    return f"{epochs}, {table.optimizer} {table.lr:g}, weight decay {table.weight_decay:g}"


def commands(run: Run) -> dict[str, Any]:
    """The commands that were given, the one that repeats the run from its folder, and what it went on with that was
    other than before.
    """
    known = run.folder.read_json("env.json")
    made = sessions(known)
    recipe, out = str(run.folder / "recipe.toml"), f"{run.folder.path}-again"
    again = shlex.join([*known.get("launcher", ["lasnn"]), "distill", recipe, "--out", out])
    threads = known.get("threads")
    if threads and str(known.get("device", "cpu")) == "cpu":
        again = f"OMP_NUM_THREADS={threads} {again}"
    given = []
    for one in made:
        words = [str(word) for word in one.get("command") or []]
        if words[1:2] in (["distill"], ["compare"]):
            given.append(shlex.join([*one.get("launcher", ["lasnn"]), *words[1:]]))
    changes = [change for before, after in pairwise(made) for change in changed_conditions(before, after)]
    return {"given": list(dict.fromkeys(given)), "again": again, "changes": changes}
