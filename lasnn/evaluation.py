"""Evaluation of a finished run at any number of time steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lasnn.conversion import Converted, Method, check, check_options, convert
from lasnn.errors import UserError
from lasnn.measure import images_per_second, measure, teacher_energy_uj
from lasnn.plan import load_data
from lasnn.run import Run, environment, load_run

__all__ = ["Run", "evaluate", "load_run"]

# Where a conversion is measured unless told otherwise; one run of the longest gives them all.
CONVERTED_TIMESTEPS = tuple(2**power for power in range(9))


def evaluate(
    run: str | Path | Run | None = None,
    timesteps: int | Sequence[int] | None = None,
    *,
    converted: Method | None = None,
    percentile: float = 99.9,
    membrane_start: float | None = None,
) -> list[dict[str, Any]]:
    """Measure a run's student on its test images, or its teacher, converted.

    Args:
        run: a run folder, or what `load_run` returned; None is the newest folder under `runs/`.
        timesteps: T, or several; None is the T of the training, for a conversion 1, 2, 4, ..., 256.
        converted: measure the run's teacher, converted by this method, in the student's place.
        percentile, membrane_start: of the conversion, as for `lasnn.conversion.convert`.

    Returns:
        One dict for each T: `accuracy` (a fraction), `timesteps`, `firing_rate` (spikes per neuron and step),
        `firing_rate_by_layer`, `energy_uj` (per image; an operation-count proxy, see `lasnn.measure`), `operations`,
        `images`, `images_per_second`, and of the teacher `teacher_accuracy` and `teacher_energy_uj`. A conversion has
        no `images_per_second` but `converted`: its method, options, thresholds and number of calibration images.

    Raises:
        UserError: the folder holds no finished run, T is below 1, the data is missing or broken, or there is no teacher
            or one that cannot be converted.
    """
    if converted is not None:
        check_options(converted, percentile, membrane_start)
    if not isinstance(run, Run):
        run = load_run(run, device="auto")
    if timesteps is None:
        timesteps = [run.recipe.student.timesteps] if converted is None else CONVERTED_TIMESTEPS
    elif not isinstance(timesteps, Sequence):
        timesteps = [timesteps]
    wrong = [t for t in timesteps if not isinstance(t, int) or isinstance(t, bool) or t < 1]
    if wrong or not timesteps:
        raise UserError(f"timesteps must be whole numbers of at least 1, not {', '.join(map(repr, wrong)) or 'none'}")
    options = {"percentile": percentile, "membrane_start": membrane_start}
    if converted is not None:
        check_conversion(run, converted, **options)
    train, test, _ = load_data(run.recipe, run.data, run.device)
    batch_size = run.recipe.data.batch_size
    student = run.student
    if converted is not None:
        student = convert(run.teacher, converted, train, batch_size=batch_size, **options)
    results = measure(student, test, timesteps, batch_size=batch_size, seed=run.recipe.seed)
    teacher = {}
    if run.teacher is not None:
        data = run.data
        teacher["teacher_accuracy"] = run.summary.get("teacher_accuracy")
        teacher["teacher_energy_uj"] = teacher_energy_uj(run.teacher, (data.channels, data.height, data.width))
    for result in results:
        if isinstance(student, Converted):
            result["converted"] = student.description
        else:
            student.timesteps = result["timesteps"]
            result["images_per_second"] = images_per_second(student, test, batch_size=batch_size)
        result.update(teacher)
    run.student.timesteps = run.recipe.student.timesteps
    return results


def check_conversion(run: Run, method: str, **options: Any) -> None:
    """Check that a run's teacher can be converted; nothing is run.

    Args:
        options: of `lasnn.conversion.check`.

    Raises:
        UserError: the run has no teacher, or one that cannot be converted.
    """
    if run.teacher is None:
        raise UserError(
            f"{run.folder.path} has no teacher to convert: its student was trained alone; evaluate a run whose recipe "
            "has a [teacher]"
        )
    check(run.teacher, method, (run.data.channels, run.data.height, run.data.width), **options)


def smallest_match(results: Sequence[dict[str, Any]], accuracy: float) -> dict[str, Any] | None:
    """The result of the smallest T, of those that `evaluate` returned, whose accuracy is at least `accuracy`.

    With `timesteps=range(1, 1025)`, at the price of T = 1024 alone, no T is left out. None: it is not reached. A longer
    run may fall below the accuracy again; that is to the conversion's advantage.
    """
    return min(
        (result for result in results if result["accuracy"] >= accuracy), key=lambda it: it["timesteps"], default=None
    )


def conditions(run: Run) -> dict[str, Any]:
    """What the figures of `evaluate` hold for: the run, the device and the versions."""
    known = environment(run.device)
    return {
        "run": str(run.folder.path),
        "data": run.recipe.data.name,
        **{name: known[name] for name in ("device", "device_name", "lasnn", "torch")},
    }
