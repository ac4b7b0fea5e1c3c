"""The report: one HTML file that shows what a run has become, and needs nothing else to be read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lasnn import files
from lasnn.errors import UserError
from lasnn.evaluation.conversion import check_options
from lasnn.evaluation.evaluate import check_conversion, load_run, whole_timesteps
from lasnn.loaded_run import Run
from lasnn.recipe.paths import expanded
from lasnn.report.facts import Tell, at_trained, gather
from lasnn.report.render import render
from lasnn.run import resume_command

__all__ = ["report"]

# A file that begins without this was not written here, and is not written over.
MARK = '<meta name="generator" content="lasnn'


def report(
    run: str | Path | Run | None = None,
    out: str | Path | None = None,
    *,
    timesteps: int | Sequence[int] | None = None,
    converted: str | None = None,
    longest: int = 64,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Measure a finished run and write its report.

    Args:
        run: a run folder, or what `load_run` returned; None is the newest folder under `runs/`.
        out: the HTML file; None is `report.html` in the run folder. An earlier report is replaced, no other file.
        timesteps: T, or several, at which the student's accuracy is measured; None is every T from 1 to twice the
            training's, but not above 16 unless the training's is; where each T is a run of its own (rate encoding), the
            powers of two among them.
        converted: how the teacher is converted for comparison, by a method of `evaluate`, or "none". None is qcfs where
            the teacher has learnt its thresholds and percentile otherwise, and a teacher that cannot be converted is no
            error: the page says why.
        longest: T up to which the conversion is measured.
        tell: called with a line before each part that takes time.

    Returns:
        The page's headline figures: `file`, `bytes`, `data_changes`, `accuracy`, `teacher_accuracy`, `timesteps`,
        `firing_rate`, `energy_uj`, `teacher_energy_uj`, `calibration_error`, `attention_distance` (mean of the images,
        by the student's stage), `over_timesteps` and `converted` (T, accuracy, firing rate, energy each), or in
        `converted` the reason why there is none.

    Raises:
        UserError: the run is not finished, the data is missing, an option is out of its range, the teacher cannot be
            converted by the method asked for, or `out` cannot be written or is another file.
        MachineError: the disk is full, or what is measured is not finite.
    """
    if not isinstance(run, Run):
        run = load_run(run, device="recipe")
    folder = run.folder.path
    if folder.is_file():
        raise UserError(f"{folder} is a student alone; a report needs its run folder, where the training is on record")
    if not run.summary:
        raise UserError(f"{folder} is not finished (it has no summary.json); go on with `{resume_command(folder)}`")
    path = run.folder.output("report.html") if out is None else expanded(out, "--out")
    check_path(path)
    steps = None if timesteps is None else whole_timesteps(timesteps)
    [longest] = whole_timesteps([longest], "longest (--longest)")
    if converted not in (None, "none"):
        check_options(converted)
        check_conversion(run, converted)
    learnt = run.recipe.teacher is not None and run.recipe.teacher.activation == "qcfs"
    method = {None: "qcfs" if learnt else "percentile", "none": None}.get(converted, converted)
    facts = gather(run, steps, method, longest, tell)
    page = render(facts)
    files.write(path, page)
    return {"file": str(path), "bytes": len(page.encode()), **headline(facts)}


def check_path(path: Path) -> None:
    """Check that a report can be written there.

    Raises:
        UserError: it is a folder, in no folder, or a file that is no report.
    """
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file, as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    if path.exists() and MARK not in path.read_bytes()[:1000].decode(errors="replace"):
        raise UserError(f"--out {path} is a file that lasnn did not write; choose another name, or remove it")


def headline(facts: dict[str, Any]) -> dict[str, Any]:
    """The figures that `report` returns."""
    student, teacher = at_trained(facts), facts["teacher"] or {}

    def curve(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: one[key] for key in ("timesteps", "accuracy", "firing_rate", "energy_uj")} for one in results]

    conversion = facts["conversion"]
    if "results" in conversion:
        conversion = {**conversion, "results": curve(conversion["results"])}
    return {
        "run": facts["run"],
        "data_changes": facts["data_changes"],
        **{key: student[key] for key in ("accuracy", "timesteps", "firing_rate", "energy_uj", "calibration_error")},
        "images": facts["images"],
        "teacher_accuracy": teacher.get("accuracy"),
        "teacher_energy_uj": teacher.get("energy_uj"),
        "attention_distance": {stage["student"]: stage.get("mean") for stage in facts["attention"]["stages"]},
        "over_timesteps": curve(facts["results"]),
        "converted": conversion,
    }
