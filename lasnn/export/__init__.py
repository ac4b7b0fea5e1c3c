"""Exports: a student in a file that other programs read, verified in them before it is called done."""

import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lasnn.data import Images, Streamed
from lasnn.errors import MachineError, UserError, unknown
from lasnn.export import nir, onnx, pt2, safetensors
from lasnn.export.exporter import Exporter, Reader, Sample
from lasnn.export.verification import Agreement, Verification, drawn_images, samples
from lasnn.files import atomic_replace
from lasnn.loaded_run import Run, load_run
from lasnn.recipe.paths import expanded
from lasnn.registry import exporters, translate_errors

__all__ = ["Agreement", "Disagreement", "Exporter", "Reader", "Sample", "export", "nir", "onnx", "pt2", "safetensors"]


class Disagreement(MachineError):
    """A reader makes something else of the exported file than the student does; `result` has the figures."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


def export(
    run: str | Path | Run | None,
    form: str,
    *,
    timesteps: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    data_root: str | Path | None = None,
) -> dict[str, Any]:
    """Write a run's student to a file, and verify the file in its readers on test images.

    An export needs no images: where the run's are not there any more, or are others, drawn ones take their place.
    The file is written under another name beside its place and takes it once every reader agrees.

    Args:
        run: a run folder, a student's .safetensors file, or what `load_run` returned; None is the newest folder under
            `runs/`.
        form: the name of a registered exporter.
        timesteps: T; None is the T of the training.
        out: the file; None is `student-t<T>` with the format's ending, in the run folder.
        force: replace a file that exists.
        data_root: the folder of the images; given, they must be there and be the run's. None is where the run has them.

    Returns:
        `file`, `format`, `timesteps`, `bytes`, `takes` and `gives` (input and output, in words), `needs` (files that
        must lie beside it), `data_changes` (since the run began, a line each), `verified_on` ("test images" or "drawn
        images", and then `why_drawn`), `verified` and `agreements`, an `Agreement` for each reader.

    Raises:
        UserError: everything that is wrong with the arguments, or what the format cannot say of this student.
        Disagreement: a reader does not agree (see `lasnn.export.verification`); the file is kept beside its place.
    """
    # The readers run on the CPU, and equality bit for bit is promised for it alone.
    if not isinstance(run, Run):
        run = load_run(run, data_root=data_root)
    elif data_root is not None:
        run = load_run(str(run.folder), data_root=data_root)
    elif run.device.type != "cpu":
        run = replace(run, device=torch.device("cpu"), student=copy.deepcopy(run.student).cpu())
    exporter, path = _prepare(run, form, timesteps, None if out is None else expanded(out, "--out"), force)
    with translate_errors(exporters[form]):
        exporter.check()
    images, facts = _images(run, required=data_root is not None)
    with atomic_replace(path) as temporary:
        with translate_errors(exporters[form]):
            exporter.write(temporary)
            readers = exporter.readers(temporary)
        checks = [Verification(reader, exporter.student) for reader in readers]
        for sample in samples(exporter.student, images, run.recipe.seed):
            for check in checks:
                check.add(sample)
        agreements = [check.agreement() for check in checks]
        result = {
            "file": str(path),
            "format": form,
            "timesteps": exporter.timesteps,
            "bytes": temporary.stat().st_size,
            "takes": exporter.takes,
            "gives": exporter.gives,
            "needs": exporter.needs,
            **facts,
            "verified": not any(found.problem for found in agreements),
            "agreements": [found.as_json() for found in agreements],
        }
        if not result["verified"]:
            kept = path.with_name(f"{path.name}.unverified")
            temporary.replace(kept)
            found = next(found for found in agreements if found.problem)
            raise Disagreement(
                f"{found.reader} does not agree with the student: {found.problem}; the first layer that differs is "
                f"{found.first_layer or 'not known'} ({found.flipped:,} of {found.spikes:,} spikes, arg-max equal on "
                f"{found.same_class}/{found.images}, logits up to {found.logit_difference:.2g} apart); the file is "
                f"kept as {kept}",
                {**result, "file": str(kept)},
            )
    return result


def _images(run: Run, required: bool) -> tuple[Images | Streamed, dict[str, Any]]:
    """The images that a file is verified on, and what the result says of them."""
    try:
        return run.images.test, {"data_changes": run.images.changes, "verified_on": "test images"}
    except UserError as error:
        if required:
            raise
        facts = {"data_changes": [], "verified_on": "drawn images", "why_drawn": "; ".join(error.problems)}
        return drawn_images(run.description, run.recipe.seed), facts


def _prepare(run: Run, form: str, timesteps: int | None, out: Path | None, force: bool) -> tuple[Exporter, Path]:
    """The exporter and the file's place, checked; all that is wrong is reported at once."""
    problems = []
    if timesteps is None:
        timesteps = run.recipe.student.timesteps
    elif not isinstance(timesteps, int) or isinstance(timesteps, bool) or timesteps < 1:
        problems.append(f"timesteps (--timesteps) must be a whole number of at least 1, not {timesteps!r}")
    if form not in exporters:
        raise UserError(*problems, unknown("format", form, exporters))
    kind = exporters[form].function
    if not (isinstance(kind, type) and issubclass(kind, Exporter)):
        raise UserError(f"format {form!r} ({exporters[form].where}) must be a lasnn.export.Exporter")
    missing = [package for package in kind.packages if not _is_installed(package)]
    if missing:
        fix = f"pip install 'lasnn[{kind.extra}]'" if kind.extra else "install them"
        problems.append(f"format {form!r} needs {', '.join(missing)}, not installed here: {fix}")
    if out is None:
        out = run.folder.output(f"student-t{timesteps}{kind.suffix}")
    if out.is_dir():
        problems.append(f"{out} is a folder; name a file")
    elif out.suffix != kind.suffix:
        problems.append(f"{out}: a file of format {form!r} ends in {kind.suffix}")
    elif out.exists() and not force:
        problems.append(f"{out} exists; --force replaces it, --out names another file")
    elif not out.parent.is_dir():
        problems.append(f"{out}: there is no folder {out.parent}; make it first")
    if problems:
        raise UserError(*problems)
    return exporters.build(form, run, timesteps), out


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:
        # Its import is blocked.
        return False
