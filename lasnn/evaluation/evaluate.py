"""Evaluation of a finished run at any number of time steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lasnn.data import Images, Streamed
from lasnn.errors import UserError
from lasnn.evaluation.conversion import OF_ONE_T, Converted, Method, check, check_options, convert
from lasnn.evaluation.energy import break_even_rate, in_each_precision, teacher_layers
from lasnn.evaluation.measure import measure, teacher_accuracy
from lasnn.evaluation.operations import dense_operations, teacher_energy_uj
from lasnn.evaluation.speed import speed
from lasnn.loaded_run import Run, load_run
from lasnn.network.teacher import Teacher
from lasnn.run import environment

__all__ = ["Run", "evaluate", "load_run"]

# Where a conversion is measured unless told otherwise; one run of the longest gives them all.
CONVERTED_TIMESTEPS = tuple(2**power for power in range(9))
# How often an encoder that draws is measured.
DRAWS = 3


def evaluate(
    run: str | Path | Run | None = None,
    timesteps: int | Sequence[int] | None = None,
    *,
    converted: Method | None = None,
    percentile: float | None = None,
    membrane_start: float | None = None,
    early_exit: float | None = None,
    draws: int | None = None,
    include_speed: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure a run's student on its test images, or its teacher, converted.

    Args:
        run: a run folder, or what `load_run` returned; None is the newest folder under `runs/`.
        timesteps: T, or several; None is the T of the training, for a conversion 1, 2, 4, ..., 256.
        converted: measure the run's teacher, converted by this method, in the student's place.
        percentile, membrane_start: of the conversion, as for `lasnn.evaluation.conversion.convert`; None is its own.
        early_exit: also stop each image once the largest class probability reaches this, in (0, 1].
        draws: how often an encoder that draws is measured; None is 3. The first draw is that of `summary.json`.
        include_speed: also measure what needs runs of its own at each T: `operations.dense`, `images_per_second`,
            `latency_ms` and `peak_memory_mib`. Without them many T cost no more than the longest.
        tell: called with a line before a conversion is measured, which takes time.

    Returns:
        One dict for each T, as `lasnn.evaluation.measure.measure` returns it, and in it what `include_speed` names (see
        `lasnn.evaluation.speed.speed`), of the teacher `teacher_accuracy`, `teacher_energy_uj` and
        `teacher_energy_with_memory`, and of both `break_even_firing_rate`: for "fp32" and "int8" the spikes per neuron
        and step at which the student takes as much energy as the teacher, memory accesses counted. Where the encoder
        draws, every figure is the mean over the draws, `accuracies` has each and `accuracy_deviation` their standard
        deviation. A conversion has `converted`: its method, options, thresholds and number of calibration images.

    Raises:
        UserError: the folder holds no finished run, an option is out of its range or does not fit the encoder, the data
            is missing, broken or no test of this run (see `lasnn.bound_data`), or there is no teacher or one
            that cannot be converted.
    """
    options = {"membrane_start": membrane_start}
    if percentile is not None:
        if converted != "percentile":
            raise UserError("percentile (--percentile) goes with --converted percentile")
        options["percentile"] = percentile
    if converted is not None:
        check_options(converted, **options)
    elif membrane_start is not None:
        raise UserError("membrane_start (--membrane-start) goes with --converted; a student's neurons start from rest")
    if early_exit is not None and not 0 < early_exit <= 1:
        raise UserError(f"early exit (--exit): the confidence must be above 0 and at most 1, got {early_exit}")
    if not isinstance(run, Run):
        run = load_run(run, device="recipe")
    if timesteps is None:
        timesteps = [run.recipe.student.timesteps] if converted is None else CONVERTED_TIMESTEPS
    timesteps = whole_timesteps(timesteps)
    encoder = run.student.encoder
    if early_exit is not None and converted is None and not encoder.causal:
        raise UserError(
            f"early exit (--exit): the encoder {run.recipe.student.encoder_table.name!r} decides the spikes of all T "
            "steps at once, so no shorter run is part of a longer one; it takes a causal encoder, as direct or poisson"
        )
    if draws is not None and draws < 1:
        raise UserError(f"draws (--draws) must be at least 1, got {draws}")
    if draws is not None and draws > 1 and (converted is not None or not encoder.random):
        raise UserError(
            "draws (--draws): nothing is drawn here; they go with a student whose encoder draws, as poisson"
        )
    if converted is not None:
        check_conversion(run, converted, **options)
    train, test = run.images.train, run.images.test
    batch_size = run.recipe.data.batch_size
    if converted is None:
        students = [(run.student, list(timesteps))]
    else:
        tell(f"{conversion_line(converted, len(test), max(timesteps))} (--timesteps for less)")
        students = conversions(run.teacher, converted, train, timesteps, batch_size=batch_size, **options)
    try:
        results = []
        for student, steps in students:
            count = (draws or DRAWS) if student.encoder.random else 1
            measured = [
                measure(
                    student,
                    test,
                    steps,
                    batch_size=batch_size,
                    seed=run.recipe.seed,
                    draw=draw,
                    early_exit=early_exit,
                )
                for draw in range(count)
            ]
            results += [merge(same) | {"student": student} for same in zip(*measured, strict=True)]
        image = (run.description.channels, run.description.height, run.description.width)
        teacher = {}
        if run.teacher is not None:
            teacher["teacher_accuracy"] = run.summary.get("teacher_accuracy")
            if run.part or run.images.changes:
                # The summary's is that of all test images, and as they were.
                teacher["teacher_accuracy"] = teacher_accuracy(run.teacher, test, batch_size=batch_size)
            teacher["teacher_energy_uj"] = teacher_energy_uj(run.teacher, image)
            teacher["teacher_energy_with_memory"] = in_each_precision(teacher_layers(run.teacher, image))
        for result in results:
            student = result.pop("student")
            if include_speed:
                student.timesteps = result["timesteps"]
                result["operations"]["dense"] = dense_operations(student.steps, image, run.device)
                result.update(speed(student.steps, test, batch_size=batch_size))
            if isinstance(student, Converted):
                result["converted"] = student.description
            result.update(teacher)
            if teacher:
                result["break_even_firing_rate"] = break_even(result)
    finally:
        run.student.timesteps = run.recipe.student.timesteps
    return results


