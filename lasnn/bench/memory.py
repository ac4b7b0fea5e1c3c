"""How much memory a distillation takes at a long T, whole and in chunks of time: `lasnn bench memory`.

Each case is a run of its own in a process of its own, teacher, attention, optimiser and evaluation included, on random
images: what is measured is what `lasnn distill` takes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from lasnn.errors import MachineError, UserError
from lasnn.markdown import markdown_table
from lasnn.run import environment

# Of T = 100 to T = 8 at the same batch: what chunks are for.
PROMISED = 2.0
SHORT, LONG = 8, 100
CHUNKS = (8, 4)


def measure(device: str, batch_size: int, precision: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Peak memory at T = 8, and at T = 100 in chunks and whole, the same batch.

    Args:
        device: "cpu", "cuda" or "cuda:N", "auto".
        batch_size: images a step.
        precision: of the recipe.
        tell: is told what runs.

    Returns:
        `environment`, `batch_size`, `precision`, and `rows`, each with `timesteps`, `time_chunk`, `peak_bytes` of the
        process (on a GPU of PyTorch's tensors), `base_bytes` before the run, `planned_bytes` of `--dry-run`, `seconds`,
        and `ratio`, the peak above the base over that of T = 8; or `failed` instead.

    Raises:
        UserError: the device is not here.
        MachineError: the first case fails.
    """
    import torch

    from lasnn.factory import pick_device

    try:
        found = pick_device(device)
    except UserError as error:
        raise UserError(*(f"--device: {problem}" for problem in error.problems)) from None
    rows: list[dict[str, Any]] = []
    for timesteps, chunk in [(SHORT, 0), *((LONG, chunk) for chunk in CHUNKS), (LONG, 0)]:
        tell(f"T = {timesteps}, " + (f"{chunk} steps at once" if chunk else "all steps at once"))
        case = {"timesteps": timesteps, "time_chunk": chunk}
        row = case | _in_a_process({**case, "device": str(found), "batch_size": batch_size, "precision": precision})
        if "failed" in row and not rows:
            raise MachineError(f"the run at T = {timesteps} failed: {row['failed']}")
        if "failed" not in row:
            used, first = (r["peak_bytes"] - r["base_bytes"] for r in (row, rows[0] if rows else row))
            row["ratio"] = used / first
        rows.append(row)
    known = environment(torch.device(found))
    return {"environment": known, "batch_size": batch_size, "precision": precision, "rows": rows}


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines of Markdown."""
    titles = ("T", "distill.time_chunk", "peak, MiB", "before the run", "ratio to T = 8", "planned", "seconds")
    lines = []
    for row in result["rows"]:
        cells = (str(row["timesteps"]), str(row["time_chunk"] or "0 (all at once)"))
        if "failed" in row:
            lines.append((*cells, row["failed"], "", "", "", ""))
            continue
        mib = [f"{row[key] / 2**20:,.0f}" for key in ("peak_bytes", "base_bytes", "planned_bytes")]
        lines.append((*cells, mib[0], mib[1], f"{row['ratio']:.2f}", mib[2], f"{row['seconds']:.0f}"))
    return markdown_table(titles, lines)


def complain(result: dict[str, Any]) -> None:
    """Raise where no chunk keeps the promise.

    Raises:
        MachineError: with the best ratio.
    """
    ratios = [row["ratio"] for row in result["rows"] if row["time_chunk"] and "ratio" in row]
    if not ratios or min(ratios) > PROMISED:
        found = f"{min(ratios):.2f} times that of T = {SHORT}" if ratios else "no run in chunks succeeded"
        raise MachineError(f"memory at T = {LONG} in chunks: {found}; at most {PROMISED:g} is promised")


def _in_a_process(case: dict[str, Any]) -> dict[str, Any]:
    """What `_run` returns of a case, in a new process; `failed` where it does not end well."""
    with tempfile.TemporaryDirectory() as folder:
        # Relative entries of the module path are the parent's.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, "-m", "lasnn.bench.memory", json.dumps(case)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": "killed, as when memory is out" if done.returncode < 0 else last}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _run(case: dict[str, Any], architecture: str = "vgg9", width: int = 16) -> dict[str, Any]:
    """Distil in the working directory, and say what memory that took."""
    import time

    import torch

    from lasnn.data import Dataset, Images
    from lasnn.evaluation.speed import forget_peak, peak_memory
    from lasnn.plan import read_plan
    from lasnn.random import generator
    from lasnn.recipe.schema import Recipe
    from lasnn.registry import datasets
    from lasnn.training.distill import distill

    @datasets.register("random-images")
    class RandomImages(Dataset):
        """Noise, 28 x 28: two batches, so that the second meets what the first left behind, and one to evaluate."""

        channels, height, width = 1, 28, 28
        classes, mean, std = tuple("0123456789"), (0.5,), (0.3,)

        def __init__(self, root, *, images: int):
            self.root = root
            self.train_size, self.test_size = 2 * images, images

        def load(self):
            def images(count: int) -> Images:
                draws = generator("bench", count)
                pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=draws)
                return Images(pixels, torch.arange(count) % 10)

            return images(self.train_size), images(self.test_size)

    def recipe(images: int, timesteps: int, chunk: int) -> Recipe:
        network = {"architecture": architecture, "width": width}
        tables = {
            "device": case["device"],
            "precision": case["precision"],
            "data": {"name": "random-images", "batch_size": images, "images": images},
            "teacher": {**network, "epochs": 1},
            "student": {**network, "timesteps": timesteps, "encoder": "poisson"},
            "distill": {"epochs": 1, "time_chunk": chunk},
        }
        return Recipe.from_tables(tables)

    # A run of two images loads all the code there is: that is no part of what a larger one takes.
    distill(recipe(2, 10, min(case["time_chunk"], 2)), "first", progress=None)
    wanted = recipe(case["batch_size"], case["timesteps"], case["time_chunk"])
    planned = read_plan(wanted).memory_bytes
    device = torch.device(case["device"])
    forget_peak(device)
    base = peak_memory(device)
    begin = time.perf_counter()
    distill(wanted, "run", progress=None)
    seconds = time.perf_counter() - begin
    return {"peak_bytes": peak_memory(device), "base_bytes": base, "planned_bytes": planned, "seconds": seconds}


def main(arguments: Sequence[str]) -> None:
    """One case, given as JSON; its figures as JSON."""
    print(json.dumps(_run(json.loads(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
