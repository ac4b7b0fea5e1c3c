"""Evaluation of a finished run at any number of time steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lasnn.errors import UserError
from lasnn.measure import images_per_second, measure, teacher_energy_uj
from lasnn.plan import load_data
from lasnn.run import Run, environment, load_run

__all__ = ["Run", "evaluate", "load_run"]


def evaluate(run: str | Path | Run | None = None, timesteps: int | Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Measure a run's student on its test images.

    Args:
        run: a run folder, or what `load_run` returned; None is the newest folder under `runs/`.
        timesteps: T, or several; None is the T of the training.

    Returns:
        One dict for each T: `accuracy` (a fraction), `timesteps`, `firing_rate` (spikes per neuron and step),
        `firing_rate_by_layer`, `energy_uj` (per image; an operation-count proxy, see `lasnn.measure`), `operations`,
        `images`, `images_per_second`, and of the teacher `teacher_accuracy` and `teacher_energy_uj`.

    Raises:
        UserError: the folder holds no finished run, T is below 1, or the data is missing or broken.
    """
    if not isinstance(run, Run):
        run = load_run(run, device="auto")
    if timesteps is None:
        timesteps = [run.recipe.student.timesteps]
    elif not isinstance(timesteps, (list, tuple)):
        timesteps = [timesteps]
    wrong = [t for t in timesteps if not isinstance(t, int) or isinstance(t, bool) or t < 1]
    if wrong or not timesteps:
        raise UserError(f"timesteps must be whole numbers of at least 1, not {', '.join(map(repr, wrong)) or 'none'}")
    _, test = load_data(run.recipe, run.data)
    test = test.to(run.device)
    batch_size = run.recipe.data.batch_size
    results = measure(run.student, test, timesteps, batch_size=batch_size, seed=run.recipe.seed)
    teacher = {}
    if run.teacher is not None:
        data = run.data
        teacher["teacher_accuracy"] = run.summary.get("teacher_accuracy")
        teacher["teacher_energy_uj"] = teacher_energy_uj(run.teacher, (data.channels, data.height, data.width))
    for result in results:
        run.student.timesteps = result["timesteps"]
        result["images_per_second"] = images_per_second(run.student, test, batch_size=batch_size)
        result.update(teacher)
    run.student.timesteps = run.recipe.student.timesteps
    return results


def conditions(run: Run) -> dict[str, Any]:
    """What the figures of `evaluate` hold for: the run, the device and the versions."""
    known = environment(run.device)
    return {
        "run": str(run.folder.path),
        "data": run.recipe.data.name,
        **{name: known[name] for name in ("device", "device_name", "lasnn", "torch")},
    }
