"""What `%%bash` does while the site is built: IPython's own hands the output over in pieces that end within a line."""

import subprocess
import sys

from IPython.core.magic import register_cell_magic


@register_cell_magic
def bash(line: str, cell: str) -> None:
    """Run the cell, then print all it said; one that fails fails the page."""
    done = subprocess.run(
        ["bash", "-c", cell], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    sys.stdout.write(done.stdout)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}")