def break_even(result: dict[str, Any]) -> dict[str, float | None]:
    """By precision, the firing rate at which the student takes as much as its teacher, memory accesses counted."""
    return {
        name: break_even_rate(result["firing_rate"], student, result["teacher_energy_with_memory"][name]["energy_uj"])
        for name, student in result["energy_with_memory"].items()
    }


def conversions(
    teacher: Teacher, method: Method, images: Images | Streamed, timesteps: Sequence[int], **options: Any
) -> Iterator[tuple[Converted, list[int]]]:
    """A teacher's conversions, each with those of the T that it is to be measured at: one for all, or for each its own
    where the method chooses its thresholds for T.

    Args:
        teacher, method, images, options: as for `convert`.
    """
    if method not in OF_ONE_T:
        yield convert(teacher, method, images, **options), list(timesteps)
        return
    for steps in timesteps:
        yield convert(teacher, method, images, timesteps=steps, **options), [steps]


def whole_timesteps(given: int | Iterable[int], name: str = "timesteps (--timesteps)") -> list[int]:
    """One number of time steps or several as a list; NumPy's whole numbers, and its arrays, are taken as well.

    Raises:
        UserError: one is no whole number of at least 1, or there are none.
    """
    several = list(given) if isinstance(given, Iterable) else [given]
    wrong = [t for t in several if not isinstance(t, Integral) or isinstance(t, bool) or t < 1]
    if wrong or not several:
        said = ", ".join(map(repr, wrong)) or "none"
        raise UserError(f"{name} must be whole numbers of at least 1, not {said}")
    return list(map(int, several))


def conversion_line(method: str, images: int, longest: int) -> str:
    """What is said before a teacher's conversion is measured."""
    return f"teacher, converted by {method}: {images:,} test images, up to T = {longest}"


def merge(draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several measurements of the same; with the accuracy of each and its standard deviation."""
    if len(draws) == 1:
        return dict(draws[0])
    accuracies = [draw["accuracy"] for draw in draws]
    return {**_mean(draws), "accuracies": accuracies, "accuracy_deviation": stdev(accuracies)}


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        # What does not occur in a draw is left out of its counts, and of its notes.
        found: dict[str, list[Any]] = {}
        for value in values:
            for key, one in value.items():
                found.setdefault(key, []).append(one)
        missing = {key: [0] * (len(values) - len(ones)) for key, ones in found.items()}
        return {key: _mean(ones if isinstance(ones[0], str) else ones + missing[key]) for key, ones in found.items()}
    if isinstance(first, list):
        return [_mean(each) for each in zip(*values, strict=True)]
    return first if isinstance(first, str) or all(value == first for value in values) else mean(values)


def check_conversion(run: Run, method: str, **options: Any) -> None:
    """Check that a run's teacher can be converted; nothing is run.

    Args:
        options: of `lasnn.evaluation.conversion.check`.

    Raises:
        UserError: the run has no teacher, or one that cannot be converted.
    """
    if run.teacher is None:
        raise UserError(
            f"{run.folder} has no teacher to convert: its student was trained alone, or only the student is at hand; "
            "evaluate the folder of a run whose recipe has a [teacher]"
        )
    check(run.teacher, method, (run.description.channels, run.description.height, run.description.width), **options)


def first_reaching(results: Sequence[dict[str, Any]], accuracy: float) -> dict[str, Any] | None:
    """The result of the smallest T, of those that `evaluate` returned, whose accuracy is at least `accuracy`.

    With `timesteps=range(1, 1025)` and `include_speed=False`, at the price of T = 1024 alone, no T is left out. None:
    it is not reached. A longer run may fall below the accuracy again; that is to the conversion's advantage.
    """
    return min(
        (result for result in results if result["accuracy"] >= accuracy), key=lambda it: it["timesteps"], default=None
    )


def conditions(run: Run) -> dict[str, Any]:
    """What the figures of `evaluate` hold for: the run, the device and the versions."""
    known = environment(run.device)
    return {
        "run": str(run.folder),
        "data": run.images_recipe.data.name,
        "data_source": run.data.source,
        "data_changes": run.images.changes,
        "classes": list(run.description.classes),
        **{name: known[name] for name in ("device", "device_name", "lasnn", "torch")},
    }
