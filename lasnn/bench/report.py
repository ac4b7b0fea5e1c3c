"""What `lasnn bench kernels` leaves: a table, a CSV and a JSON file, and its section of a Markdown page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lasnn.bench import page
from lasnn.errors import MachineError
from lasnn.markdown import markdown_table

# A row of the result, in the order of the CSV file.
COLUMNS = (
    "op",
    "implementation",
    "image",  # B, C, H, W
    "channels_last",
    "timesteps",
    "dtype",
    "elements",  # T*B*C*H*W
    "large",  # above 30 million
    "status",  # ok, or what is wrong
    "median_ms",
    "p10_ms",
    "p90_ms",
    "runs",
    "issue_ms",  # on a GPU: how long the host takes to launch it all
    "times_lasnn",  # median over lasnn's median
    "bytes",  # lasnn's: counted, not measured
    "gb_per_s",
    "share_of_copy",
    "kept_bytes",  # for the backward pass, measured
    "spikes_differ",  # lasnn's: share, against the reference in fp64
    "largest_error",  # lasnn's: of a gradient or a map, relative
)
# Implementations beside lasnn, as the table names them.
PEERS = {
    "reference": "reference",
    "batch norm, then lif": "BN, then lif",
    "SpikingJelly": "SpikingJelly",
    "SpikingJelly, autocast": "its autocast",
}
LEGEND = (
    "Forward and backward, ms: median (10 % to 90 % quantile); of the others the median and how many times lasnn's it "
    "is. GB/s: bytes counted over time. Kept: MiB for the backward pass, lasnn's / SpikingJelly's. †: above 30 million "
    "elements; cl: channels_last."
)


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells, a line for each case, op and dtype first; what was nowhere run has no column."""
    cases: dict[tuple, dict[str, Any]] = {}
    for row in result["rows"]:
        where = (row["op"], tuple(row["image"]), row["channels_last"], row["timesteps"], row["dtype"])
        cases.setdefault(where, {})[row["implementation"]] = row
    peers = [name for name in PEERS if any(name in rows for rows in cases.values())]
    titles = ["op", "dtype", "T x B x C x H x W", "lasnn", "GB/s", "of copy", *(PEERS[name] for name in peers), "kept"]
    lines = []
    for (op, image, last, timesteps, dtype), rows in cases.items():
        own = rows["lasnn"]
        where = "x".join(map(str, (timesteps, *image))) + " cl" * last + " †" * own["large"]
        if own["status"] != "ok":
            lines.append([op, dtype, where, own["status"], *[""] * (len(titles) - 4)])
            continue
        kept = [rows[name].get("kept_bytes") for name in ("lasnn", "SpikingJelly") if name in rows]
        lines.append(
            [
                op,
                dtype,
                where,
                f"{digits(own['median_ms'])} ({digits(own['p10_ms'])}-{digits(own['p90_ms'])})",
                f"{own['gb_per_s']:.0f}" if own["gb_per_s"] >= 10 else f"{own['gb_per_s']:.1f}",
                f"{own['share_of_copy']:.0%}",
                *(peer(rows.get(name)) for name in peers),
                " / ".join("-" if size is None else digits(size / 2**20) for size in kept),
            ]
        )
    return titles, lines


def peer(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    return f"{digits(row['median_ms'])} ({row['times_lasnn']:.2f}x)"


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def save(result: Mapping[str, Any], out: Path, write: Path | None = None) -> list[Path]:
    """Write `kernels-<device>.csv` and `.json` to `out`, and the section of this kind of device of the page `write`.

    Returns:
        The files written.

    Raises:
        MachineError: one cannot be written.
    """
    rows = ({**row, "image": "x".join(map(str, row["image"]))} for row in result["rows"])
    return page.save(section(result["environment"]["device"]), result, rows, COLUMNS, markdown(result), out, write)


def section(device: str) -> str:
    """The name of a device's section of a page, and of its files."""
    return f"kernels-{device.partition(':')[0]}"


def markdown(result: Mapping[str, Any]) -> str:
    """Conditions, table and notes."""
    rows = markdown_table(*table(result))
    return "\n".join([page.conditions(result) + ".", "", *rows, "", LEGEND, *result["notes"], ""])


def complain(result: Mapping[str, Any]) -> None:
    """Raise where lasnn's own op was wrong or failed.

    Raises:
        MachineError: with the first of the cases.
    """
    bad = [row for row in result["rows"] if row["implementation"] == "lasnn" and row["status"] != "ok"]
    if bad:
        first = f"{bad[0]['op']} at T = {bad[0]['timesteps']} in {bad[0]['dtype']}: {bad[0]['status']}"
        raise MachineError(f"{len(bad)} of lasnn's results are wrong, their speed is not given; the first, {first}")
