"""What the benchmarks leave: CSV and JSON files, and their sections of a Markdown page, with the conditions above."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lasnn.errors import UserError
from lasnn.files import write as write_file


def prepare(out: Path, write: Path | None, name: str) -> None:
    """Make the folder of results.

    Raises:
        UserError: it cannot be made, or the page `write` has no section of that name to fill.
    """
    problems = folder_problems(out)
    if write is not None:
        problems += page_problems(write, name)
    if problems:
        raise UserError(*problems)
    make_folder(out)


def make_folder(out: Path) -> None:
    """Make the folder of results.

    Raises:
        UserError: the system refuses it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error


def folder_problems(out: Path) -> list[str]:
    """Why a folder of results cannot be made; empty where it can."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        return [f"--out {out}: {there} is a file; name a folder"]
    return [] if os.access(there, os.W_OK) else [f"--out {out}: {there} cannot be written"]


def page_problems(page: Path, name: str) -> list[str]:
    """Why a page cannot take a section; empty where it can."""
    try:
        if has_section(page.read_text(encoding="utf-8"), name):
            return []
    except (OSError, ValueError) as error:
        return [f"--write {page}: {getattr(error, 'strerror', None) or error}"]
    return [f"--write {page}: it needs the lines {' and '.join(markers(name))}, once each"]


def markers(name: str) -> tuple[str, str]:
    """The lines between which a section stands in a Markdown page."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def has_section(page: str, name: str) -> bool:
    """Whether both marks are there, once each and in their order."""
    begin, end = markers(name)
    return page.count(begin) == page.count(end) == 1 and page.index(begin) < page.index(end)


def replaced(page: str, name: str, section: str) -> str:
    """`page` with another section of a name; all else stays."""
    begin, end = markers(name)
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n\n{section}\n{end}{rest.partition(end)[2]}"


def conditions(result: Mapping[str, Any]) -> str:
    """The line that stands above a table: device, versions, date."""
    known = result["environment"]
    device = known["device_name"] if known.get("cuda") else known.get("processor") or known["device_name"]
    parts = [f"{known['device']} ({device})"]
    if known.get("cuda"):
        parts += [f"CUDA {known['cuda']}", f"driver {known['driver'] or 'unknown'}"]
    else:
        parts += [f"{known['threads']} thread{'s' * (known['threads'] != 1)} on {known['cpus']} cores"]
    names = ("lasnn", "torch", "triton", "spikingjelly", "python")
    parts += [f"{name} {known[name]}" for name in names if known.get(name)]
    copied = [f"copy {result['copy_gb_per_s']:.1f} GB/s"] if "copy_gb_per_s" in result else []
    return "; ".join([", ".join(parts), *copied, known["date"]])


def save(
    name: str,
    result: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    section: str,
    out: Path,
    write: Path | None,
) -> list[Path]:
    """Write `<name>.csv` and `<name>.json` to `out`, and the section of that name of the page `write`.

    Args:
        result: what the JSON file holds.
        rows, columns: of the CSV file.
        section: in Markdown.

    Returns:
        The files written.

    Raises:
        MachineError: one cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = {out / f"{name}.csv": text.getvalue(), out / f"{name}.json": json.dumps(result, indent=2) + "\n"}
    if write is not None:
        files[write] = replaced(write.read_text(encoding="utf-8"), name, section)
    for path, content in files.items():
        write_file(path, content)
    return list(files)
